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
type encoder struct {
	buf []byte
	err error // the first value that JSON cannot say

	// Where secrets are hidden: path leads to what is written, from the part of
	// the event on, and masked are the pointers to what was hidden.
	hide   bool
	path   []step
	masked []string

	member func(k, v *ast.Term) // is writeMember: made once, as closures cost
}

// step is a key of an object or an index of an array.
type step struct {
	key   string
	index int // -1: it is a key
}

func newEncoder() *encoder {
	e := new(encoder)
	e.member = e.writeMember
	return e
}

// reset makes the encoder empty.
func (e *encoder) reset(hide bool) {
	e.buf, e.err, e.hide, e.path = e.buf[:0], nil, hide, e.path[:0]
	clear(e.masked)
	e.masked = e.masked[:0]
}

// value writes a value.
func (e *encoder) value(v ast.Value) {
	switch v := v.(type) {
	case ast.String:
		e.buf = appendString(e.buf, string(v))
	case ast.Object:
		e.buf = append(e.buf, '{')
		v.Foreach(e.member)
		e.buf = append(e.buf, '}')
	case *ast.Array:
		e.buf = append(e.buf, '[')
		for i := range v.Len() {
			e.element(i, v.Elem(i).Value)
		}
		e.buf = append(e.buf, ']')
	case ast.Set:
		e.buf = append(e.buf, '[')
		for i, t := range v.Slice() {
			e.element(i, t.Value)
		}
		e.buf = append(e.buf, ']')
	case ast.Number:
		e.number(string(v))
	case ast.Boolean:
		e.buf = strconv.AppendBool(e.buf, bool(v))
	case ast.Null:
		e.buf = append(e.buf, "null"...)
	default:
		e.fail(fmt.Errorf("%s requires evaluation", ast.ValueName(v)))
	}
}

func (e *encoder) fail(err error) {
	if e.err == nil {
		e.err = err
	}
	e.buf = append(e.buf, "null"...)
}

// element writes an element of an array.
func (e *encoder) element(i int, v ast.Value) {
	if i > 0 {
		e.buf = append(e.buf, ',')
	}
	if !e.hide {
		e.value(v)
		return
	}
	e.path = append(e.path, step{index: i})
	if obj, ok := v.(ast.Object); ok {
		e.pair(obj)
	} else {
		e.value(v)
	}
	e.path = e.path[:len(e.path)-1]
}

// writeMember writes a member of the object that is open.
func (e *encoder) writeMember(k, v *ast.Term) {
	key, ok := k.Value.(ast.String)
	if !ok {
		key = ast.String(e.keyText(k.Value))
	}
	e.name(string(key))
	if !e.hide {
		e.value(v.Value)
		return
	}
	e.path = append(e.path, step{string(key), -1})
	e.guarded(string(key), v.Value)
	e.path = e.path[:len(e.path)-1]
}

// name writes the name of the next member of the object that is open.
func (e *encoder) name(key string) {
	if e.buf[len(e.buf)-1] != '{' {
		e.buf = append(e.buf, ',')
	}
	e.buf = append(appendString(e.buf, key), ':')
}

// keyText is the name of a member whose key is no string: the key's JSON.
func (e *encoder) keyText(key ast.Value) string {
	if key, ok := key.(ast.String); ok {
		return string(key)
	}
	start, hide := len(e.buf), e.hide
	e.hide = false
	e.value(key)
	text := string(e.buf[start:])
	e.buf, e.hide = e.buf[:start], hide
	return text
}

// number writes the text of a number. An empty one is 0, as for encoding/json.
func (e *encoder) number(n string) {
	switch {
	case n == "":
		e.buf = append(e.buf, '0')
	case validNumber(n):
		e.buf = append(e.buf, n...)
	default:
		e.fail(fmt.Errorf("invalid number %q", n))
	}
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
	const hex = "0123456789abcdef"
	buf = append(buf, '"')
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
	return append(append(buf, s[start:]...), '"')
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
