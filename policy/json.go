package policy

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
)

// ErrDuplicateKey: an object of a JSON text has one key twice. Parsers differ in
// which value they take, so whoever asks and whoever answers may see different
// documents.
var ErrDuplicateKey = errors.New("duplicate object key")

// maxJSONDepth is how deep arrays and objects of a JSON text may nest, as in
// encoding/json.
const maxJSONDepth = 10000

// ParseJSON parses exactly one JSON text. The values are those that
// encoding/json with UseNumber and ast.InterfaceToValue give: the text of a
// number is kept, bytes that are not UTF-8 and lone surrogates become U+FFFD.
// The texts are those that encoding/json accepts, without those in which an
// object has one key twice: they are ErrDuplicateKey.
//
// The value may share memory with a text that is a string. An error names a
// place in the text and quotes nothing of it.
//
// A large text takes long. Where cancel is not nil and set while it is parsed,
// ParseJSON returns ErrCanceled soon after.
func ParseJSON[T string | []byte](text T, cancel *Cancel) (ast.Value, error) {
	p := jsonParser{text: string(text), cancel: cancel}
	term, err := p.only()
	if err != nil {
		return nil, err
	}
	return term.Value, nil
}

// CheckJSON returns the error that ParseJSON has for a text, and makes no value.
func CheckJSON(text string, cancel *Cancel) error {
	p := jsonParser{text: text, cancel: cancel, checks: true}
	_, err := p.only()
	return err
}

// only reads a text in which there is one value.
func (p *jsonParser) only() (*ast.Term, error) {
	p.space()
	term, err := p.value()
	if err != nil {
		return nil, err
	}
	p.space()
	if p.pos < len(p.text) {
		return nil, p.errorf("unexpected text after the value")
	}
	return term, nil
}

// jsonParser reads a text from left to right. Strings of the result are parts
// of the text where they need no change.
type jsonParser struct {
	text   string
	pos    int
	depth  int
	cancel *Cancel
	buf    []byte // a string with escapes

	checks bool     // only that it is right: the values are nothing
	keys   []string // where it checks, those of the objects that are open

	// The members and elements read so far of all objects and arrays that are
	// still open, the innermost last.
	members  [][2]*ast.Term
	elements []*ast.Term

	terms []ast.Term          // unused terms
	slab  int                 // terms made last
	seen  map[string]struct{} // keys of a large object
}

// smallObject is how many members an object may have for its keys to be compared
// one by one.
const smallObject = 12

func (p *jsonParser) value() (*ast.Term, error) {
	if p.pos >= len(p.text) {
		return nil, p.errorf("unexpected end")
	}
	if p.cancel != nil && p.cancel.Cancelled() {
		return nil, ErrCanceled
	}
	switch c := p.text[p.pos]; c {
	case '{':
		return p.object()
	case '[':
		return p.array()
	case '"':
		s, err := p.string(!p.checks)
		if err != nil || p.checks {
			return ast.InternedNullTerm, err
		}
		return p.stringTerm(s), nil
	case 't':
		return ast.InternedTerm(true), p.literal("true")
	case 'f':
		return ast.InternedTerm(false), p.literal("false")
	case 'n':
		return ast.InternedNullTerm, p.literal("null")
	default:
		if c == '-' || isDigit(c) {
			return p.number()
		}
		return nil, p.errorf("unexpected character")
	}
}

func (p *jsonParser) object() (*ast.Term, error) {
	if err := p.enter(); err != nil {
		return nil, err
	}
	if p.next('}') {
		p.depth--
		return ast.InternedEmptyObject, nil
	}
	start, first := len(p.members), len(p.keys)
	for {
		if p.pos >= len(p.text) || p.text[p.pos] != '"' {
			return nil, p.errorf("expected an object key")
		}
		key, err := p.string(true)
		if err != nil {
			return nil, err
		}
		p.space()
		if !p.next(':') {
			return nil, p.errorf("expected a colon")
		}
		value, err := p.value()
		if err != nil {
			return nil, err
		}
		if p.checks {
			p.keys = append(p.keys, key)
		} else {
			p.members = append(p.members, [2]*ast.Term{p.stringTerm(key), value})
		}
		p.space()
		if p.next(',') {
			continue
		}
		if !p.end('}') {
			return nil, p.errorf("expected a comma or the end of an object")
		}
		break
	}
	members, keys := p.members[start:], p.keys[first:]
	if p.duplicate(members) || p.duplicateKey(keys) {
		return nil, fmt.Errorf("%w in the object that ends at offset %d", ErrDuplicateKey, p.pos)
	}
	if p.checks {
		p.keys = p.keys[:first]
		p.depth--
		return ast.InternedNullTerm, nil
	}
	term := p.term(ast.NewObject(members...))
	clear(members)
	p.members = p.members[:start]
	p.depth--
	return term, nil
}

