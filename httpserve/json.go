package httpserve

import (
	"encoding/json"
	"fmt"
	"strconv"

	"github.com/open-policy-agent/opa/v1/ast"
)

// appendValue appends a value as JSON: what ast.JSON and encoding/json give, with
// the members of objects in the order of their keys.
func appendValue(buf []byte, v ast.Value) ([]byte, error) {
	switch v := v.(type) {
	case ast.Null:
		return append(buf, "null"...), nil
	case ast.Boolean:
		return strconv.AppendBool(buf, bool(v)), nil
	case ast.Number:
		if text := string(v); text != "" && json.Valid([]byte(text)) {
			return append(buf, text...), nil
		}
		return buf, fmt.Errorf("%q is not a number of JSON", string(v))
	case ast.String:
		return appendString(buf, string(v)), nil
	case *ast.Array:
		return appendElements(buf, v.Len(), v.Elem)
	case ast.Set:
		elems := v.Slice()
		return appendElements(buf, len(elems), func(i int) *ast.Term { return elems[i] })
	case ast.Object:
		return appendObject(buf, v)
	}
	return buf, fmt.Errorf("%s is not a value of JSON", ast.ValueName(v))
}

func appendElements(buf []byte, n int, elem func(int) *ast.Term) ([]byte, error) {
	buf = append(buf, '[')
	for i := range n {
		if i > 0 {
			buf = append(buf, ',')
		}
		var err error
		if buf, err = appendValue(buf, elem(i).Value); err != nil {
			return buf, err
		}
	}
	return append(buf, ']'), nil
}

func appendObject(buf []byte, obj ast.Object) ([]byte, error) {
	buf = append(buf, '{')
	first := true
	err := obj.Iter(func(k, v *ast.Term) (err error) {
		if !first {
			buf = append(buf, ',')
		}
		first = false
		if key, ok := k.Value.(ast.String); ok {
			buf = appendString(buf, string(key))
		} else { // as ast.JSON has it: the key's own JSON is its name
			text, err := appendValue(nil, k.Value)
			if err != nil {
				return err
			}
			buf = appendString(buf, string(text))
		}
		buf, err = appendValue(append(buf, ':'), v.Value)
		return err
	})
	return append(buf, '}'), err
}

// appendString appends s as a string of JSON. Bytes that are not UTF-8 become
// U+FFFD.
func appendString(buf []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c >= 0x7f || c == '"' || c == '\\' || c == '<' || c == '>' || c == '&' {
			text, _ := json.Marshal(s) // a string
			return append(buf, text...)
		}
	}
	return append(append(append(buf, '"'), s...), '"')
}
