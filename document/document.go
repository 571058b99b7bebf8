package document

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"github.com/open-policy-agent/opa/v1/ast"
)

// Document is an immutable document. Any number of goroutines may read it.
type Document struct {
	root   Value
	blocks []*block // all of them, each once
	size   int64    // of the blocks
}

func newDocument(root Value) *Document {
	doc := &Document{root: root}
	seen := map[*block]bool{}
	var add func(b *block)
	add = func(b *block) {
		if seen[b] {
			return
		}
		seen[b] = true
		doc.blocks = append(doc.blocks, b)
		doc.size += b.size()
		for _, l := range b.links {
			add(l.to)
		}
	}
	add(root.b)
	doc.blocks = slices.Clip(doc.blocks)
	return doc
}

// Root returns the value that the document is.
func (d *Document) Root() Value { return d.root }

// Size estimates what the document takes in memory, in bytes, with what it remembers
// so far. What it shares with other documents counts as its own.
func (d *Document) Size() int64 {
	size := d.size
	for _, b := range d.blocks {
		size += b.terms.bytes.Load()
	}
	return size
}

// Of returns the document of a value as encoding/json decodes it where numbers are
// json.Number: the same that ast.InterfaceToValue gives. In it there may be an Edit,
// and a Value of another document, which is shared where it is large.
func Of(v any) (*Document, error) {
	d := newDraft()
	slot, err := d.any(v)
	if err != nil {
		return nil, fmt.Errorf("making a document: %w", err)
	}
	root, err := d.value(slot)
	if err != nil {
		return nil, fmt.Errorf("making a document: %w", err)
	}
	return newDocument(root), nil
}

// Edit stands for an object that differs in some members from another.
type Edit struct {
	Base    Value          // an object
	Members map[string]any // :: key → what Of takes, or Removed
}

// Removed stands for a member that is not there any more.
var Removed = removed{}

type removed struct{}

func (d *draft) any(v any) (uint32, error) {
	switch v := v.(type) {
	case nil:
		return literalNull, nil
	case bool:
		if v {
			return literalTrue, nil
		}
		return literalFalse, nil
	case string:
		return d.string(v)
	case json.Number:
		if _, err := ast.NumberChecked(string(v)); err != nil {
			return 0, err
		}
		return d.number(string(v))
	case map[string]any:
		return d.object(v)
	case []any:
		start, err := d.enter()
		if err != nil {
			return 0, err
		}
		for _, e := range v {
			slot, err := d.any(e)
			if err != nil {
				return 0, err
			}
			d.push(slot)
		}
		return d.leave(slotArray, start)
	case Value:
		return d.copy(v)
	case *Value:
		return d.copy(*v)
	case Edit:
		return d.edit(v)
	case ast.Value:
		return d.ast(v)
	}
	value, err := ast.InterfaceToValue(v)
	if err != nil {
		return 0, err
	}
	return d.ast(value)
}

func (d *draft) object(members map[string]any) (uint32, error) {
	start, err := d.enter()
	if err != nil {
		return 0, err
	}
	first := len(d.keys)
	for k := range members {
		d.keys = append(d.keys, k)
	}
	keys := d.keys[first:]
	slices.Sort(keys)
	for _, k := range keys {
		if err := d.member(k, members[k]); err != nil {
			return 0, err
		}
	}
	d.keys = d.keys[:first]
	return d.leave(slotObject, start)
}

func (d *draft) member(key string, v any) error {
	text, err := d.text(key)
	if err != nil {
		return err
	}
	slot, err := d.any(v)
	if err != nil {
		return err
	}
	d.stack = append(d.stack, text, slot)
	return nil
}

// ast takes what ast.InterfaceToValue has made of something else.
func (d *draft) ast(v ast.Value) (uint32, error) {
	switch v := v.(type) {
	case ast.Null:
		return literalNull, nil
	case ast.Boolean:
		return d.any(bool(v))
	case ast.Number:
		return d.any(json.Number(v))
	case ast.String:
		return d.string(string(v))
	case *ast.Array:
		start, err := d.enter()
		if err != nil {
			return 0, err
		}
		for i := range v.Len() {
			slot, err := d.ast(v.Elem(i).Value)
			if err != nil {
				return 0, err
			}
			d.push(slot)
		}
		return d.leave(slotArray, start)
	case ast.Object:
		members := make(map[string]any, v.Len())
		for _, k := range v.Keys() {
			key, ok := k.Value.(ast.String)
			if !ok {
				return 0, errValue
			}
			members[string(key)] = v.Get(k).Value
		}
		return d.object(members)
	}
	return 0, errValue
}

