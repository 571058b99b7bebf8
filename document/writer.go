package document

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

// place puts an entry into an index.
func place(index []uint32, hash, entry uint32) {
	mask := uint32(len(index) - 1)
	h := hash & mask
	for index[h] != 0 {
		h = (h + 1) & mask
	}
	index[h] = entry
}
