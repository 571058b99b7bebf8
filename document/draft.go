package document

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"math/bits"
)

// draft is a document while it is made. Values are made from the leaves up; what
// is equal to something that is there already is that. In a draft the place of
// a text or of an array or object is its number.
type draft struct {
	texts     []string
	hashes    []uint32 // of the texts
	textTable []uint32 // by hash :: a text's number and 1, open addressing

	nodes []node
	words []uint32 // of the nodes
	table []uint32 // by hash :: a node's number and 1, open addressing

	links   []link
	stack   []uint32 // what is read so far of all that is still open
	keys    []string // of the objects that are still open
	depth   int
	writers []*writer        // unused
	copied  map[Value]uint32 // :: value of another document → its slot
}

// node is an array, whose words are slots, or an object, whose words are the
// numbers of the texts of its keys in their order, each with the slot of its value.
type node struct {
	first, n uint32 // of the words
	kind     uint32 // slotArray or slotObject
	size     uint32 // that it takes in a block, about; at most maxBlock
	link     uint32 // where it is a block of its own, the slot of the link to it
}

var (
	errDepth = fmt.Errorf("nested deeper than %d", maxDepth)
	errLarge = fmt.Errorf("a text or a document is larger than can be held: %d bytes of text, %d values that differ", maxData, slotMask)
)

func newDraft() *draft {
	return &draft{textTable: make([]uint32, 64), table: make([]uint32, 64)}
}

// value returns the value of a slot, in a block that is whole.
func (d *draft) value(slot uint32) (Value, error) {
	if slot&^slotMask == slotLink {
		l := d.links[slot&slotMask]
		return Value{l.to, l.slot}, nil
	}
	b, err := d.block(slot)
	if err != nil {
		return Value{}, err
	}
	return Value{b, b.root}, nil
}

// text returns the number of a text.
func (d *draft) text(s string) (uint32, error) {
	if 2*len(d.texts) >= len(d.textTable) {
		d.textTable = make([]uint32, 4*len(d.textTable))
		mask := uint32(len(d.textTable) - 1)
		for i, h := range d.hashes {
			for h &= mask; d.textTable[h] != 0; h = (h + 1) & mask {
			}
			d.textTable[h] = uint32(i) + 1
		}
	}
	hash, mask := hashOf(s), uint32(len(d.textTable)-1)
	at := hash & mask
	for ; d.textTable[at] != 0; at = (at + 1) & mask {
		if i := d.textTable[at] - 1; d.hashes[i] == hash && d.texts[i] == s {
			return i, nil
		}
	}
	i := uint32(len(d.texts))
	if i > slotMask || len(s) > maxData {
		return 0, errLarge
	}
	d.texts = append(d.texts, s)
	d.hashes = append(d.hashes, hash)
	d.textTable[at] = i + 1
	return i, nil
}

func (d *draft) string(s string) (uint32, error) {
	i, err := d.text(s)
	return slotString | i, err
}

// number returns the slot of a number, whose text must be one.
func (d *draft) number(s string) (uint32, error) {
	if slot, ok := intOf(s); ok {
		return slot, nil
	}
	i, err := d.text(s)
	return slotNumber | i, err
}

// intOf returns the slot of an integer that fits into it, written as strconv.Itoa
// does.
func intOf(s string) (uint32, bool) {
	digits := s
	var sign uint32
	if len(s) > 1 && s[0] == '-' {
		digits, sign = s[1:], 1
	}
	if len(digits) > 8 || digits[0] == '0' && len(s) > 1 {
		return 0, false
	}
	var n uint32
	for i := range len(digits) {
		if digits[i] < '0' || digits[i] > '9' {
			return 0, false
		}
		n = 10*n + uint32(digits[i]-'0')
	}
	return slotInt | n<<1 | sign, true
}

// enter begins an array or object.
func (d *draft) enter() (start int, err error) {
	if d.depth++; d.depth > maxDepth {
		return 0, errDepth
	}
	return len(d.stack), nil
}

// push adds a word to what is open.
func (d *draft) push(w uint32) { d.stack = append(d.stack, w) }

// leave ends the array or object that began at start and has the words since.
func (d *draft) leave(kind uint32, start int) (uint32, error) {
	words := d.stack[start:]
	d.depth--
	slot, err := d.composite(kind, words)
	d.stack = d.stack[:start]
	return slot, err
}