// copy takes a value of another document. What is a block is shared, unless it is
// too small to be one.
func (d *draft) copy(v Value) (uint32, error) {
	if v.b == nil {
		return 0, errValue
	}
	switch v.slot &^ slotMask {
	case slotLiteral, slotInt:
		return v.slot, nil
	case slotString:
		return d.string(v.Text())
	case slotNumber:
		return d.number(v.Text())
	case slotBig:
		return d.link(v)
	}
	if v.slot == v.b.root && len(v.b.data) >= minBlock/4 {
		return d.link(v)
	}
	if slot, ok := d.copied[v]; ok {
		return slot, nil
	}
	start, err := d.enter()
	if err != nil {
		return 0, err
	}
	for key, e := range v.All() {
		if key.Defined() {
			text, err := d.text(key.Text())
			if err != nil {
				return 0, err
			}
			d.push(text)
		}
		slot, err := d.copy(e)
		if err != nil {
			return 0, err
		}
		d.push(slot)
	}
	slot, err := d.leave(v.slot&^slotMask, start)
	if d.copied == nil {
		d.copied = map[Value]uint32{}
	}
	d.copied[v] = slot
	return slot, err
}

// edit takes an object that differs from another. Of one that is cut the pieces in
// which nothing differs are taken as they are.
func (d *draft) edit(e Edit) (uint32, error) {
	if e.Base.Kind() != Object {
		return 0, errValue
	}
	keys := slices.Sorted(maps.Keys(e.Members))
	start, err := d.enter()
	if err != nil {
		return 0, err
	}
	if e.Base.slot&^slotMask != slotBig {
		// With the keys that it has anyway.
		if err := d.mixed(e, e.Base, keys); err != nil {
			return 0, err
		}
		return d.leave(slotObject, start)
	}
	g := e.Base.b.big(e.Base.slot & slotMask)
	c := cutter{d: d, kind: slotObject}
	for p := range g.pieces {
		here := keys
		if p+1 < g.pieces {
			next, _ := slices.BinarySearch(keys, g.key(p+1))
			here = keys[:next]
		}
		keys = keys[len(here):]
		if len(here) == 0 && len(c.words) == 0 {
			piece, err := d.piece(g, p)
			if err != nil {
				return 0, err
			}
			c.keep(piece, g.piece(p).Len())
			continue
		}
		if err := d.mixed(e, g.piece(p), here); err != nil {
			return 0, err
		}
		for words := d.stack[start:]; len(words) > 0; words = words[2:] {
			if err := c.add(words[:2]...); err != nil {
				return 0, err
			}
		}
		d.stack = d.stack[:start]
	}
	d.depth--
	return c.end()
}

// piece returns a piece of an object of another document.
func (d *draft) piece(g big, p int) (piece, error) {
	key, err := d.text(g.key(p))
	if err != nil {
		return piece{}, err
	}
	l, err := d.link(g.piece(p))
	return piece{link: l, key: key}, err
}

// mixed pushes the members of an object, or piece of one, but for those that are
// other now.
func (d *draft) mixed(e Edit, base Value, keys []string) error {
	put := func(key string) error {
		if e.Members[key] == Removed {
			return nil
		}
		return d.member(key, e.Members[key])
	}
	for key, v := range base.All() {
		text := key.Text()
		for len(keys) > 0 && keys[0] < text {
			if err := put(keys[0]); err != nil {
				return err
			}
			keys = keys[1:]
		}
		if len(keys) > 0 && keys[0] == text {
			continue
		}
		if err := d.member(text, v); err != nil {
			return err
		}
	}
	for _, key := range keys {
		if err := put(key); err != nil {
			return err
		}
	}
	return nil
}

// Join returns the object that has what each of the objects has. Below a key that
// several have they are joined too, if they are objects; else it is that of the last one. It holds on to them.
func Join(objects ...Value) (Value, error) {
	d := newDraft()
	slot, err := d.join(objects)
	if err != nil {
		return Value{}, fmt.Errorf("joining documents: %w", err)
	}
	return d.value(slot)
}

func (d *draft) join(list []Value) (uint32, error) {
	last := list[len(list)-1]
	if n := len(list); n == 1 || last.Kind() != Object || list[n-2].Kind() != Object {
		if last.composite() {
			return d.link(last)
		}
		return d.copy(last)
	}
	byKey := map[string][]Value{}
	for _, v := range list {
		if v.Kind() != Object {
			clear(byKey) // what was before is not there
		}
		for key, e := range v.All() {
			if text := key.Text(); v.Kind() == Object {
				byKey[text] = append(byKey[text], e)
			}
		}
	}
	start, err := d.enter()
	if err != nil {
		return 0, err
	}
	for _, key := range slices.Sorted(maps.Keys(byKey)) {
		text, err := d.text(key)
		if err != nil {
			return 0, err
		}
		slot, err := d.join(byKey[key])
		if err != nil {
			return 0, err
		}
		d.stack = append(d.stack, text, slot)
	}
	return d.leave(slotObject, start)
}
