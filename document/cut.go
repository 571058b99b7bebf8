package document

import "encoding/binary"

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
	json   int64    // the length of its JSON
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
	c.json += c.d.jsonOf(c.kind, words)
	if c.size >= maxBlock || c.size >= cutAfter && c.d.mayEnd(c.kind, words[0]) {
		return c.cut()
	}
	return nil
}

// cut ends the piece.
func (c *cutter) cut() error {
	i, err := c.d.node(c.kind, c.words, c.size, c.json)
	if err != nil {
		return err
	}
	l, err := c.d.own(i)
	if err != nil {
		return err
	}
	c.keep(piece{link: l, key: c.words[0]}, len(c.words)/step(c.kind))
	c.words, c.size, c.json = c.words[:0], 0, 0
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
	return newBlock(w.data, w.links, root, d.room, 0), nil
}
