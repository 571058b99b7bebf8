package plan

import (
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/open-policy-agent/opa/v1/ast"
)

func init() {
	for name, f := range map[string]func(s, other string) string{
		ast.Trim.Name:       strings.Trim,
		ast.TrimLeft.Name:   strings.TrimLeft,
		ast.TrimRight.Name:  strings.TrimRight,
		ast.TrimPrefix.Name: strings.TrimPrefix,
		ast.TrimSuffix.Name: strings.TrimSuffix,
	} {
		natives[name] = func(m *machine, a []operand) (*ast.Term, bool) {
			other, ok := a[1].load(m).Value.(ast.String)
			if !ok {
				return nil, false
			}
			return changed(a[0].load(m), func(s string) string { return f(s, string(other)) })
		}
		builders[name] = true
	}
	for name, f := range map[string]func(s string) string{
		ast.Lower.Name:     strings.ToLower,
		ast.Upper.Name:     strings.ToUpper,
		ast.TrimSpace.Name: strings.TrimSpace,
	} {
		natives[name] = func(m *machine, a []operand) (*ast.Term, bool) { return changed(a[0].load(m), f) }
		builders[name] = true
	}
	natives[ast.Split.Name], builders[ast.Split.Name] = splitText, true
	natives[ast.Substring.Name], builders[ast.Substring.Name] = substring, true
	natives[ast.Sprintf.Name], builders[ast.Sprintf.Name] = sprintf, true
	natives[ast.NowNanos.Name] = func(m *machine, _ []operand) (*ast.Term, bool) { return m.timeTerm(), true }
}

// changed returns a text as f makes it.
func changed(t *ast.Term, f func(string) string) (*ast.Term, bool) {
	s, ok := t.Value.(ast.String)
	if !ok {
		return nil, false
	}
	if to := f(string(s)); to != string(s) {
		return ast.InternedTerm(to), true
	}
	return t, true
}

// maxParts is the most parts of a text that is split here.
const maxParts = 256

func splitText(m *machine, a []operand) (*ast.Term, bool) {
	t := a[0].load(m)
	s, ok1 := t.Value.(ast.String)
	by, ok2 := a[1].load(m).Value.(ast.String)
	if !ok1 || !ok2 || by == "" {
		return nil, false
	}
	n := strings.Count(string(s), string(by))
	if n == 0 {
		return ast.ArrayTerm(t), true
	}
	if n >= maxParts {
		return nil, false
	}
	parts := make([]*ast.Term, 0, n+1)
	rest := string(s)
	for range n {
		part, after, _ := strings.Cut(rest, string(by))
		parts, rest = append(parts, ast.InternedTerm(part)), after
	}
	return ast.ArrayTerm(append(parts, ast.InternedTerm(rest))...), true
}

func substring(m *machine, a []operand) (*ast.Term, bool) {
	t := a[0].load(m)
	s, ok := t.Value.(ast.String)
	if !ok {
		return nil, false
	}
	from, ok := small(a[1].load(m))
	if !ok || from < 0 {
		return nil, false
	}
	n, ok := small(a[2].load(m))
	if !ok {
		return nil, false
	}
	for i := range len(s) {
		if s[i] >= 0x80 {
			return nil, false
		}
	}
	length := int64(len(s))
	switch {
	case from >= length:
		return ast.InternedEmptyString, true
	case n < 0 || n > length-from:
		n = length - from
	}
	if n == length {
		return t, true
	}
	return ast.InternedTerm(string(s[from : from+n])), true
}

// sprintf formats texts and integers by %s, %v and %d.
func sprintf(m *machine, a []operand) (*ast.Term, bool) {
	format, ok := a[0].load(m).Value.(ast.String)
	if !ok {
		return nil, false
	}
	list, ok := a[1].load(m).Value.(*ast.Array)
	if !ok {
		return nil, false
	}
	var room [256]byte
	out, next := room[:0], 0
	for rest := string(format); ; {
		at := strings.IndexByte(rest, '%')
		if at < 0 {
			out = append(out, rest...)
			break
		}
		if at+1 == len(rest) || next == list.Len() {
			return nil, false
		}
		out = append(out, rest[:at]...)
		switch v := list.Elem(next).Value.(type) {
		case ast.String:
			if rest[at+1] != 's' && rest[at+1] != 'v' {
				return nil, false
			}
			out = append(out, v...)
		case ast.Number:
			i, err := strconv.ParseInt(string(v), 10, 64)
			if err != nil || rest[at+1] != 'd' && rest[at+1] != 'v' {
				return nil, false
			}
			out = strconv.AppendInt(out, i, 10)
		default:
			return nil, false
		}
		if len(out) > maxConcat {
			return nil, false
		}
		rest, next = rest[at+2:], next+1
	}
	if next != list.Len() || len(out) > maxConcat {
		return nil, false
	}
	return ast.NewTerm(ast.String(out)), true
}

// remembered are values by texts, which are read without a lock. There is room for
// maxPatterns, and then for no more.
type remembered[T any] struct {
	known atomic.Pointer[map[string]T] // always modified by swapping
	mu    sync.Mutex                   // of who adds to it
}

// get returns the value of a text, which make makes if there is room for it. It
// reports false where there is none.
func (r *remembered[T]) get(text string, make func(string) (T, error)) (v T, ok bool) {
	known := r.known.Load()
	if known != nil {
		if v, ok = (*known)[text]; ok {
			return v, true
		}
	}
	if len(text) > maxPattern || known != nil && len(*known) >= maxPatterns {
		return v, false
	}
	text = strings.Clone(text) // not what it is a part of
	v, err := make(text)
	if err != nil {
		return v, false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	all := map[string]T{text: v}
	if known = r.known.Load(); known != nil {
		for text, v := range *known {
			all[text] = v
		}
	}
	if len(all) <= maxPatterns {
		r.known.Store(&all)
	}
	return v, true
}

// regexMatch returns the native form of regex.match. It is for patterns of the policy
// or its data: those of an input could be any, and take much memory.
func regexMatch(r *remembered[*regexp.Regexp]) native {
	return func(m *machine, a []operand) (*ast.Term, bool) {
		pattern, ok := a[0].load(m).Value.(ast.String)
		if !ok {
			return nil, false
		}
		s, ok := a[1].load(m).Value.(ast.String)
		if !ok {
			return nil, false
		}
		re, ok := r.get(string(pattern), regexp.Compile)
		if !ok {
			return nil, false
		}
		return truth(re.MatchString(string(s))), true
	}
}