func (d *draft) composite(kind uint32, words []uint32) (uint32, error) {
	if len(words) == 0 {
		if kind == slotArray {
			return literalArray, nil
		}
		return literalObject, nil
	}
	size := 8
	for i := 0; i < len(words); i += step(kind) {
		size += d.sizeOf(kind, words[i:])
	}
	if size > maxBlock && len(words) > step(kind) {
		return d.cut(kind, words)
	}
	i, err := d.node(kind, words, size)
	if err != nil {
		return 0, err
	}
	if size < minBlock {
		return kind | i, nil
	}
	return d.own(i)
}

// step is how many words a member or element has.
func step(kind uint32) int {
	if kind == slotObject {
		return 2
	}
	return 1
}

// sizeOf is what the first member or element of words takes.
func (d *draft) sizeOf(kind uint32, words []uint32) int {
	size, slot := 4, words[0]
	if kind == slotObject {
		size, slot = 10+len(d.texts[words[0]]), words[1]
	}
	switch slot &^ slotMask {
	case slotString, slotNumber:
		size += 1 + len(d.texts[slot&slotMask])
	case slotArray, slotObject:
		size += int(d.nodes[slot&slotMask].size)
	}
	return size
}

// node returns the number of the node with these words.
func (d *draft) node(kind uint32, words []uint32, size int) (uint32, error) {
	if 2*len(d.nodes) >= len(d.table) {
		d.table = make([]uint32, 4*len(d.table))
		for i, n := range d.nodes {
			*d.entry(n.kind, d.words[n.first:n.first+n.n]) = uint32(i) + 1
		}
	}
	e := d.entry(kind, words)
	if *e > 0 {
		return *e - 1, nil
	}
	if uint64(len(d.words))+uint64(len(words)) > 1<<32-1 || len(d.nodes) > slotMask {
		return 0, errLarge
	}
	d.nodes = append(d.nodes, node{first: uint32(len(d.words)), n: uint32(len(words)), kind: kind, size: uint32(min(size, maxBlock))})
	d.words = append(d.words, words...)
	*e = uint32(len(d.nodes))
	return *e - 1, nil
}

// hashSeeds make the hash of words one that nobody can foresee.
var hashSeeds = [2]uint64{maphash.Bytes(maphash.MakeSeed(), nil) | 1, maphash.Bytes(maphash.MakeSeed(), nil)}

// entry returns the place of a node in the table: its own, or one that is empty.
func (d *draft) entry(kind uint32, words []uint32) *uint32 {
	h := hashSeeds[1] ^ uint64(kind)
	for _, w := range words {
		high, low := bits.Mul64(h^uint64(w), hashSeeds[0])
		h = high ^ low
	}
	high, low := bits.Mul64(h^uint64(len(words)), hashSeeds[0])
	mask := uint64(len(d.table) - 1)
	for i := (high ^ low) & mask; ; i = (i + 1) & mask {
		e := &d.table[i]
		if *e == 0 {
			return e
		}
		if n := &d.nodes[*e-1]; n.kind == kind && equalWords(d.words[n.first:n.first+n.n], words) {
			return e
		}
	}
}

func equalWords(a, b []uint32) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

// own makes a node a block of its own, and returns the slot of the link to it.
func (d *draft) own(i uint32) (uint32, error) {
	if l := d.nodes[i].link; l != 0 {
		return l, nil
	}
	b, err := d.block(d.nodes[i].kind | i)
	if err != nil {
		return 0, err
	}
	l, err := d.link(Value{b, b.root})
	d.nodes[i].link = l
	return l, err
}

// link returns the slot of a value of another block.
func (d *draft) link(v Value) (uint32, error) {
	if len(d.links) > slotMask {
		return 0, errLarge
	}
	d.links = append(d.links, link{v.b, v.slot})
	return slotLink | uint32(len(d.links)-1), nil
}

// cut makes an array or object of pieces, and returns the slot of the link to it.
func (d *draft) cut(kind uint32, words []uint32) (uint32, error) {
	c := cutter{d: d, kind: kind}
	for i := 0; i < len(words); i += step(kind) {
		if err := c.add(words[i : i+step(kind)]...); err != nil {
			return 0, err
		}
	}
	return c.end()
}

