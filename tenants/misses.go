package tenants

import (
	"time"
)

// misses bounds how many unknown names a source is asked for: a burst, and then
// so many in a second. Beyond that, names that are not known here are not
// looked up at all. Pool.mu guards it.
type misses struct {
	used float64 // of the burst
	at   time.Time
}

const (
	missBurst  = 1000
	missPerSec = 10
)

func (m *misses) decay(now time.Time) {
	m.used = max(0, m.used-missPerSec*now.Sub(m.at).Seconds())
	m.at = now
}

func (m *misses) add(now time.Time) { m.decay(now); m.used++ }

func (m *misses) allow(now time.Time) bool { m.decay(now); return m.used < missBurst }
