package bundles

import (
	"context"
	"errors"
	"runtime"
	"sync"
)

// largeBytes is above what size, compressed or expanded, a bundle is large.
const largeBytes = 1 << 20

// Turns bound how many large bundles, of more than 1 MiB compressed or expanded,
// are in memory at once while they arrive and while they are read. Small ones
// pass freely. Sources that have the same Turns in their Limits share them.
//
// With K turns and N reads at once, what is read takes at most N times 1 MiB
// compressed and 1 MiB expanded, beside
//
//   - 4 K times twice Limits.Bytes, of large archives that arrive or wait for
//     their turn. One that does not go on arriving keeps its place no longer
//     than its source is waited for, and has no turn;
//   - K times Limits.Bytes, Limits.Expanded and what is made of that, of large
//     bundles that are read. One keeps its turn until its Bundle is Done.
//
// Nobody waits for ever, as long as whoever has a Bundle is done with it before
// asking for another.
type Turns struct {
	places turns // for archives that arrive, until they have their turn
	turns  turns // for bundles that are read
}

// NewTurns returns K turns; 4 if k is not positive.
func NewTurns(k int) *Turns {
	if k <= 0 {
		k = 4
	}
	return &Turns{places: make(turns, 4*k), turns: make(turns, k)}
}

// turns holds one value for each that is taken.
type turns chan struct{}

func (t turns) take(ctx context.Context) (free func(), err error) {
	select {
	case t <- struct{}{}:
		return sync.OnceFunc(func() { <-t }), nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// errNoTurn: the caller's context ended before there was a turn.
var errNoTurn = errors.New("no turn in time")

// arrive takes a place for an archive that is large. Its error is errNoTurn.
func (c *content) arrive(ctx context.Context) error {
	if c.limits.Turns == nil {
		return nil
	}
	leave, err := c.limits.Turns.places.take(ctx)
	if err != nil {
		return errNoTurn
	}
	c.leave = leave
	return nil
}

// grow takes a turn once size is that of a large bundle: when its archive has
// arrived, whose place it then leaves. Its error is errNoTurn.
func (c *content) grow(ctx context.Context, size int64) error {
	if size <= largeBytes || c.end != nil || c.limits.Turns == nil {
		return nil
	}
	if c.supplied != nil {
		if err := c.supplied(); err != nil {
			return err
		}
	}
	end, err := c.limits.Turns.turns.take(ctx)
	if err != nil {
		return errNoTurn
	}
	c.end = end
	if c.leave != nil {
		c.leave()
	}
	return nil
}

// settle hands the turn over to the bundle that was read, or ends it, as there
// is none.
func (c *content) settle(b *Bundle, err error) {
	if c.leave != nil {
		c.leave()
	}
	switch {
	case c.end == nil:
	case err != nil:
		c.end()
	default:
		b.holds(c.end)
	}
}

// Done says that the bundle has been made use of, and is dropped now: a large
// one gives its turn back. It may be called more than once, and at once.
func (b *Bundle) Done() {
	if b.end != nil {
		b.end()
	}
}

// holds makes end what Done calls. A Bundle that is dropped without Done gives
// its turn back when it is collected.
func (b *Bundle) holds(end func()) {
	b.end = end
	runtime.AddCleanup(b, func(end func()) { end() }, end)
}
