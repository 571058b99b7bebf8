package plan

import (
	"hash/maphash"
	"math"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/document"
)

// Bounds of the indexes of a Program over its data.
const (
	minScanned     = 24       // elements of a list or object that gets one
	scansBefore    = 3        // after which it gets it
	maxIndexed     = 4096     // lists and objects that may get one
	maxIndexBytes  = 32 << 20 // of all indexes together
	sizeIndexed    = 16       // for each value in an index, in bytes
	sizeIndexedKey = 16       // for each member of an object
	sizeReserved   = 24       // for each value in what may be indexed
)

// indexes are those of a Program. They are made when they are first of use, and
// hold no value that the data does not.
type indexes struct {
	least  int // elements of a list or object that gets an index
	before int // scans of it before that
	seed   maphash.Seed
	budget atomic.Int64 // bytes that are left

	// These are for compiling alone.
	paths map[string]int          // :: path → its number
	roots map[document.Value]bool // what the budget counts

	mu     sync.RWMutex
	known  map[indexed]*dataIndex
	inData map[indexedData]*dataIndex
}

// indexed is what an index is over: a list or object of the data, and a path into
// what is in it.
type indexed struct {
	in   ast.Value // a pointer
	path int
}

// indexedData is what an index is over that is looked at where it lies.
type indexedData struct {
	in   document.Value
	path int
}

func newIndexes(least, before int) *indexes {
	return &indexes{
		least: least, before: before, seed: maphash.MakeSeed(), paths: map[string]int{}, roots: map[document.Value]bool{},
		known: map[indexed]*dataIndex{}, inData: map[indexedData]*dataIndex{},
	}
}

// dataIndex tells which elements of a list, or members of an object, may have a
// value at a path. It tells some too many, whose values have the same hash, never
// too few: who asks looks at each. It is made once, and then never changes.
type dataIndex struct {
	asked atomic.Int32 // how often it was wanted
	ready atomic.Bool
	never atomic.Bool // it cannot be made
	mu    sync.Mutex  // of who makes it

	// A bucket is a chain of entries, each an element, in the order of elements.
	heads   []uint32 // :: bucket → its first entry, plus one
	next    []uint32 // :: entry → the next one, plus one
	element []uint32 // :: entry → element
	keys    []*ast.Term
	members []*ast.Term // of an object, by element, as keys
}

// at returns what is the index over a list or object for a path, or nil where there
// is to be none.
func (x *indexes) at(in ast.Value, id int) *dataIndex {
	switch v := in.(type) {
	case *document.Value:
		if v.Len() < x.least {
			return nil
		}
		return dataIndexOf(x, x.inData, indexedData{*v, id})
	case *ast.Array:
		if v.Len() < x.least {
			return nil
		}
	case ast.Object:
		if v.Len() < x.least {
			return nil
		}
	default:
		return nil
	}
	return dataIndexOf(x, x.known, indexed{in, id})
}

