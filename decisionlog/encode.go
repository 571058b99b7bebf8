package decisionlog

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"unicode/utf8"

	"github.com/open-policy-agent/opa/v1/ast"
)

// encoder writes values as JSON: the documents that ast.JSON and encoding/json
// give, with the members of objects in the order of their keys. It may be used
// again and again, and keeps its memory.
//
// A value is written as a whole, by value, or in its parts as they come: str,
// number, boolean and null, and open and shut around what key and further parts
// write.
type encoder struct {
	buf   []byte
	start int   // of what is being written, in buf
	err   error // the first value that JSON cannot say

	hiding           // where secrets are hidden
	spare   []byte   // room for another text
	metrics []Metric // room for those of an event

	member func(k, v *ast.Term) // is writeMember: made once, as closures cost
}

func newEncoder() *encoder {
	e := new(encoder)
	e.member = e.writeMember
	return e
}

// reset makes the encoder empty.
func (e *encoder) reset(hide bool) {
	e.buf = e.buf[:0]
	e.next(hide)
}

// next has what is written next begin behind what was written.
func (e *encoder) next(hide bool) {
	e.start, e.err = len(e.buf), nil
	e.hiding.reset(hide)
}

// undo takes back what was written since next.
func (e *encoder) undo() { e.buf = e.buf[:e.start] }

// value writes a value.
func (e *encoder) value(v ast.Value) {
	switch v := v.(type) {
	case ast.String:
		e.str(string(v))
	case ast.Object:
		e.open('{')
		v.Foreach(e.member)
		e.shut('}')
	case *ast.Array:
		e.open('[')
		for i := range v.Len() {
			e.value(v.Elem(i).Value)
		}
		e.shut(']')
	case ast.Set:
		e.open('[')
		for _, t := range v.Slice() {
			e.value(t.Value)
		}
		e.shut(']')
	case ast.Number:
		e.number(string(v))
	case ast.Boolean:
		e.boolean(bool(v))
	case ast.Null:
		e.null()
	default:
		e.fail(fmt.Errorf("%s requires evaluation", ast.ValueName(v)))
		e.null()
	}
}

// fail notes that there is something that JSON cannot say.
func (e *encoder) fail(err error) {
	if e.err == nil {
		e.err = err
	}
}

// writeMember writes a member of the object that is open.
func (e *encoder) writeMember(k, v *ast.Term) {
	key, ok := k.Value.(ast.String)
	if !ok {
		key = ast.String(e.keyText(k.Value))
	}
	e.key(string(key))
	e.value(v.Value)
}

// key writes the name of the next member of the object that is open.
func (e *encoder) key(key string) {
	if e.skip > 0 {
		return
	}
	e.name(key)
	if e.hide {
		e.guardMember(key)
	}
}

// name is key, for an object that has no secrets.
func (e *encoder) name(key string) {
	if e.buf[len(e.buf)-1] != '{' {
		e.buf = append(e.buf, ',')
	}
	e.buf = append(appendString(e.buf, key), ':')
}

// str writes a string.
func (e *encoder) str(s string) {
	if e.begin(stringValue, s) {
		e.buf = appendString(e.buf, s)
	}
}

// boolean writes true or false.
func (e *encoder) boolean(b bool) {
	if e.begin(plainValue, "") {
		e.buf = strconv.AppendBool(e.buf, b)
	}
}

// null writes null.
func (e *encoder) null() {
	if e.begin(plainValue, "") {
		e.buf = append(e.buf, "null"...)
	}
}

// number writes the text of a number. An empty one is 0, as for encoding/json.
func (e *encoder) number(n string) {
	if !e.begin(otherValue, "") {
		return
	}
	switch {
	case n == "":
		e.buf = append(e.buf, '0')
	case validNumber(n):
		e.buf = append(e.buf, n...)
	default:
		e.fail(fmt.Errorf("invalid number %q", n))
		e.buf = append(e.buf, "null"...)
	}
}

// int writes a whole number.
func (e *encoder) int(n int64) {
	if e.begin(otherValue, "") {
		e.buf = strconv.AppendInt(e.buf, n, 10)
	}
}

// open begins an object, by '{', or an array, by '['.
func (e *encoder) open(bracket byte) {
	k := otherValue
	if bracket == '{' {
		k = objectValue
	}
	if !e.begin(k, "") {
		e.skip++
		return
	}
	e.buf = append(e.buf, bracket)
	if e.hide {
		e.enter(bracket == '[')
	}
}

// shut ends the object or the array that was begun last.
func (e *encoder) shut(bracket byte) {
	if e.skip > 0 {
		e.skip--
		return
	}
	e.buf = append(e.buf, bracket)
	if e.hide {
		e.leave()
	}
}

// begin begins a value. It reports false where the value is not to be written:
// something stands in its place already, or in that of what it is in. The text is
// that of a string.
func (e *encoder) begin(k valueKind, text string) bool {
	if e.skip > 0 {
		return false
	}
	if n := len(e.buf); n > e.start {
		switch e.buf[n-1] {
		case ':', '[', ',': // nothing that ends with one of these is a value
		default:
			e.buf = append(e.buf, ',')
		}
	}
	return !e.hide || e.admits(k, text)
}