// cutter cuts an array or object of the members or elements that it is given.
type cutter struct {
	d      *draft
	kind   uint32
	words  []uint32 // of the piece that is not ended
	size   int      // that it takes
	n      int      // members or elements in the pieces
	pieces []piece
}

type piece struct {
	link  uint32 // its slot
	first int    // the number of its first member or element
	key   uint32 // the text of the first key
}

func (c *cutter) add(words ...uint32) error {
	c.words = append(c.words, words...)
	c.size += c.d.sizeOf(c.kind, words)
	if c.size >= maxBlock || c.size >= cutAfter && c.d.mayEnd(c.kind, words[0]) {
		return c.cut()
	}
	return nil
}

// cut ends the piece.
func (c *cutter) cut() error {
	i, err := c.d.node(c.kind, c.words, c.size)
	if err != nil {
		return err
	}
	l, err := c.d.own(i)
	if err != nil {
		return err
	}
	c.keep(piece{link: l, key: c.words[0]}, len(c.words)/step(c.kind))
	c.words, c.size = c.words[:0], 0
	return nil
}

// keep takes a piece with n members or elements.
func (c *cutter) keep(p piece, n int) {
	p.first = c.n
	c.n += n
	c.pieces = append(c.pieces, p)
}

// end returns the slot of the whole.
func (c *cutter) end() (uint32, error) {
	if len(c.words) > 0 {
		if err := c.cut(); err != nil {
			return 0, err
		}
	}
	switch len(c.pieces) {
	case 0:
		return c.d.composite(c.kind, nil)
	case 1:
		return c.pieces[0].link, nil
	}
	b, err := c.d.directory(c.kind, c.n, c.pieces)
	if err != nil {
		return 0, err
	}
	return c.d.link(Value{b, b.root})
}

// mayEnd reports whether a piece may end with a member or element. What depends on
// it alone is so in another document, too.
func (d *draft) mayEnd(kind, word uint32) bool {
	if kind == slotObject {
		return d.hashes[word]&cutMask == 0
	}
	switch word &^ slotMask {
	case slotString, slotNumber:
		return d.hashes[word&slotMask]&cutMask == 0
	case slotLiteral, slotInt:
		return word*0x9e3779b1>>16&cutMask == 0
	}
	return false
}

// directory returns the block of an array or object that is cut.
func (d *draft) directory(kind uint32, n int, pieces []piece) (*block, error) {
	w := d.writer()
	defer d.unused(w)
	head := len(pieces) << 1
	if kind == slotObject {
		head |= 1
		for _, p := range pieces {
			at, err := w.text(p.key)
			if err != nil {
				return nil, err
			}
			w.stack = append(w.stack, at)
		}
	}
	root := slotBig | uint32(len(w.data))
	w.data = appendNumber(w.data, n)
	w.data = appendNumber(w.data, head)
	for _, p := range pieces {
		w.data = appendWord(w.data, w.link(p.link)&slotMask)
		w.data = appendWord(w.data, uint32(p.first))
	}
	if kind == slotObject {
		// What the first and the last begin with, all do.
		first, last := d.texts[pieces[0].key], d.texts[pieces[len(pieces)-1].key]
		common := 0
		for common < len(first) && common < len(last) && first[common] == last[common] {
			common++
		}
		w.data = appendNumber(w.data, common)
		for i, p := range pieces {
			w.data = binary.LittleEndian.AppendUint64(w.data, fenceOf(d.texts[p.key][common:]))
			w.data = appendWord(w.data, w.stack[i])
		}
	}
	if len(w.data) > maxData {
		return nil, errLarge
	}
	return newBlock(w.data, w.links, root), nil
}

// place puts an entry into an index.
func place(index []uint32, hash, entry uint32) {
	mask := uint32(len(index) - 1)
	h := hash & mask
	for index[h] != 0 {
		h = (h + 1) & mask
	}
	index[h] = entry
}

// block returns the block of a value, which it is all of.
func (d *draft) block(slot uint32) (*block, error) {
	w := d.writer()
	defer d.unused(w)
	root, err := w.slot(slot)
	if err != nil {
		return nil, err
	}
	return newBlock(w.data, w.links, root), nil
}

// writer writes the data of one block.
type writer struct {
	d     *draft
	data  []byte
	links []link

	at     map[uint32]uint32 // :: slot of the draft → its slot here
	keysAt map[string]uint32 // :: the words of keys → their place
	name   []byte            // the words of keys
	stack  []uint32
}

