package decisionlog

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"sync"
)

// Sink is where events go: a *Service, an *S3, a *File, a Console or Records. One sink may
// serve many logs. It is never changed.
type Sink interface {
	// Identity is equal for sinks that deliver alike. It has no secrets in it.
	Identity() string

	kind() kind

	// lane names what the sink leans on: what is slow or dead as a whole.
	lane() string

	// deliver delivers the rest of a chunk and notes in it what needs no other
	// attempt. It returns soon after ctx ends, unless it waits for a file. The
	// error may be a *StatusError.
	deliver(ctx context.Context, shared *shared, c *chunk) error
}

// kind is a kind of sink.
type kind uint8

// The kinds of sinks.
const (
	kindService kind = iota
	kindS3
	kindFile
	kindConsole
	kindRecords
	kinds int = iota
)

var kindNames = [kinds]string{"service", "s3", "file", "console", "otlp"}

// direct reports whether events go to such sinks as soon as they are encoded, as
// lines that are not compressed.
func (k kind) direct() bool { return k == kindFile || k == kindConsole }

// laneLimit is how many deliveries may go on in a lane at once. It is more than
// the schedule does of one lane: the rest are those it no longer waits for.
const laneLimit = 32

// shared is what all sinks of a process share.
type shared struct {
	console  io.Writer
	exporter Exporter
	torn     bool // the console's last line has no end; owned by who has locked it

	mu    sync.Mutex
	lanes map[string]int   // :: lane → deliveries that go on; guarded by mu
	locks map[string]*lock // :: file, or "" for the console → its lock; guarded by mu
}

// lock is a lock that can be waited for with a context.
type lock struct {
	users int // guarded by shared.mu
	held  chan struct{}
}

// enter reports whether a lane has room for another delivery; if so, leave must
// be called after it.
func (s *shared) enter(lane string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lanes[lane] >= laneLimit {
		return false
	}
	s.lanes[lane]++
	return true
}

func (s *shared) leave(lane string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lanes[lane]--; s.lanes[lane] == 0 {
		delete(s.lanes, lane)
	}
}

// lock waits until nobody else writes to a file, and returns how to unlock it.
func (s *shared) lock(ctx context.Context, name string) (unlock func(), err error) {
	s.mu.Lock()
	l := s.locks[name]
	if l == nil {
		l = &lock{held: make(chan struct{}, 1)}
		s.locks[name] = l
	}
	l.users++
	s.mu.Unlock()

	done := func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(s.locks, name)
		}
	}
	select {
	case l.held <- struct{}{}:
		return func() { <-l.held; done() }, nil
	case <-ctx.Done():
		done()
		return nil, fmt.Errorf("waiting for another writer: %w", ctx.Err())
	}
}

// identity makes an identity of what a sink does.
func identity(k kind, parts ...any) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%q", parts))
	return kindNames[k] + ":" + hex.EncodeToString(sum[:16])
}
