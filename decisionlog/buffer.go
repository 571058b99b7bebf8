package decisionlog

import (
	"math/bits"
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

// Texts of gatherings are used again, those that have room for minText to maxText
// bytes. What is not in use the collector takes away.
const (
	minText = 1 << 12
	maxText = 1 << 20
)

// unusedTexts have texts that are not in use, by the power of two that they have
// room for at least.
var unusedTexts [21]sync.Pool

// newText returns an empty text with room for n bytes at least.
func newText(n int) []byte {
	if n < minText || n > maxText {
		return make([]byte, 0, n)
	}
	power := bits.Len(uint(n - 1))
	if text, ok := unusedTexts[power].Get().(*[]byte); ok {
		return *text
	}
	return make([]byte, 0, 1<<power)
}

// freeText has a text used again, which nobody may look at any more.
func freeText(text []byte) {
	if n := cap(text); n >= minText && n <= maxText {
		text = text[:0]
		unusedTexts[bits.Len(uint(n))-1].Put(&text)
	}
}

// gathering is the JSON of events that are to become a chunk, each with a byte
// that separates it from the next. It does not lock; its owner does.
type gathering struct {
	text    []byte
	lens    []uint32  // of each event in text, the separator included
	tickets []*ticket // of each event; empty if the log has one sink
	before  int       // bytes of text that the gathering before this one had
}

// sizeGathered is what an event takes beside its text, sizeGathering what the
// chunk takes beside its events that a gathering becomes.
const (
	sizeGathered  = 12
	sizeGathering = sizeChunk + 64
)

func (g *gathering) add(text []byte, separator byte, t *ticket) {
	if n := len(g.text) + len(text) + 1; n > cap(g.text) {
		room := max(n, 2*len(g.text))
		if len(g.text) == 0 { // about as much as before comes, most often
			room = max(n, g.before+g.before/8)
		}
		grown := append(newText(room), g.text...)
		freeText(g.text)
		g.text = grown
	}
	g.text = append(append(g.text, text...), separator)
	g.lens = append(g.lens, uint32(len(text)+1))
	if t != nil {
		g.tickets = append(g.tickets, t)
	}
}

// held is what it takes in memory, in bytes; compressed it takes less.
func (g *gathering) held() int64 {
	if len(g.lens) == 0 {
		return 0
	}
	return sizeGathering + int64(len(g.text)) + sizeGathered*int64(len(g.lens))
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
	first := gathering{text: g.text[:size:size], lens: g.lens[:n:n]}
	g.text, g.lens = g.text[size:], g.lens[n:]
	if len(g.tickets) > 0 {
		first.tickets = g.tickets[:n:n]
		g.tickets = g.tickets[n:]
	}
	return first
}

// exact returns it without room to grow.
func (g gathering) exact() gathering {
	g.text, g.lens, g.tickets = slices.Clip(g.text), slices.Clip(g.lens), slices.Clip(g.tickets)
	return g
}