// duplicate reports whether two of the members have one key.
func (p *jsonParser) duplicate(members [][2]*ast.Term) bool {
	if len(members) <= smallObject {
		for i := range members {
			for j := range i {
				if members[i][0].Value == members[j][0].Value {
					return true
				}
			}
		}
		return false
	}
	if p.seen == nil {
		p.seen = make(map[string]struct{}, len(members))
	}
	clear(p.seen)
	for i := range members {
		p.seen[string(members[i][0].Value.(ast.String))] = struct{}{}
	}
	return len(p.seen) < len(members)
}

// duplicateKey reports whether two of the keys are one.
func (p *jsonParser) duplicateKey(keys []string) bool {
	if len(keys) <= smallObject {
		for i := range keys {
			if slices.Contains(keys[:i], keys[i]) {
				return true
			}
		}
		return false
	}
	if p.seen == nil {
		p.seen = make(map[string]struct{}, len(keys))
	}
	clear(p.seen)
	for _, key := range keys {
		p.seen[key] = struct{}{}
	}
	return len(p.seen) < len(keys)
}

func (p *jsonParser) array() (*ast.Term, error) {
	if err := p.enter(); err != nil {
		return nil, err
	}
	if p.next(']') {
		p.depth--
		return ast.InternedEmptyArray, nil
	}
	start := len(p.elements)
	for {
		value, err := p.value()
		if err != nil {
			return nil, err
		}
		if !p.checks {
			p.elements = append(p.elements, value)
		}
		p.space()
		if p.next(',') {
			continue
		}
		if !p.end(']') {
			return nil, p.errorf("expected a comma or the end of an array")
		}
		break
	}
	if p.checks {
		p.depth--
		return ast.InternedNullTerm, nil
	}
	elements := make([]*ast.Term, len(p.elements)-start) // the array keeps it
	copy(elements, p.elements[start:])
	clear(p.elements[start:])
	p.elements = p.elements[:start]
	p.depth--
	return p.term(ast.NewArray(elements...)), nil
}

// enter opens an object or array.
func (p *jsonParser) enter() error {
	if p.depth++; p.depth > maxJSONDepth {
		return p.errorf("nested deeper than %d", maxJSONDepth)
	}
	p.pos++
	p.space()
	return nil
}

// next reports whether c is next; if so, it and the space behind it are read.
func (p *jsonParser) next(c byte) bool {
	if !p.end(c) {
		return false
	}
	p.space()
	return true
}

// end reports whether c is next; if so, it is read.
func (p *jsonParser) end(c byte) bool {
	if p.pos >= len(p.text) || p.text[p.pos] != c {
		return false
	}
	p.pos++
	return true
}

func (p *jsonParser) literal(word string) error {
	if !strings.HasPrefix(p.text[p.pos:], word) {
		return p.errorf("unexpected character")
	}
	p.pos += len(word)
	return nil
}

func (p *jsonParser) number() (*ast.Term, error) {
	start := p.pos
	p.end('-')
	if !p.end('0') && !p.digits() {
		return nil, p.errorf("expected a digit")
	}
	if p.end('.') && !p.digits() {
		return nil, p.errorf("expected a digit")
	}
	if p.end('e') || p.end('E') {
		if !p.end('+') {
			p.end('-')
		}
		if !p.digits() {
			return nil, p.errorf("expected a digit")
		}
	}
	text := p.text[start:p.pos]
	if term := ast.InternedIntNumberTermFromString(text); term != nil {
		return term, nil
	}
	n, err := ast.NumberChecked(text)
	if err != nil {
		return nil, p.errorf("number out of range")
	}
	if p.checks {
		return ast.InternedNullTerm, nil
	}
	return p.term(n), nil
}

// digits reports whether at least one digit is next; they are read.
func (p *jsonParser) digits() bool {
	start := p.pos
	for p.pos < len(p.text) && isDigit(p.text[p.pos]) {
		p.pos++
	}
	return p.pos > start
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }

func (p *jsonParser) space() {
	for p.pos < len(p.text) {
		switch p.text[p.pos] {
		case ' ', '\t', '\r', '\n':
			p.pos++
		default:
			return
		}
	}
}

func (p *jsonParser) stringTerm(s string) *ast.Term {
	if ast.HasInternedValue(s) {
		return ast.InternedTerm(s)
	}
	return p.term(ast.String(s))
}

// term returns a term with the value. Terms are made many at a time: an input
// lives and dies as a whole.
func (p *jsonParser) term(v ast.Value) *ast.Term {
	if len(p.terms) == 0 {
		p.slab = min(max(2*p.slab, 4), 128)
		// A value takes at least two bytes of text.
		p.terms = make([]ast.Term, min(p.slab, (len(p.text)-p.pos)/2+1))
	}
	t := &p.terms[0]
	p.terms = p.terms[1:]
	t.Value = v
	return t
}

func (p *jsonParser) errorf(format string, args ...any) error {
	return fmt.Errorf("JSON at offset %d: %w", p.pos, fmt.Errorf(format, args...))
}
