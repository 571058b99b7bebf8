package document

import (
	"sync"
	"sync/atomic"

	"github.com/open-policy-agent/opa/v1/ast"
)

// memory is what a block remembers: terms of values in it. It is safe for concurrent
// use, and asking it takes no lock.
type memory struct {
	table atomic.Pointer[[]atomic.Pointer[remembered]] // open addressing; at most half of it is in use
	bytes atomic.Int64                                 // that the terms take, about
	small atomic.Int64                                 // of these, what the small ones take

	mu    sync.Mutex // held by who adds
	count int        // guarded by mu

	large sync.Mutex // held by who makes a large term, so that nobody else does too
}

type remembered struct {
	slot uint32
	held bool
	term *ast.Term
}

// sizeRemembered is what one takes beside its term, in bytes.
const sizeRemembered = 24 + 2*8

func rememberedAt(slot uint32, held bool) uint32 {
	h := slot * 0x9e3779b1
	if held {
		h = ^h
	}
	return h ^ h>>15
}

// get returns the term of a slot, or nil.
func (m *memory) get(slot uint32, held bool) *ast.Term {
	table := m.table.Load()
	if table == nil {
		return nil
	}
	mask := uint32(len(*table) - 1)
	for i := rememberedAt(slot, held) & mask; ; i = (i + 1) & mask {
		r := (*table)[i].Load()
		if r == nil {
			return nil
		}
		if r.slot == slot && r.held == held {
			return r.term
		}
	}
}

// add remembers a term, unless there is one, and returns that which is remembered.
func (m *memory) add(slot uint32, held bool, t *ast.Term) (*ast.Term, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if known := m.get(slot, held); known != nil {
		return known, false
	}
	table := m.table.Load()
	if table == nil || 2*(m.count+1) > len(*table) {
		// Who reads the old one may miss what is added from now on, and makes it anew.
		size := 8
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
		m.table.Store(&grown)
		table = &grown
	}
	set(*table, &remembered{slot, held, t})
	m.count++
	return t, true
}

func set(table []atomic.Pointer[remembered], r *remembered) {
	mask := uint32(len(table) - 1)
	i := rememberedAt(r.slot, r.held) & mask
	for table[i].Load() != nil {
		i = (i + 1) & mask
	}
	table[i].Store(r)
}

// largeTerm is from how many bytes on a term is always remembered.
const largeTerm = 4 << 10

// remember remembers a term that takes so many bytes, if there is room, and returns
// the one to use.
func (b *block) remember(slot uint32, held bool, t *ast.Term, size int64) *ast.Term {
	m := &b.terms
	size += sizeRemembered
	if size < largeTerm && m.small.Load()+size > int64(len(b.data)) {
		return t
	}
	t, added := m.add(slot, held, t)
	if added {
		m.bytes.Add(size)
		if size < largeTerm {
			m.small.Add(size)
		}
	}
	return t
}
