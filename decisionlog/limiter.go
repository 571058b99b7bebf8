package decisionlog

import "time"

// limiter lets so many events a second pass, and as many, at least one, at once.
// It does not lock; its owner does.
type limiter struct {
	perSecond float64
	tokens    float64
	last      time.Time
}

func newLimiter(perSecond float64) *limiter {
	return &limiter{perSecond: perSecond, tokens: max(1, perSecond)}
}

func (l *limiter) allow(now time.Time) bool {
	if !l.last.IsZero() {
		l.tokens = min(l.tokens+now.Sub(l.last).Seconds()*l.perSecond, max(1, l.perSecond))
	}
	l.last = now
	if l.tokens < 1 {
		return false
	}
	l.tokens--
	return true
}
