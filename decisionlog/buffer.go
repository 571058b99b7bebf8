package decisionlog

import (
	"bytes"
	"slices"
	"sync"
)

// ring is a queue that grows, and gives back its memory once it is empty and was
// large. It does not lock; its owner does.
type ring[T any] struct {
	items []*T // a circle; its length is a power of two, or 0
	head  int
	n     int
}

// smallRing is how much the smallest ring has room for, and largeRing what an
// empty one keeps.
const (
	smallRing = 16
	largeRing = 256
)

func (r *ring[T]) push(x *T) {
	if r.n == len(r.items) {
		items := make([]*T, max(smallRing, 2*r.n))
		for i := range r.n {
			items[i] = r.items[(r.head+i)&(len(r.items)-1)]
		}
		r.items, r.head = items, 0
	}
	r.items[(r.head+r.n)&(len(r.items)-1)] = x
	r.n++
}

// pop takes what was pushed first; there must be something.
func (r *ring[T]) pop() *T {
	x := r.items[r.head]
	r.items[r.head] = nil
	r.head = (r.head + 1) & (len(r.items) - 1)
	r.n--
	if r.n == 0 && len(r.items) > largeRing {
		*r = ring[T]{}
	}
	return x
}

// ticket is one event that several sinks are to have.
type ticket struct {
	left   int    // sinks that are not done with it
	reason reason // of the first that dropped it
}

// Texts gather in blocks, which are used again; up to unusedBlocks of them are kept
// for that, 8 MiB. A pool would not do: the collector empties it between two
// deliveries.
const (
	blockBytes   = 64 << 10
	unusedBlocks = 128
)

// blocks are those that are not in use.
var blocks struct {
	mu     sync.Mutex
	unused [][]byte
}

// newBlock returns an empty block with room for n bytes at least.
func newBlock(n int) []byte {
	if n <= blockBytes/2 || n > blockBytes {
		return make([]byte, 0, n)
	}
	blocks.mu.Lock()
	defer blocks.mu.Unlock()
	last := len(blocks.unused) - 1
	if last < 0 {
		return make([]byte, 0, blockBytes)
	}
	b := blocks.unused[last]
	blocks.unused = blocks.unused[:last]
	return b
}

// freeBlocks has blocks used again, which nobody may look at any more.
func freeBlocks(list [][]byte) {
	blocks.mu.Lock()
	defer blocks.mu.Unlock()
	for _, b := range list {
		if cap(b) == blockBytes && len(blocks.unused) < unusedBlocks {
			blocks.unused = append(blocks.unused, b[:0])
		}
	}
}

// gathering is the JSON of events that are to become a chunk, each with a byte
// that separates it from the next. It does not lock; its owner does.
type gathering struct {
	blocks  [][]byte  // the text; each event is in one
	size    int       // of the text
	lens    []uint32  // of each event in the text, the separator included
	tickets []*ticket // of each event; empty if the log has one sink
}

// sizeGathered is what an event takes beside its text, sizeGathering what the
// chunk takes beside its events that a gathering becomes.
const (
	sizeGathered  = 12
	sizeGathering = sizeChunk + 64
)

func (g *gathering) add(text []byte, separator byte, t *ticket) {
	n := len(text) + 1
	last := len(g.blocks) - 1
	if last < 0 || n > cap(g.blocks[last])-len(g.blocks[last]) {
		g.blocks = append(g.blocks, newBlock(max(n, min(g.size, blockBytes))))
		last++
	}
	g.blocks[last] = append(append(g.blocks[last], text...), separator)
	g.size += n
	g.lens = append(g.lens, uint32(n))
	if t != nil {
		g.tickets = append(g.tickets, t)
	}
}

// held is what it takes in memory, in bytes; compressed it takes less.
func (g *gathering) held() int64 {
	if len(g.lens) == 0 {
		return 0
	}
	return sizeGathering + int64(g.size) + sizeGathered*int64(len(g.lens))
}

// more is how much larger held would be with one more event.
func (g *gathering) more(text []byte) int64 {
	n := sizeGathered + int64(len(text)) + 1
	if len(g.lens) == 0 {
		n += sizeGathering
	}
	return n
}

// cut takes the first n events off.
func (g *gathering) cut(n int) gathering {
	size := 0
	for _, l := range g.lens[:n] {
		size += int(l)
	}
	first := gathering{size: size, lens: g.lens[:n:n]}
	g.size, g.lens = g.size-size, g.lens[n:]
	whole := 0 // blocks that are cut off
	for size > 0 && len(g.blocks[whole]) <= size {
		size -= len(g.blocks[whole])
		whole++
	}
	first.blocks = slices.Clone(g.blocks[:whole])
	g.blocks = g.blocks[whole:]
	if size > 0 {
		first.blocks = append(first.blocks, g.blocks[0][:size:size])
		g.blocks[0] = g.blocks[0][size:]
	}
	if len(g.tickets) > 0 {
		first.tickets = g.tickets[:n:n]
		g.tickets = g.tickets[n:]
	}
	return first
}

// text returns the text in one piece, without room to grow.
func (g *gathering) text() []byte {
	if len(g.blocks) == 1 {
		return slices.Clip(g.blocks[0])
	}
	return bytes.Join(g.blocks, nil)
}
