package decisionlog

import (
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
)

// parts are those parts of an event that can be masked.
type parts struct {
	document               Document  // has the place of input, where it is there
	input, result, ndCache ast.Value // nil: absent
	erased, masked         []string
}

func (p *parts) named(name string) *ast.Value {
	switch name {
	case "input":
		return &p.input
	case "result":
		return &p.result
	case "nd_builtin_cache":
		return &p.ndCache
	}
	return nil
}

// maskRule is one element of the value of a mask rule.
type maskRule struct {
	upsert bool      // else it erases
	path   []segment // the first names the part
	value  ast.Value // to be put there
}

// segment is one segment of a pointer.
type segment struct {
	escaped string // this is the key for OPA, and what the event lists
	decoded string
	raw     string
}

// maskRules reads the value of a mask rule as OPA does: each element of the set is
// a pointer to erase, or an object of op (remove or upsert), path and value. One
// that is no such element makes all of it invalid.
func maskRules(v ast.Value) ([]maskRule, error) {
	var elems []*ast.Term
	switch v := v.(type) {
	case ast.Set:
		elems = v.Slice()
	case *ast.Array:
		for t := range elements(v) {
			elems = append(elems, t)
		}
	default:
		return nil, fmt.Errorf("unexpected rule format: %s", ast.ValueName(v))
	}
	rules := make([]maskRule, len(elems))
	for i, t := range elems {
		var err error
		switch v := t.Value.(type) {
		case ast.String:
			rules[i].path, err = pointer(string(v))
		case ast.Object:
			rules[i], err = maskOperation(v)
		default:
			err = fmt.Errorf("invalid mask rule format encountered: %s", ast.ValueName(v))
		}
		if err != nil {
			return nil, err
		}
	}
	return rules, nil
}

var (
	opTerm    = ast.StringTerm("op")
	pathTerm  = ast.StringTerm("path")
	valueTerm = ast.StringTerm("value")
)

func maskOperation(obj ast.Object) (rule maskRule, err error) {
	op, err := textAt(obj, opTerm)
	if err != nil {
		return rule, err
	}
	path, err := textAt(obj, pathTerm)
	if err != nil {
		return rule, err
	}
	if rule.path, err = pointer(path); err != nil {
		return rule, err
	}
	switch op {
	case "remove":
	case "upsert":
		rule.upsert = true
	default:
		return rule, fmt.Errorf("mask op is not supported: %s", op)
	}
	rule.value = ast.NullValue
	if t := obj.Get(valueTerm); t != nil {
		rule.value = t.Value
	}
	return rule, nil
}

// textAt returns a member that is a string; "" if there is none.
func textAt(obj ast.Object, key *ast.Term) (string, error) {
	t := obj.Get(key)
	if t == nil {
		return "", nil
	}
	if s, ok := t.Value.(ast.String); ok && s != "" {
		return string(s), nil
	}
	return "", fmt.Errorf("invalid %v value", key)
}

// pointer parses a pointer, such as /input/attributes/request/http/headers/cookie.
func pointer(path string) ([]segment, error) {
	if path == "" {
		return nil, errors.New("mask must be non-empty")
	}
	if path[0] != '/' {
		return nil, errors.New("mask must be slash-prefixed")
	}
	texts := strings.Split(path[1:], "/")
	if new(parts).named(texts[0]) == nil {
		return nil, fmt.Errorf("mask prefix not allowed: %v", texts[0])
	}
	segments := make([]segment, len(texts))
	for i, text := range texts {
		decoded, err := url.PathUnescape(text)
		if err != nil {
			return nil, err
		}
		segments[i] = segment{escaped: url.PathEscape(text), decoded: decoded, raw: text}
	}
	return segments, nil
}

func (r *maskRule) String() string {
	var b strings.Builder
	for _, s := range r.path {
		b.WriteByte('/')
		b.WriteString(s.escaped)
	}
	return b.String()
}

// apply masks, as OPA does: a rule whose path leads nowhere does nothing. The
// values themselves are left as they are; what changes is made anew.
func (p *parts) apply(rules []maskRule, e *encoder) {
	for i := range rules {
		r := &rules[i]
		part := p.named(r.path[0].raw)
		if *part == nil {
			continue
		}
		path := r.path[1:]
		switch {
		case r.upsert && len(path) == 0:
			*part = r.value
		case r.upsert:
			v, ok := upsert(*part, path, r.value, e)
			if !ok {
				continue
			}
			*part = v
		case len(path) == 0:
			*part = nil
		default:
			v, ok := erase(*part, path, e)
			if !ok {
				continue
			}
			*part = v
		}
		if r.upsert {
			p.masked = append(p.masked, r.String())
		} else {
			p.erased = append(p.erased, r.String())
		}
	}
}

