package document

import (
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
	room    *room            // of the blocks that are made
	copied  map[Value]uint32 // :: value of another document → its slot
}

// node is an array, whose words are slots, or an object, whose words are the
// numbers of the texts of its keys in their order, each with the slot of its value.
type node struct {
	first, n uint32 // of the words
	kind     uint32 // slotArray or slotObject
	size     uint32 // that it takes in a block, about; at most maxBlock
	json     int64  // the length of its JSON, without what is in other blocks
	link     uint32 // where it is a block of its own, the slot of the link to it
}

var (
	errDepth = fmt.Errorf("nested deeper than %d", maxDepth)
	errLarge = fmt.Errorf("a text or a document is larger than can be held: %d bytes of text, %d values that differ", maxData, slotMask)
)

func newDraft() *draft {
	return &draft{room: newRoom(), textTable: make([]uint32, 64), table: make([]uint32, 64)}
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
	json := int64(2)
	for i := 0; i < len(words); i += step(kind) {
		size += d.sizeOf(kind, words[i:])
		json += d.jsonOf(kind, words[i:])
	}
	if size > maxBlock && len(words) > step(kind) {
		return d.cut(kind, words)
	}
	i, err := d.node(kind, words, size, json)
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

// jsonOf is how long the first member or element of words is as JSON.
func (d *draft) jsonOf(kind uint32, words []uint32) int64 {
	n, slot := int64(1), words[0]
	if kind == slotObject {
		n, slot = 4+int64(len(d.texts[words[0]])), words[1]
	}
	switch slot &^ slotMask {
	case slotLiteral:
		n += 4
	case slotInt:
		for i := slot & slotMask >> 1; i > 9; i /= 10 {
			n++
		}
		n++
	case slotString, slotNumber:
		n += 2 + int64(len(d.texts[slot&slotMask]))
	case slotArray, slotObject:
		n += d.nodes[slot&slotMask].json
	}
	return n
}

// node returns the number of the node with these words.
func (d *draft) node(kind uint32, words []uint32, size int, json int64) (uint32, error) {
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
	d.nodes = append(d.nodes, node{first: uint32(len(d.words)), n: uint32(len(words)), kind: kind, size: uint32(min(size, maxBlock)), json: json})
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

// block returns the block of a value, which it is all of.
func (d *draft) block(slot uint32) (*block, error) {
	w := d.writer()
	defer d.unused(w)
	root, err := w.slot(slot)
	if err != nil {
		return nil, err
	}
	var json int64
	if slot&^slotMask == slotArray || slot&^slotMask == slotObject {
		json = d.nodes[slot&slotMask].json
	}
	return newBlock(w.data, w.links, root, d.room, max(0, perJSON*json-int64(len(w.data)))), nil
}

var errValue = errors.New("not a value of JSON")
