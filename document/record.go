package document

import (
	"encoding/binary"
	"sort"
)

// The records in the data of a block. A place is an offset into it, a slot four
// bytes, a number a varint of encoding/binary unless it says otherwise.
//
//	text    its length, its bytes
//	array   how many elements, their slots
//	keys    twice how many, and 1 if there is an index; the places of the texts, four
//	        bytes each, in their order; the index
//	object  the place of its keys, in four bytes; the slots of their values
//	big     how many members or elements; twice how many pieces, and 1 if it is an
//	        object; for each piece a link and the number of its first member or element,
//	        four bytes each; of an object then how long a text all the first keys of pieces
//	        begin with, and for each piece eight bytes of its first key from there on,
//	        the lowest first, and the place of this key
//
// An index has a number of entries, a power of two: it begins with its logarithm in
// one byte. An entry is 0, or one more than the number of a key, in two bytes
// where that fits, else in four. A key is at the place that its hash says, or at the
// next ones.
const (
	// indexed is from how many keys on an object has an index.
	indexed = 9

	maxData  = 1<<slotShift - 1<<16 // bytes of a block
	maxDepth = 10000                // of arrays and objects in each other
	minBlock = 8 << 10              // bytes
	maxBlock = 64 << 10             // bytes, about
	cutAfter = 24 << 10             // bytes of a piece, from which on it may end
	cutMask  = 1<<4 - 1             // of the hash of the member that it may end with
)

// word returns the four bytes at a place.
func (b *block) word(at uint32) uint32 {
	s := b.data[at : at+4]
	return uint32(s[0]) | uint32(s[1])<<8 | uint32(s[2])<<16 | uint32(s[3])<<24
}

// number returns the varint at a place, and the place behind it.
func (b *block) number(at uint32) (int, uint32) {
	c := b.data[at]
	if c < 0x80 {
		return int(c), at + 1
	}
	n, shift := int(c&0x7f), 7
	for {
		at++
		c = b.data[at]
		n |= int(c&0x7f) << shift
		if c < 0x80 {
			return n, at + 1
		}
		shift += 7
	}
}

// text returns the text at a place, which is part of the block.
func (b *block) text(at uint32) string {
	n, at := b.number(at)
	return b.data[at : at+uint32(n)]
}

// value returns the value of a slot of the block.
func (b *block) value(slot uint32) Value {
	if slot&^slotMask == slotLink {
		l := b.links[slot&slotMask]
		return Value{l.to, l.slot}
	}
	return Value{b, slot}
}

// keys are those of an object that is not cut.
type keys struct {
	b     *block
	n     int
	texts uint32 // the place of the places of the texts
	index bool
}

func (b *block) keys(at uint32) keys {
	n, at := b.number(at)
	return keys{b, n >> 1, at, n&1 == 1}
}

func (k keys) key(i int) string { return k.b.text(k.b.word(k.texts + 4*uint32(i))) }

// find returns the number of a key, or -1.
func (k keys) find(key string) int {
	if !k.index {
		for i := range k.n {
			if k.key(i) == key {
				return i
			}
		}
		return -1
	}
	at := k.texts + 4*uint32(k.n)
	mask, at := uint32(1)<<k.b.data[at]-1, at+1
	for h := hashOf(key) & mask; ; h = (h + 1) & mask {
		var i int
		if k.n < 1<<16-1 {
			i = int(k.b.data[at+2*h]) | int(k.b.data[at+2*h+1])<<8
		} else {
			i = int(k.b.word(at + 4*h))
		}
		if i == 0 {
			return -1
		}
		if k.key(i-1) == key {
			return i - 1
		}
	}
}

// big is an object or array that is cut.
type big struct {
	b      *block
	n      int
	pieces int
	object bool
	at     uint32 // the place of the pieces
}

func (b *block) big(at uint32) big {
	n, at := b.number(at)
	p, at := b.number(at)
	return big{b, n, p >> 1, p&1 == 1, at}
}

func (g big) piece(p int) Value { return g.b.value(slotLink | g.b.word(g.at+8*uint32(p))) }

func (g big) first(p int) int { return int(g.b.word(g.at + 8*uint32(p) + 4)) }

// fences returns how long a text all first keys begin with, and the place of what
// follows.
func (g big) fences() (common int, at uint32) { return g.b.number(g.at + 8*uint32(g.pieces)) }

// key returns the first key of a piece.
func (g big) key(p int) string {
	_, at := g.fences()
	return g.b.text(g.b.word(at + 12*uint32(p) + 8))
}

// holding returns the piece that has the i-th member or element.
func (g big) holding(i int) int {
	return sort.Search(g.pieces-1, func(p int) bool { return g.first(p+1) > i })
}

// near returns the piece that has a key if any has.
func (g big) near(key string) int {
	common, at := g.fences()
	if from := g.key(0)[:common]; len(key) < common || key[:common] != from {
		if key < from {
			return 0
		}
		return g.pieces - 1
	}
	fence := fenceOf(key[common:])
	low, high := 0, g.pieces
	for high-low > 1 {
		mid := int(uint(low+high) / 2)
		at := at + 12*uint32(mid)
		if uint64(g.b.word(at))|uint64(g.b.word(at+4))<<32 <= fence {
			low = mid
		} else {
			high = mid
		}
	}
	if fence != g.fence(low) {
		return low
	}
	// There are keys that differ further behind.
	return sort.Search(low, func(p int) bool { return g.key(p+1) > key })
}

func (g big) fence(p int) uint64 {
	_, at := g.fences()
	at += 12 * uint32(p)
	return uint64(g.b.word(at)) | uint64(g.b.word(at+4))<<32
}

// fenceOf returns the first eight bytes of a text as a number, which compares as
// they do.
func fenceOf(s string) uint64 {
	var first [8]byte
	copy(first[:], s)
	return binary.BigEndian.Uint64(first[:])
}

// appendWord appends four bytes.
func appendWord(data []byte, w uint32) []byte { return binary.LittleEndian.AppendUint32(data, w) }

func appendNumber(data []byte, n int) []byte { return binary.AppendUvarint(data, uint64(n)) }

// entriesFor returns the logarithm of how many entries an index of n keys has: a
// third of them or more are empty.
func entriesFor(n int) int {
	bits := 4
	for 1<<bits < n+n/2 {
		bits++
	}
	return bits
}
