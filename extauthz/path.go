package extauthz

import (
	"fmt"
	"net/url"
	"slices"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/policy"
)

// path returns the segments of a path, nil where they are not wanted, and the query
// as it is. What it refuses does not depend on that.
func (t *termMaker) path(path string, wanted bool) (segments *ast.Term, query string, err error) {
	path, query, _ = strings.Cut(path, "?")
	if strings.IndexByte(path, '%') >= 0 || strings.IndexByte(path, 0) >= 0 || strings.Contains(path, "..") {
		list, err := split(path)
		if err != nil || !wanted {
			return nil, query, err
		}
		return t.strings(list), query, nil
	}
	if !wanted {
		return nil, query, nil
	}
	rest := strings.TrimLeft(path, "/")
	terms := make([]*ast.Term, 0, 1+strings.Count(rest, "/")) // the array keeps it
	for more := true; more; {
		var segment string
		segment, rest, more = strings.Cut(rest, "/")
		terms = append(terms, t.string(segment))
	}
	return t.of(ast.NewArray(terms...)), query, nil
}

// split returns the segments of the decoded path. The path is decoded before it is
// split, so that "%2F" separates too. It is never read as a URL, in which "//x"
// would be a host.
func split(path string) (segments []string, err error) {
	if path, err = url.PathUnescape(path); err != nil {
		return nil, err
	}
	if strings.IndexByte(path, 0) >= 0 {
		return nil, fmt.Errorf("NUL in the path")
	}
	segments = strings.Split(strings.TrimLeft(path, "/"), "/")
	if slices.Contains(segments, "..") {
		return nil, fmt.Errorf(`".." in the path`)
	}
	return segments, nil
}

// fewParameters bounds those of a query that are compared with each other.
const fewParameters = 16

// query returns an object of the lists of the parameters in s, nil where that is
// nil. What it refuses does not depend on that.
func (t *termMaker) query(query string, s *policy.Slice) (*ast.Term, error) {
	if strings.ContainsAny(query, "%;+") || strings.Count(query, "&") >= fewParameters {
		lists, err := url.ParseQuery(query)
		if err != nil || s == nil {
			return nil, err
		}
		if s.Whole {
			return t.lists(lists), nil
		}
		return t.slice(s, func(m *policy.Member) *ast.Term {
			if list, ok := lists[m.Name]; ok {
				return t.strings(list)
			}
			return nil
		}), nil
	}
	if s == nil {
		return nil, nil // there is nothing in it to refuse
	}
	if !s.Whole {
		return t.slice(s, func(m *policy.Member) *ast.Term { return t.parameter(query, m.Name) }), nil
	}
	var buf [8]item
	items := buf[:0]
	for name := range parametersIn(query) {
		if !slices.ContainsFunc(items, func(i item) bool { return string(i[0].Value.(ast.String)) == name }) {
			items = append(items, item{t.string(name), t.parameter(query, name)})
		}
	}
	return t.object(items), nil
}

// parametersIn yields the parameters of a query that has no escapes.
func parametersIn(query string) func(yield func(name, value string) bool) {
	return func(yield func(name, value string) bool) {
		for query != "" {
			var p string
			p, query, _ = strings.Cut(query, "&")
			if p == "" {
				continue
			}
			name, value, _ := strings.Cut(p, "=")
			if !yield(name, value) {
				return
			}
		}
	}
}

// parameter returns the array of the values of a parameter, nil where it has none.
func (t *termMaker) parameter(query, name string) *ast.Term {
	var terms []*ast.Term
	for n, value := range parametersIn(query) {
		if n == name {
			terms = append(terms, t.string(value))
		}
	}
	if terms == nil {
		return nil
	}
	return t.of(ast.NewArray(terms...))
}

// lists returns an object of arrays of strings.
func (t *termMaker) lists(m map[string][]string) *ast.Term {
	var buf [16]item
	items := buf[:0]
	for k, list := range m {
		items = append(items, item{t.string(k), t.strings(list)})
	}
	return t.object(items)
}
