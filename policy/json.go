package policy

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf16"
	"unicode/utf8"

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
	p.space()
	term, err := p.value()
	if err != nil {
		return nil, err
	}
	p.space()
	if p.pos < len(p.text) {
		return nil, p.errorf("unexpected text after the value")
	}
	return term.Value, nil
}

// jsonParser reads a text from left to right. Strings of the result are parts
// of the text where they need no change.
type jsonParser struct {
	text   string
	pos    int
	depth  int
	cancel *Cancel

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
		return p.string()
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
	start := len(p.members)
	for {
		if p.pos >= len(p.text) || p.text[p.pos] != '"' {
			return nil, p.errorf("expected an object key")
		}
		key, err := p.string()
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
		p.members = append(p.members, [2]*ast.Term{key, value})
		p.space()
		if p.next(',') {
			continue
		}
		if !p.end('}') {
			return nil, p.errorf("expected a comma or the end of an object")
		}
		break
	}
	members := p.members[start:]
	if p.duplicate(members) {
		return nil, fmt.Errorf("%w in the object that ends at offset %d", ErrDuplicateKey, p.pos)
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
		p.elements = append(p.elements, value)
		p.space()
		if p.next(',') {
			continue
		}
		if !p.end(']') {
			return nil, p.errorf("expected a comma or the end of an array")
		}
		break
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

func (p *jsonParser) string() (*ast.Term, error) {
	p.pos++
	start, ascii := p.pos, true
	for p.pos < len(p.text) {
		switch c := p.text[p.pos]; {
		case c == '"':
			s := p.text[start:p.pos]
			if !ascii {
				s = validUTF8(s)
			}
			p.pos++
			return p.stringTerm(s), nil
		case c == '\\':
			return p.escaped(start)
		case c < ' ':
			return nil, p.errorf("control character in a string")
		case c >= utf8.RuneSelf:
			ascii = false
		}
		p.pos++
	}
	return nil, p.errorf("unexpected end of a string")
}

// escaped reads the rest of a string that began at start and has an escape here.
func (p *jsonParser) escaped(start int) (*ast.Term, error) {
	buf := make([]byte, 0, p.pos-start+32)
	buf = append(buf, p.text[start:p.pos]...)
	for p.pos < len(p.text) {
		c := p.text[p.pos]
		switch {
		case c == '"':
			p.pos++
			return p.stringTerm(validUTF8(string(buf))), nil
		case c == '\\':
			var err error
			if buf, err = p.escape(buf); err != nil {
				return nil, err
			}
		case c < ' ':
			return nil, p.errorf("control character in a string")
		default:
			buf = append(buf, c)
			p.pos++
		}
	}
	return nil, p.errorf("unexpected end of a string")
}

// escape appends to buf what the escape here stands for.
func (p *jsonParser) escape(buf []byte) ([]byte, error) {
	if p.pos++; p.pos >= len(p.text) {
		return nil, p.errorf("unexpected end of a string")
	}
	c := p.text[p.pos]
	switch c {
	case '"', '\\', '/':
	case 'b':
		c = '\b'
	case 'f':
		c = '\f'
	case 'n':
		c = '\n'
	case 'r':
		c = '\r'
	case 't':
		c = '\t'
	case 'u':
		r, ok := hex4(p.text[p.pos+1:])
		if !ok {
			return nil, p.errorf("unknown escape")
		}
		p.pos += 5
		if utf16.IsSurrogate(r) {
			low, ok := rune(0), false
			if strings.HasPrefix(p.text[p.pos:], `\u`) {
				low, ok = hex4(p.text[p.pos+2:])
			}
			if r = utf16.DecodeRune(r, low); ok && r != utf8.RuneError {
				p.pos += 6
			}
		}
		return utf8.AppendRune(buf, r), nil
	default:
		return nil, p.errorf("unknown escape")
	}
	p.pos++
	return append(buf, c), nil
}

// hex4 returns the number that s begins with, in four hexadecimal digits.
func hex4(s string) (rune, bool) {
	if len(s) < 4 {
		return 0, false
	}
	var r rune
	for i := range 4 {
		c := s[i]
		switch {
		case isDigit(c):
			c -= '0'
		case 'a' <= c && c <= 'f':
			c -= 'a' - 10
		case 'A' <= c && c <= 'F':
			c -= 'A' - 10
		default:
			return 0, false
		}
		r = r<<4 | rune(c)
	}
	return r, true
}

// validUTF8 returns s with each byte that is not UTF-8 as U+FFFD, as
// encoding/json does. (strings.ToValidUTF8 has one for a run of such bytes.)
func validUTF8(s string) string {
	if utf8.ValidString(s) {
		return s
	}
	return string([]rune(s))
}

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
