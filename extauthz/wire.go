package extauthz

import (
	"strings"
	"unicode/utf8"
)

// The tag of a field of a message in protobuf's encoding: its number and how it is
// encoded (https://protobuf.dev/programming-guides/encoding/).
const (
	varint  = 0
	fixed64 = 1
	chunk   = 2 // a string, bytes, a message or an entry of a map
	fixed32 = 5

	maxField = 1<<29 - 1
)

// fields reads the fields of one message in the order in which they are there.
// What it gives are parts of the text of the message.
//
// It knows what senders make of a message. What else protobuf allows, or refuses,
// makes it odd: then protobuf is to be asked.
type fields struct {
	rest string
	odd  bool

	// The field that was read last.
	tag    uint64 // number<<3 | encoding
	number uint64 // of a varint
	text   string // of a chunk
}

// next reads a field. It reports false at the end, and where the message is odd.
func (f *fields) next() bool {
	if f.rest == "" {
		return false
	}
	tag, ok := f.varint()
	if number := tag >> 3; !ok || number == 0 || number > maxField {
		f.odd = true
		return false
	}
	f.tag, f.number, f.text = tag, 0, ""
	switch tag & 7 {
	case varint:
		f.number, ok = f.varint()
	case chunk:
		var n uint64
		if n, ok = f.varint(); ok && n <= uint64(len(f.rest)) {
			f.text, f.rest = f.rest[:n], f.rest[n:]
		} else {
			ok = false
		}
	case fixed64:
		ok = f.skip(8)
	case fixed32:
		ok = f.skip(4)
	default: // a group, or nothing that there is
		ok = false
	}
	f.odd = !ok
	return ok
}

func (f *fields) varint() (uint64, bool) {
	if len(f.rest) > 0 && f.rest[0] < 0x80 {
		v := uint64(f.rest[0])
		f.rest = f.rest[1:]
		return v, true
	}
	var v uint64
	for i := range min(len(f.rest), 10) {
		b := f.rest[i]
		if i == 9 && b > 1 {
			return 0, false // it has more than 64 bits
		}
		v |= uint64(b&0x7f) << (7 * i)
		if b < 0x80 {
			f.rest = f.rest[i+1:]
			return v, true
		}
	}
	return 0, false
}

func (f *fields) skip(n int) bool {
	if n > len(f.rest) {
		return false
	}
	f.rest = f.rest[n:]
	return true
}

// pair is an entry of a map of strings.
type pair struct{ key, value string }

// pairs are the entries of a map of strings, whose keys differ.
type pairs []pair

// get returns the value of a key, and reports whether there is one.
func (p pairs) get(key string) (string, bool) {
	for i := range p {
		if p[i].key == key {
			return p[i].value, true
		}
	}
	return "", false
}

// distinct reports whether the keys differ.
func (p pairs) distinct() bool {
	if len(p) > manyPairs {
		seen := make(map[string]struct{}, len(p))
		for _, e := range p {
			seen[e.key] = struct{}{}
		}
		return len(seen) == len(p)
	}
	var kinds uint64 // of the keys before: a key of another kind is another key
	for i := range p {
		key := p[i].key
		kind := uint64(1) << (len(key) & 63)
		if key != "" {
			kind = 1 << ((5*uint(len(key)) + uint(key[0]) + 3*uint(key[len(key)-1])) & 63)
		}
		if kinds&kind != 0 {
			if _, ok := p[:i].get(key); ok {
				return false
			}
		}
		kinds |= kind
	}
	return true
}

// manyPairs is from how many entries on they are not compared with each other.
const manyPairs = 32

// value returns the value of a key, "" where there is none.
func (p pairs) value(key string) string {
	value, _ := p.get(key)
	return value
}

// decoder reads the one message of a call.
type decoder struct {
	odd bool
	own bool // strings are copies
}

// done ends the reading of a message.
func (d *decoder) done(f *fields) { d.odd = d.odd || f.odd }

// string takes the field that was read last as a string, which must be UTF-8.
func (d *decoder) string(f *fields) string {
	if !utf8.ValidString(f.text) {
		d.odd = true
	}
	return d.bytes(f)
}

// bytes takes it as bytes.
func (d *decoder) bytes(f *fields) string {
	if d.own {
		return strings.Clone(f.text)
	}
	return f.text
}

// distinct ends the reading of a map: of equal keys the last would count.
func (d *decoder) distinct(p pairs) { d.odd = d.odd || !p.distinct() }

// once notes that a message is there: more than once, its parts would be one.
func (d *decoder) once(there *bool) {
	d.odd = d.odd || *there
	*there = true
}

// pair takes an entry of a map of strings.
func (d *decoder) pair(text string) (p pair) {
	f := fields{rest: text}
	for f.next() {
		switch f.tag {
		case 1<<3 | chunk:
			p.key = d.string(&f)
		case 2<<3 | chunk:
			p.value = d.string(&f)
		}
	}
	d.done(&f)
	return p
}
