package tenants

import (
	"time"
)

// lender lends the Go runtime a processor for each evaluation that runs long.
//
// When evaluations keep all processors busy, nobody looks at the network or at
// timers for a time slice of ten milliseconds, again and again on the way of one
// check: answers are late, and a late answer is an error to Envoy. With more
// processors than evaluations the operating system shares the CPUs, and it lets
// those run first that have waited.
func (s *scheduler) lender() {
	lent := 0
	defer func() {
		if lent > 0 {
			s.lend(0)
		}
	}()
	tick := time.NewTicker(lendInterval)
	defer tick.Stop()
	calm := time.Now() // when there last were as many long ones as lent
	for {
		long, running := s.long(time.Now().Add(-longRun))
		if long >= lent {
			calm = time.Now()
		}
		if long > lent || long < lent && time.Since(calm) > calmTime {
			lent = long
			s.lend(lent)
		}
		wait := tick.C
		if running == 0 && lent == 0 && s.rest() {
			wait = nil
		}
		select {
		case <-wait:
		case <-s.watch:
		case <-s.quit:
			return
		}
	}
}

// long counts the evaluations that began before t, up to extraWorkers, and those
// that run at all.
func (s *scheduler) long(t time.Time) (long, running int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for j := s.running.first; j != nil && j.begun.Before(t) && long < extraWorkers; j = j.next {
		long++ // they are in the order in which they began
	}
	return long, s.running.len
}

// rest has the lender woken by the next evaluation, unless one runs already.
func (s *scheduler) rest() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.watching = s.running.len > 0
	return !s.watching
}
