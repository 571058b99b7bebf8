package document

import (
	"math/bits"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"weak"

	"github.com/open-policy-agent/opa/v1/ast"
)

// memory is what a block remembers: terms of values in it. It is safe for concurrent
// use, and asking it takes no lock.
type memory struct {
	room  *room                        // that the small terms have, with those of other blocks
	bytes atomic.Int64                 // that all terms take, about
	used  atomic.Pointer[atomic.Int64] // of these, what the small ones take; nil: none yet

	// A small term is at one of two places. Where there is no room, it takes that of
	// others that nobody has asked for lately.
	small atomic.Pointer[[]atomic.Pointer[remembered]]

	// A large one stays. The table is open addressing, half of it or more is empty.
	large atomic.Pointer[[]atomic.Pointer[remembered]]
	mu    sync.Mutex // held by who makes a large term, so that nobody else does too
	count int        // guarded by mu
}

// room is what the small terms have together of the blocks that were made with a
// document.
type room struct {
	most atomic.Int64 // bytes
	used atomic.Int64

	mu     sync.Mutex
	blocks []weak.Pointer[block] // guarded by mu; those that remember small terms
}

type remembered struct {
	slot uint32
	held bool
	size int64
	term *ast.Term
	hot  atomic.Bool // it has been asked for since it was last looked at to be forgotten
}

// ask is the term of r, which somebody asks for.
func (r *remembered) ask() *ast.Term {
	if !r.hot.Load() {
		r.hot.Store(true)
	}
	return r.term
}

const (
	// perJSON is how many bytes for each of its JSON a document takes at most with the
	// small terms that it remembers.
	perJSON = 3

	// leastRoom is how many bytes of small terms any document may remember: what is
	// small and asked for at each decision is as fast to have as if it lay there.
	leastRoom = 64 << 10

	// largeTerm is how many bytes a large term takes, or more.
	largeTerm = 4 << 10

	// sizeRemembered is what a small term takes beside itself, in bytes.
	sizeRemembered = 48

	// perPlace is for how many bytes of a block there is a place for a small term.
	perPlace = 32
)

func newRoom() *room {
	r := new(room)
	r.most.Store(leastRoom)
	return r
}

func rememberedAt(slot uint32, held bool) uint32 {
	h := slot * 0x9e3779b1
	if held {
		h = ^h
	}
	return h ^ h>>15
}

func (r *remembered) is(slot uint32, held bool) bool {
	return r != nil && r.slot == slot && r.held == held
}

// get returns the small term of a slot, or nil.
func (m *memory) get(slot uint32, held bool) *ast.Term {
	table := m.small.Load()
	if table == nil {
		return nil
	}
	i := rememberedAt(slot, held) & uint32(len(*table)-1)
	if r := (*table)[i].Load(); r.is(slot, held) {
		return r.ask()
	}
	if r := (*table)[i^1].Load(); r.is(slot, held) {
		return r.ask()
	}
	return nil
}

// add remembers a small term that takes so many bytes, in the place of others where
// there is no room.
func (b *block) add(slot uint32, held bool, t *ast.Term, size int64) {
	m := &b.terms
	table := m.small.Load()
	if table == nil {
		places := make([]atomic.Pointer[remembered], 1<<bits.Len(uint(len(b.data)/perPlace)|1))
		used := new(atomic.Int64)
		if m.used.CompareAndSwap(nil, used) {
			runtime.AddCleanup(b, m.room.leave, used)
			m.take(8 * int64(len(places)))
			m.small.Store(&places)
			m.room.enter(b)
		}
		if table = m.small.Load(); table == nil {
			return // another makes it
		}
	}
	r := &remembered{slot: slot, held: held, size: size + sizeRemembered, term: t}
	if !m.room.make(r.size) {
		return
	}
	i := rememberedAt(slot, held) & uint32(len(*table)-1)
	for range 2 {
		old := (*table)[i].Load()
		if old == nil || !old.hot.Swap(false) {
			m.take(r.size)
			if old = (*table)[i].Swap(r); old != nil {
				m.take(-old.size)
			}
			return
		}
		i ^= 1
	}
}

// enter says that a block remembers small terms.
func (r *room) enter(b *block) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.blocks = append(r.blocks, weak.Make(b))
}

// leave gives back what a block took that nobody has any more.
func (r *room) leave(used *atomic.Int64) { r.used.Add(-used.Load()) }

// make makes room for a term, where others have not been asked for since it was
// looked at them last, and reports whether there is.
func (r *room) make(size int64) bool {
	if r.used.Load()+size <= r.most.Load() {
		return true
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for range 16 {
		if r.used.Load()+size <= r.most.Load() {
			return true
		}
		if len(r.blocks) == 0 {
			return false
		}
		i := rand.IntN(len(r.blocks))
		b := r.blocks[i].Value()
		if b == nil { // nobody has it any more
			last := len(r.blocks) - 1
			r.blocks[i] = r.blocks[last]
			r.blocks = r.blocks[:last]
			continue
		}
		table := *b.terms.small.Load()
		place := &table[rand.IntN(len(table))]
		if old := place.Load(); old != nil && !old.hot.Swap(false) && place.CompareAndSwap(old, nil) {
			b.terms.take(-old.size)
		}
	}
	return false
}

// take counts bytes of small terms.
func (m *memory) take(n int64) {
	m.room.used.Add(n)
	m.used.Load().Add(n)
	m.bytes.Add(n)
}

// wants reports whether a small term that need not be made should be, to be
// remembered: always while there is room, and now and then to take the place of another.
func (m *memory) wants() bool {
	most := m.room.most.Load()
	return m.room.used.Load() < most-most/8 || rand.Uint32()&15 == 0
}

// getLarge returns the large term of a slot, or nil.
func (m *memory) getLarge(slot uint32) *ast.Term {
	table := m.large.Load()
	if table == nil {
		return nil
	}
	mask := uint32(len(*table) - 1)
	for i := rememberedAt(slot, false) & mask; ; i = (i + 1) & mask {
		r := (*table)[i].Load()
		if r == nil {
			return nil
		}
		if r.slot == slot {
			return r.term
		}
	}
}

// addLarge remembers a large term. m.mu is held.
func (m *memory) addLarge(slot uint32, t *ast.Term, size int64) {
	table := m.large.Load()
	if table == nil || 2*(m.count+1) > len(*table) {
		// Who reads the old one may miss what is added from now on, and then looks again.
		size := 4
		if table != nil {
			size = 2 * len(*table)
		}
		grown := make([]atomic.Pointer[remembered], size)
		if table != nil {
			for i := range *table {
				if r := (*table)[i].Load(); r != nil {
					set(grown, r)
				}
			}
		}
		m.large.Store(&grown)
		table = &grown
	}
	set(*table, &remembered{slot: slot, size: size, term: t})
	m.count++
	m.bytes.Add(size)
}

func set(table []atomic.Pointer[remembered], r *remembered) {
	mask := uint32(len(table) - 1)
	i := rememberedAt(r.slot, r.held) & mask
	for table[i].Load() != nil {
		i = (i + 1) & mask
	}
	table[i].Store(r)
}
