package httpserve

import (
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/policy"
)

// respond has the policy write the answer: its status, its headers and its body.
// The policy sees the request with the path after /serve, as it would see one in
// a check.
func (s *Server) respond(w http.ResponseWriter, r *request) error {
	path, ok := r.after("/serve")
	if !ok || s.inputs == nil {
		return errRoute
	}
	if !isTarget(path) {
		return invalidf("there is no path after /serve")
	}
	body, err := s.plainBodyOf(r, bodyBytes(r.View.Settings))
	if err != nil {
		return err
	}
	defer body.release()
	c, err := r.checked(r.Method, path, body)
	if err != nil {
		return err
	}
	c.direct(r)
	q := r.question(r.Offers.Serve, nil)
	q.Input, q.BodyBytes = s.inputs(c, q.DecisionID), int64(len(c.Body))
	a, err := s.ask(r, &q)
	if err != nil {
		return err
	}
	if a.Decision.Value == nil {
		return policy.ErrUndefined
	}
	p, err := pageOf(a.Decision.Value, r.View.Settings.AllowHeaders)
	if err != nil {
		return err
	}
	if err := body.grow(int64(len(p.body))); err != nil {
		return err
	}
	w.Header().Set(decisionHeader, q.DecisionID)
	p.write(w)
	return nil
}

// maxPage bounds the body that a policy writes, in bytes.
const maxPage = 4 << 20

// page is an HTTP response that a policy has written.
type page struct {
	status  int
	headers []policy.Header
	body    []byte
	kind    string // of the body, where the policy names none
}

// resultErrorf returns an error that wraps policy.ErrResult.
func resultErrorf(format string, args ...any) error {
	return fmt.Errorf("%w: %w", policy.ErrResult, fmt.Errorf(format, args...))
}

// pageOf reads a value as a response: an object {http_status, headers, body}, of
// which each may be absent, or a boolean, for 200 and 403. Whether the object has
// "allowed" is all the same. Allowed are patterns of headers that the operator
// lets the policy set although they are reserved. The error wraps
// policy.ErrResult.
func pageOf(v ast.Value, allowed []string) (*page, error) {
	p := &page{status: http.StatusOK}
	if b, ok := v.(ast.Boolean); ok {
		if !b {
			p.status = http.StatusForbidden
		}
		return p, nil
	}
	obj, ok := v.(ast.Object)
	if !ok {
		return nil, resultErrorf("a response is an object, not %s", ast.ValueName(v))
	}
	if status := member(obj, "http_status"); status != nil {
		n, ok := status.(ast.Number)
		if !ok {
			return nil, resultErrorf("http_status is not a number")
		}
		code, ok := n.Int()
		if !ok || code < 200 || code > 599 {
			return nil, resultErrorf("http_status is not from 200 to 599")
		}
		p.status = code
	}
	var err error
	if p.headers, err = pageHeaders(member(obj, "headers"), allowed); err != nil {
		return nil, err
	}
	switch body := member(obj, "body").(type) {
	case nil:
	case ast.String:
		if !utf8.ValidString(string(body)) {
			return nil, resultErrorf("body is not UTF-8")
		}
		p.body, p.kind = []byte(body), "text/plain; charset=utf-8"
	default:
		text, err := appendValue(nil, body)
		if err != nil {
			return nil, resultErrorf("body: %w", err)
		}
		p.body, p.kind = append(text, '\n'), "application/json"
	}
	if len(p.body) > maxPage {
		return nil, resultErrorf("body is %d bytes, limit %d", len(p.body), maxPage)
	}
	return p, nil
}

// member returns the value of a member; nil: there is none, or it is null.
func member(obj ast.Object, name string) ast.Value {
	t := obj.Get(ast.StringTerm(name))
	if t == nil {
		return nil
	}
	if _, ok := t.Value.(ast.Null); ok {
		return nil
	}
	return t.Value
}

// pageHeaders reads headers: an object from names to values or lists of values,
// or a list of such objects.
func pageHeaders(v ast.Value, allowed []string) (headers []policy.Header, err error) {
	switch v := v.(type) {
	case nil:
		return nil, nil
	case *ast.Array:
		err := v.Iter(func(t *ast.Term) error {
			more, err := pageHeaders(t.Value, allowed)
			if _, ok := t.Value.(ast.Object); !ok {
				return resultErrorf("headers has an element that is no object")
			}
			headers = append(headers, more...)
			return err
		})
		return headers, err
	case ast.Object:
		err := v.Iter(func(k, v *ast.Term) error {
			name, ok := k.Value.(ast.String)
			if !ok {
				return resultErrorf("headers has a name that is no string")
			}
			add := func(t *ast.Term) error {
				value, ok := t.Value.(ast.String)
				if !ok {
					return resultErrorf("header %q has a value that is no string", string(name))
				}
				if err := checkPageHeader(string(name), string(value), allowed); err != nil {
					return err
				}
				headers = append(headers, policy.Header{Name: string(name), Value: string(value)})
				return nil
			}
			switch list := v.Value.(type) {
			case *ast.Array:
				return list.Iter(add)
			case ast.Set:
				return list.Iter(add)
			}
			return add(v)
		})
		return headers, err
	}
	return nil, resultErrorf("headers is %s, not an object", ast.ValueName(v))
}

// Headers that a policy may not set on its responses. Cookies, and what clears
// them, are those of the whole host, on which other tenants are at home too.
var reservedHeaders = append([]string{
	":*", "content-length", "date", "clear-site-data", "host", "server", "service-worker-allowed", "set-cookie", "set-cookie2", "x-envoy-*",
	strings.ToLower(decisionHeader),
}, hopHeaders...)

func checkPageHeader(name, value string, allowed []string) error {
	if !isToken(name) {
		return resultErrorf("%q is not the name of a header", name)
	}
	if strings.ContainsFunc(value, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }) || !utf8.ValidString(value) {
		return resultErrorf("the value of header %q has a control character, or is not UTF-8", name)
	}
	name = strings.ToLower(name)
	if matchesAny(reservedHeaders, name) && (isFraming(name) || !matchesAny(allowed, name)) {
		return resultErrorf("header %q may not be set by a policy", name)
	}
	return nil
}

// matchesAny reports whether a name in lower case is one of the patterns, which
// may end with "*".
func matchesAny(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		prefix, open := strings.CutSuffix(strings.ToLower(p), "*")
		return prefix == name || open && strings.HasPrefix(name, prefix)
	})
}

// sandbox keeps a page that a tenant wrote from being a page of our origin, on
// which other tenants are at home too.
const sandbox = "sandbox allow-downloads allow-forms allow-modals allow-popups allow-popups-to-escape-sandbox allow-scripts allow-top-navigation-by-user-activation"

func (p *page) write(w http.ResponseWriter) {
	h := w.Header()
	h.Set("Cache-Control", "no-store")
	h["Content-Type"] = nil // and none is guessed
	if p.kind != "" {
		h.Set("Content-Type", p.kind)
	}
	setHeaders(h, p.headers)
	h.Add("Content-Security-Policy", sandbox)
	h.Set("X-Content-Type-Options", "nosniff")
	if p.status == http.StatusNoContent || p.status == http.StatusNotModified {
		delete(h, "Content-Type")
		w.WriteHeader(p.status)
		return
	}
	h.Set("Content-Length", strconv.Itoa(len(p.body)))
	w.WriteHeader(p.status)
	_, _ = w.Write(p.body) // the client is gone
}