// dataIndexOf returns the index of one of the maps of x, or nil where there is to be none.
func dataIndexOf[K comparable](x *indexes, known map[K]*dataIndex, k K) *dataIndex {
	x.mu.RLock()
	d, full := known[k], len(x.known)+len(x.inData) >= maxIndexed
	x.mu.RUnlock()
	if d != nil || full {
		return d
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if d = known[k]; d == nil && len(x.known)+len(x.inData) < maxIndexed {
		d = new(dataIndex)
		known[k] = d
	}
	return d
}

// usable reports whether an index tells, having made it if it is time to.
func (x *indexes) usable(m *machine, d *dataIndex, in ast.Value, path []pathStep) bool {
	if d.ready.Load() {
		return true
	}
	if d.never.Load() || d.asked.Add(1) <= int32(x.before) || !d.mu.TryLock() {
		return false // another makes it
	}
	defer d.mu.Unlock()
	if !d.ready.Load() && !d.never.Load() && x.make(m, d, in, path) {
		d.ready.Store(true)
	}
	return d.ready.Load()
}

// make fills an index. It reports false where that cannot be, now or never.
func (x *indexes) make(m *machine, d *dataIndex, in ast.Value, path []pathStep) bool {
	var keys, members []*ast.Term // of an object that does not tell what its i-th member is
	count, at := placeOf(&ast.Term{Value: in}).elements()
	if v, ok := in.(ast.Object); ok {
		v.Foreach(func(k, v *ast.Term) {
			keys = append(keys, k)
			members = append(members, v)
		})
	}
	most := x.budget.Load() - int64(len(keys))*sizeIndexedKey
	var hashes, element []uint32
	fits := true
	add := func(i int) func(place) {
		return func(p place) {
			switch h, kind := x.hash(p); kind {
			case plainValue:
				hashes, element = append(hashes, h), append(element, uint32(i))
				fits = fits && int64(len(hashes))*sizeIndexed <= most
			case oddValue:
				fits = false
			}
		}
	}
	// From the last to the first, since a chain grows at its head.
	for i := count - 1; i >= 0 && fits; i-- {
		if i%1024 == 1023 && m.stopped() {
			return false
		}
		_, v := at(i)
		eachAt(v, path, add(i))
	}
	size := int64(len(hashes))*sizeIndexed + int64(len(keys))*sizeIndexedKey
	if !fits || x.budget.Add(-size) < 0 {
		if fits {
			x.budget.Add(size)
		}
		d.never.Store(true)
		return false
	}
	buckets := 1
	for buckets < len(hashes) {
		buckets *= 2
	}
	d.heads = make([]uint32, buckets)
	d.next, d.element = make([]uint32, 0, len(hashes)), make([]uint32, 0, len(hashes))
	for i, h := range hashes {
		b := &d.heads[h&uint32(buckets-1)]
		if *b != 0 && d.element[*b-1] == element[i] {
			continue // the element is there
		}
		d.next, d.element = append(d.next, *b), append(d.element, element[i])
		*b = uint32(len(d.next))
	}
	d.keys, d.members = keys, members
	return true
}

// eachAt calls f for each value that there is at a path from p.
func eachAt(p place, path []pathStep, f func(place)) {
	for i, s := range path {
		if s.key == nil {
			n, at := p.elements()
			for j := range n {
				_, v := at(j)
				eachAt(v, path[i+1:], f)
			}
			return
		}
		if p = p.at(s.by, s.key); !p.defined() {
			return
		}
	}
	f(p)
}

// The kinds of values for an index.
const (
	plainValue     = iota
	oddValue       // a number that may equal one that is written in some other way
	compositeValue // which equals none that is plain
)

// maxPlain is how long the text of a number is at most that has one hash for all
// ways to write it.
const maxPlain = 15

func (x *indexes) hash(p place) (uint32, int) {
	if p.t == nil {
		switch p.v.Kind() {
		case document.String:
			return uint32(maphash.String(x.seed, p.v.Text())), plainValue
		case document.Array, document.Object:
			return 0, compositeValue
		}
		p.t = p.v.Term()
	}
	switch v := p.t.Value.(type) {
	case ast.String:
		return uint32(maphash.String(x.seed, string(v))), plainValue
	case ast.Boolean:
		if v {
			return 1, plainValue
		}
		return 2, plainValue
	case ast.Null:
		return 3, plainValue
	case ast.Number:
		if len(v) > maxPlain {
			return 0, oddValue
		}
		for _, c := range []byte(v) {
			if c != '-' && c != '.' && (c < '0' || c > '9') {
				return 0, oddValue
			}
		}
		f, err := strconv.ParseFloat(string(v), 64)
		if err != nil {
			return 0, oddValue
		}
		return uint32(maphash.Comparable(x.seed, math.Float64bits(f+0))), plainValue // -0 is 0
	}
	return 0, compositeValue
}

// chain returns the first entry of the elements that may have a value, plus one,
// and whether the index tells at all.
func (x *indexes) chain(d *dataIndex, v *ast.Term) (uint32, bool) {
	h, kind := x.hash(placeOf(v))
	if kind != plainValue {
		return 0, false
	}
	return d.heads[h&uint32(len(d.heads)-1)], true
}

// guarded are the guards of a scan, with their indexes.
type guarded struct {
	*indexes
	guards []scanGuard
	ids    []int        // :: guard → number of its path
	own    []*dataIndex // :: guard → its index, where there is only one list to scan
}

// guarded returns what finds the elements that have guards: below root, or of the
// list or object that is known to be looked at. It is nil where nothing can.
func (c *compiler) guarded(guards []scanGuard, root, known *ast.Term) *guarded {
	if len(guards) == 0 {
		return nil
	}
	x := c.indexes
	g := &guarded{indexes: x, guards: guards}
	for _, guard := range guards {
		id := x.id(guard.path)
		g.ids = append(g.ids, id)
		if known != nil {
			d := x.at(known.Value, id)
			if d == nil {
				return nil
			}
			g.own = append(g.own, d)
		}
	}
	x.reserve(root)
	return g
}

// id returns the number of a path. It is called while the Program is compiled.
func (x *indexes) id(path []pathStep) int {
	name := nameOf(path)
	id, ok := x.paths[name]
	if !ok {
		id = len(x.paths)
		x.paths[name] = id
	}
	return id
}

// reserve adds to the budget what indexes over what is in root may take. It is
// called while the Program is compiled.
func (x *indexes) reserve(root *ast.Term) {
	left := maxIndexBytes - x.budget.Load()
	p := placeOf(root)
	if x.roots[p.v] || left <= 0 {
		return
	}
	x.roots[p.v] = true
	values := p.v.Count(int(left / sizeReserved))
	x.budget.Add(min(left, int64(values)*sizeReserved))
}

// find returns the index by which the fewest elements are to be looked at, and
// the first of its entries, plus one. There are none where no element can have all
// guards. The index is nil where all elements are to be looked at.
func (g *guarded) find(m *machine, in ast.Value) (d *dataIndex, first uint32, none bool) {
	for i := range g.guards {
		guard := &g.guards[i]
		var other *dataIndex
		if g.own != nil {
			other = g.own[i]
		} else {
			other = g.at(in, g.ids[i])
		}
		if other == nil || !g.usable(m, other, in, guard.path) {
			continue
		}
		v := guard.value(m)
		if v == nil {
			return nil, 0, true // what is undefined equals nothing
		}
		at, ok := g.chain(other, v)
		if !ok {
			continue
		}
		if d == nil || shorter(other, at, d, first) {
			d, first = other, at
		}
	}
	return d, first, false
}

// shorter reports whether the first of two chains is the shorter one.
func shorter(a *dataIndex, i uint32, b *dataIndex, j uint32) bool {
	for i != 0 && j != 0 {
		i, j = a.next[i-1], b.next[j-1]
	}
	return i == 0 && j != 0
}

// member reports whether a list or object of the data has an element that equals x,
// if an index tells.
func (g *guarded) member(m *machine, x *ast.Term, in ast.Value) (is, ok bool) {
	d := g.at(in, g.ids[0])
	if d == nil || !g.usable(m, d, in, nil) {
		return false, false
	}
	first, ok := g.chain(d, x)
	if !ok {
		return false, false
	}
	for i := first; i != 0; i = d.next[i-1] {
		if d.value(in, d.element[i-1]).equals(x) {
			return true, true
		}
	}
	return false, true
}

// scan calls f for each element of a chain, as a scan does for all.
func (d *dataIndex) scan(m *machine, in ast.Value, first uint32, keys bool, f func(m *machine, holder *document.Holder, k, v place) signal) signal {
	for i := first; i != 0; i = d.next[i-1] {
		var k place
		if keys {
			k = d.key(in, d.element[i-1])
		}
		v := d.value(in, d.element[i-1])
		if sig := f(m, nil, k, v); sig != sigNext {
			return outer(sig)
		}
	}
	return sigNext
}

// value returns an element.
func (d *dataIndex) value(in ast.Value, element uint32) place {
	switch v := in.(type) {
	case *document.Value:
		_, e := v.Nth(int(element))
		return place{v: e}
	case *ast.Array:
		return place{t: v.Elem(int(element))}
	}
	return place{t: d.members[element]}
}

// key returns the key of an element.
func (d *dataIndex) key(in ast.Value, element uint32) place {
	switch v := in.(type) {
	case *document.Value:
		if k, _ := v.Nth(int(element)); k.Defined() {
			return place{v: k}
		}
	case ast.Object:
		return place{t: d.keys[element]}
	}
	return place{t: ast.InternedTerm(int(element))}
}
