package decisionlog

import "time"

// Settings are those of one tenant's log.
type Settings struct {
	// Tenant names the log in what the server logs about it.
	Tenant string

	// Labels are those of each event. Nil is delivered as null, as by OPA.
	Labels map[string]string

	// Sinks are where each event goes. Without one, nothing is recorded.
	Sinks []Sink

	Reporting Reporting

	// OnFull says what happens to an event for which there is no room. Default
	// DropOldest. MaxWait bounds the wait of Wait. Default 100 ms.
	OnFull  OnFull
	MaxWait time.Duration

	// Turned is called after a sink has begun to fail, or has taken something
	// again. It must neither block nor call the log. Optional.
	Turned func()

	// FilterTime bounds one evaluation of the drop or the mask rule. Default
	// 100 ms.
	FilterTime time.Duration
}

// OnFull is what happens to an event for which there is no room.
type OnFull int

const (
	// DropOldest makes room: what is buffered longest is dropped.
	DropOldest OnFull = iota
	// DropNewest drops the event.
	DropNewest
	// Wait lets the request wait for room, until Settings.MaxWait and its
	// deadline, and then drops the event.
	Wait
	// Deny drops the event, and Record says ErrFull, so that a decision that is
	// not recorded is not given.
	Deny
)

// Trigger says when what is buffered is delivered to a service or S3; files and
// the console have it at once.
type Trigger int

const (
	// Periodic delivers after a delay between Reporting.MinDelay and MaxDelay,
	// or sooner when a quarter of what may be buffered is ready.
	Periodic Trigger = iota
	// Immediate delivers a chunk when it is full; after the delay also those
	// that are not.
	Immediate
	// Manual delivers when Flush is called, and at the end.
	Manual
)

// Reporting is what OPA calls decision_logs.reporting.
type Reporting struct {
	// BufferBytes bounds what the log buffers, in bytes of memory. Default
	// 8 MiB.
	BufferBytes int64

	// BufferEvents bounds how many events the log buffers. Default: no bound
	// but that in bytes.
	BufferEvents int64

	// UploadBytes bounds a chunk that is sent, compressed. Default 32768; at
	// least 90, at most 64 MiB.
	UploadBytes int64

	// MinDelay and MaxDelay bound the time between deliveries. Default 300 s
	// and 600 s.
	MinDelay, MaxDelay time.Duration

	// DecisionsPerSecond bounds how many events a second are kept; those
	// beyond it are dropped. Default: no bound.
	DecisionsPerSecond float64

	Trigger Trigger
}

// Defaults and bounds of settings.
const (
	defaultBufferBytes = 8 << 20
	defaultUploadBytes = 32 << 10
	minUploadBytes     = 90 // of OPA: an event with nothing but an ID
	maxUploadBytes     = 64 << 20
	defaultMinDelay    = 300 * time.Second
	defaultMaxDelay    = 600 * time.Second
	defaultMaxWait     = 100 * time.Millisecond
	defaultFilterTime  = 100 * time.Millisecond
)

// orDefault returns the settings with defaults where they are zero.
func (s Settings) orDefault() Settings {
	if s.MaxWait <= 0 {
		s.MaxWait = defaultMaxWait
	}
	if s.FilterTime <= 0 {
		s.FilterTime = defaultFilterTime
	}
	r := &s.Reporting
	if r.BufferBytes <= 0 {
		r.BufferBytes = defaultBufferBytes
	}
	if r.UploadBytes <= 0 {
		r.UploadBytes = defaultUploadBytes
	}
	r.UploadBytes = min(max(r.UploadBytes, minUploadBytes), maxUploadBytes)
	if r.MinDelay <= 0 && r.MaxDelay <= 0 {
		r.MinDelay, r.MaxDelay = defaultMinDelay, defaultMaxDelay
	}
	r.MinDelay = max(r.MinDelay, 0)
	r.MaxDelay = max(r.MaxDelay, r.MinDelay, time.Millisecond)
	return s
}
