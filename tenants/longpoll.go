package tenants

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/gatehouse-authz/gatehouse/schedule"
)

// errInterrupted: a source was no longer waited for, since somebody wants to ask
// it at once.
var errInterrupted = errors.New("no longer waited for")

// poll is one turn of a feed on the schedule: the source is waited for, where it
// can be and few enough are, or asked.
func (fs *feeds) poll(ctx context.Context, f *feed, patient bool) (wait time.Duration, slow bool) {
	f.mu.Lock()
	rest := time.Until(f.rest)
	f.mu.Unlock()
	long := f.canWait()
	switch {
	case rest > 0:
		return rest, false
	case long && f.task.Long(ctx, func(ctx context.Context) { fs.longPoll(ctx, f) }):
		return -1, false
	}
	err := fs.check(ctx, f, patient) // noted by the feed
	if !long && f.canWait() {
		return 0, false
	}
	return fs.delayOf(f), errors.Is(err, errSlow)
}

// canWait reports whether the source may be, and can be, waited for.
func (f *feed) canWait() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.long > 0 && f.waits && f.loaded && f.fails == 0
}

// longPoll waits until the source has something new, or says that it has not.
// After it the feed is polled at once: where that would be too soon, it rests.
func (fs *feeds) longPoll(ctx context.Context, f *feed) {
	begun := time.Now()
	f.mu.Lock()
	before := f.content.digest
	f.mu.Unlock()
	err := fs.checkAs(ctx, f, ask{timeout: fs.timeout, patient: true, wait: f.long})
	delay := fs.delayOf(f)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rest = time.Time{}
	switch {
	case errors.Is(err, errInterrupted):
	case err != nil, f.content.digest == before && time.Since(begun) < schedule.Fast: // it did not wait
		f.rest = time.Now().Add(delay)
	}
}

// takeTurn takes the turn to fetch, which endTurn gives back. Who is not itself
// one that waits for the source ends such a wait.
func (f *feed) takeTurn(ctx context.Context, waits bool) error {
	for {
		if cancel := f.interrupt.Load(); cancel != nil && !waits {
			(*cancel)()
		}
		select {
		case f.turn <- struct{}{}:
			return nil
		case <-ctx.Done():
			return fmt.Errorf("waiting for bundle %q: %w", f.name, ctx.Err())
		case <-time.After(schedule.Fast): // one that waits may have begun just now
		}
	}
}

func (f *feed) endTurn() {
	f.interrupt.Store(nil)
	<-f.turn
}

// interruptible lets others end what who has the turn does.
func (f *feed) interruptible(cancel context.CancelFunc) { f.interrupt.Store(&cancel) }