// erase returns v without what the path leads to. It reports false where that is
// nothing.
func erase(v ast.Value, path []segment, e *encoder) (ast.Value, bool) {
	if obj, ok := v.(ast.Object); ok {
		key, t := find(obj, path[0], e)
		if t == nil {
			return nil, false
		}
		if len(path) == 1 {
			return with(obj, key, nil), true
		}
		child, ok := erase(t.Value, path[1:], e)
		if !ok {
			return nil, false
		}
		return with(obj, key, child), true
	}
	elems, i, ok := elementAt(v, path[0])
	if !ok {
		return nil, false
	}
	if len(path) == 1 {
		return ast.NewArray(append(elems[:i:i], elems[i+1:]...)...), true
	}
	child, ok := erase(elems[i].Value, path[1:], e)
	if !ok {
		return nil, false
	}
	elems[i] = ast.NewTerm(child)
	return ast.NewArray(elems...), true
}

// upsert returns v with the value where the path leads to, through objects that
// are made where there are none. It reports false where it leads through anything
// else, or to no element of an array.
func upsert(v ast.Value, path []segment, value ast.Value, e *encoder) (ast.Value, bool) {
	if obj, ok := v.(ast.Object); ok {
		key, t := find(obj, path[0], e)
		if t == nil {
			t = ast.InternedEmptyObject
		}
		if len(path) == 1 {
			return with(obj, key, value), true
		}
		child, ok := upsert(t.Value, path[1:], value, e)
		if !ok {
			return nil, false
		}
		return with(obj, key, child), true
	}
	elems, i, ok := elementAt(v, path[0])
	if !ok {
		return nil, false
	}
	child := value
	if len(path) > 1 {
		if child, ok = upsert(elems[i].Value, path[1:], value, e); !ok {
			return nil, false
		}
	}
	elems[i] = ast.NewTerm(child)
	return ast.NewArray(elems...), true
}

// find returns the key that a segment stands for, and its member; no member if
// the object has none. OPA looks for the segment as it is escaped; where it would
// find nothing, a key that has other characters is found as it is, or decoded, so
// that %2F stands for a slash.
func find(obj ast.Object, s segment, e *encoder) (key, member *ast.Term) {
	for _, text := range []string{s.escaped, s.decoded, s.raw} {
		key := ast.StringTerm(text)
		if t := obj.Get(key); t != nil {
			return key, t
		}
	}
	obj.Until(func(k, v *ast.Term) bool {
		if _, ok := k.Value.(ast.String); ok {
			return false
		}
		if text := e.keyText(k.Value); text == s.escaped || text == s.decoded || text == s.raw {
			key, member = k, v
		}
		return member != nil
	})
	if member != nil {
		return key, member
	}
	return ast.StringTerm(s.escaped), nil
}

// with returns the object with another value for a key; nil: without the key.
func with(obj ast.Object, key *ast.Term, value ast.Value) ast.Object {
	pairs := make([][2]*ast.Term, 0, obj.Len()+1)
	obj.Foreach(func(k, v *ast.Term) {
		if k.Value.Compare(key.Value) != 0 {
			pairs = append(pairs, ast.Item(k, v))
		}
	})
	if value != nil {
		pairs = append(pairs, ast.Item(key, ast.NewTerm(value)))
	}
	return ast.NewObject(pairs...)
}

// elementAt returns a copy of the elements of an array, or of a set as JSON has
// it, and which of them a segment stands for.
func elementAt(v ast.Value, s segment) (elems []*ast.Term, i int, ok bool) {
	i, err := strconv.Atoi(s.escaped)
	if err != nil || i < 0 {
		return nil, 0, false
	}
	switch v := v.(type) {
	case *ast.Array:
		elems = make([]*ast.Term, 0, v.Len())
		for t := range elements(v) {
			elems = append(elems, t)
		}
	case ast.Set:
		elems = append(elems, v.Slice()...)
	}
	return elems, i, i < len(elems)
}