func (d *draft) writer() *writer {
	if n := len(d.writers); n > 0 {
		w := d.writers[n-1]
		d.writers = d.writers[:n-1]
		return w
	}
	return &writer{d: d, at: map[uint32]uint32{}, keysAt: map[string]uint32{}}
}

func (d *draft) unused(w *writer) {
	w.data, w.links, w.stack = w.data[:0], w.links[:0], w.stack[:0]
	clear(w.at)
	clear(w.keysAt)
	d.writers = append(d.writers, w)
}

// slot writes a value, where it is not there, and returns its slot.
func (w *writer) slot(s uint32) (uint32, error) {
	switch s &^ slotMask {
	case slotLiteral, slotInt:
		return s, nil
	}
	if at, ok := w.at[s]; ok {
		return at, nil
	}
	var at uint32
	var err error
	switch s &^ slotMask {
	case slotString, slotNumber:
		var text uint32
		text, err = w.text(s & slotMask)
		at = s&^slotMask | text
	case slotLink:
		at = w.link(s)
	default:
		at, err = w.composite(w.d.nodes[s&slotMask])
	}
	w.at[s] = at
	return at, err
}

// link returns the slot here of a link of the draft.
func (w *writer) link(s uint32) uint32 {
	if at, ok := w.at[s]; ok {
		return at
	}
	w.links = append(w.links, w.d.links[s&slotMask])
	at := slotLink | uint32(len(w.links)-1)
	w.at[s] = at
	return at
}

// text writes a text and returns its place. A string and a number may share it.
func (w *writer) text(i uint32) (uint32, error) {
	const known = slotBig // no slot of a draft is of that kind
	if at, ok := w.at[known|i]; ok {
		return at, nil
	}
	s, at := w.d.texts[i], uint32(len(w.data))
	if len(w.data)+len(s) > maxData {
		return 0, errLarge
	}
	w.data = append(appendNumber(w.data, len(s)), s...)
	w.at[known|i] = at
	return at, nil
}

func (w *writer) composite(n node) (uint32, error) {
	words := w.d.words[n.first : n.first+n.n]
	start, per := len(w.stack), step(n.kind)
	for i := per - 1; i < len(words); i += per {
		s, err := w.slot(words[i])
		if err != nil {
			return 0, err
		}
		w.stack = append(w.stack, s)
	}
	var keys uint32
	if n.kind == slotObject {
		var err error
		if keys, err = w.keys(words); err != nil {
			return 0, err
		}
	}
	at := uint32(len(w.data))
	if n.kind == slotObject {
		w.data = appendWord(w.data, keys)
	} else {
		w.data = appendNumber(w.data, len(words))
	}
	for _, s := range w.stack[start:] {
		w.data = appendWord(w.data, s)
	}
	w.stack = w.stack[:start]
	if len(w.data) > maxData {
		return 0, errLarge
	}
	return n.kind | at, nil
}

// keys writes the keys of an object and returns their place.
func (w *writer) keys(words []uint32) (uint32, error) {
	w.name = w.name[:0]
	for i := 0; i < len(words); i += 2 {
		w.name = appendWord(w.name, words[i])
	}
	if at, ok := w.keysAt[string(w.name)]; ok {
		return at, nil
	}
	n := len(words) / 2
	start := len(w.stack)
	for i := range n {
		at, err := w.text(words[2*i])
		if err != nil {
			return 0, err
		}
		w.stack = append(w.stack, at)
	}
	at, head := uint32(len(w.data)), n<<1
	if n >= indexed {
		head |= 1
	}
	w.data = appendNumber(w.data, head)
	for _, place := range w.stack[start:] {
		w.data = appendWord(w.data, place)
	}
	w.stack = w.stack[:start]
	if n >= indexed {
		size := entriesFor(n)
		index := make([]uint32, 1<<size)
		for i := range n {
			place(index, w.d.hashes[words[2*i]], uint32(i)+1)
		}
		w.data = append(w.data, byte(size))
		for _, e := range index {
			if n < 1<<16-1 {
				w.data = append(w.data, byte(e), byte(e>>8))
			} else {
				w.data = appendWord(w.data, e)
			}
		}
	}
	w.keysAt[string(w.name)] = at
	return at, nil
}

var errValue = errors.New("not a value of JSON")