// admits reports whether a value may be seen. In the place of one that may not, it
// writes Redacted.
func (e *encoder) admits(k valueKind, text string) bool {
	if e.admit(k, text) {
		return true
	}
	e.buf = append(e.buf, `"`+Redacted+`"`...)
	return false
}

// keyText is the name of a member whose key is no string: the key's JSON.
func (e *encoder) keyText(key ast.Value) string {
	if key, ok := key.(ast.String); ok {
		return string(key)
	}
	k := encoder{buf: e.spare[:0]} // an object in a key may have keys of its own
	k.member = k.writeMember
	e.spare = nil
	k.value(key)
	if k.err != nil {
		e.fail(k.err)
	}
	e.spare = k.buf
	return string(k.buf)
}

// validNumber reports whether the text is a number of JSON.
func validNumber(n string) bool {
	for i := range len(n) {
		if n[i] < '0' || n[i] > '9' {
			return (n[0] == '-' || '0' <= n[0] && n[0] <= '9') && json.Valid([]byte(n))
		}
	}
	return n[0] != '0' || len(n) == 1
}

// plain are the bytes that stand for themselves in a string of JSON.
var plain = func() (plain [256]bool) {
	for c := range plain {
		plain[c] = c >= ' ' && c < utf8.RuneSelf && c != '"' && c != '\\'
	}
	return plain
}()

// appendString appends s as a string of JSON. Bytes that are not UTF-8 become
// U+FFFD.
func appendString(buf []byte, s string) []byte {
	buf = append(buf, '"')
	if i := plainPrefix(s); i < len(s) {
		return append(appendEscaped(append(buf, s[:i]...), s[i:]), '"')
	}
	return append(append(buf, s...), '"')
}

// plainPrefix returns how many bytes at the start of s stand for themselves.
func plainPrefix(s string) int {
	const ones, tops = 0x0101010101010101, 0x8080808080808080
	i := 0
	for ; len(s)-i >= 8; i += 8 {
		w := s[i : i+8]
		x := uint64(w[0]) | uint64(w[1])<<8 | uint64(w[2])<<16 | uint64(w[3])<<24 |
			uint64(w[4])<<32 | uint64(w[5])<<40 | uint64(w[6])<<48 | uint64(w[7])<<56
		quote, backslash := x^'"'*ones, x^'\\'*ones
		// A byte's highest bit is set where the byte is not plain, and perhaps
		// where one before it is not.
		if (x|(x-' '*ones)|(quote-ones)|(backslash-ones))&tops != 0 {
			break
		}
	}
	for i < len(s) && plain[s[i]] {
		i++
	}
	return i
}

func appendEscaped(buf []byte, s string) []byte {
	const hex = "0123456789abcdef"
	start := 0
	for i := 0; i < len(s); {
		c := s[i]
		if plain[c] {
			i++
			continue
		}
		size := 1
		if c >= utf8.RuneSelf {
			r, n := utf8.DecodeRuneInString(s[i:])
			if r != utf8.RuneError || n != 1 {
				i += n
				continue
			}
		}
		buf = append(buf, s[start:i]...)
		switch {
		case c >= utf8.RuneSelf:
			buf = append(buf, "\ufffd"...)
		case c == '"' || c == '\\':
			buf = append(buf, '\\', c)
		case c == '\n':
			buf = append(buf, `\n`...)
		case c == '\r':
			buf = append(buf, `\r`...)
		case c == '\t':
			buf = append(buf, `\t`...)
		default:
			buf = append(buf, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
		}
		i += size
		start = i
	}
	return append(buf, s[start:]...)
}

// jsonValue returns the value that a round trip through JSON gives: keys are
// strings, sets are arrays. It is v itself where that is so already.
func (e *encoder) jsonValue(v ast.Value) ast.Value {
	if isJSON(v) {
		return v
	}
	switch v := v.(type) {
	case ast.Object:
		pairs := make([][2]*ast.Term, 0, v.Len())
		v.Foreach(func(k, v *ast.Term) {
			pairs = append(pairs, ast.Item(ast.StringTerm(e.keyText(k.Value)), ast.NewTerm(e.jsonValue(v.Value))))
		})
		return ast.NewObject(pairs...)
	case *ast.Array:
		return e.jsonArray(slices.Collect(elements(v)))
	case ast.Set:
		return e.jsonArray(v.Slice())
	}
	return v
}

func (e *encoder) jsonArray(elems []*ast.Term) ast.Value {
	terms := make([]*ast.Term, len(elems))
	for i, t := range elems {
		terms[i] = ast.NewTerm(e.jsonValue(t.Value))
	}
	return ast.NewArray(terms...)
}

// elements yields the elements of an array.
func elements(a *ast.Array) func(yield func(*ast.Term) bool) {
	return func(yield func(*ast.Term) bool) {
		for i := range a.Len() {
			if !yield(a.Elem(i)) {
				return
			}
		}
	}
}

// isJSON reports whether a value is what a JSON text stands for.
func isJSON(v ast.Value) bool {
	switch v := v.(type) {
	case ast.Object:
		return !v.Until(func(k, v *ast.Term) bool {
			_, ok := k.Value.(ast.String)
			return !ok || !isJSON(v.Value)
		})
	case *ast.Array:
		for i := range v.Len() {
			if !isJSON(v.Elem(i).Value) {
				return false
			}
		}
		return true
	case ast.Set:
		return false
	}
	return true
}
