package decisionlog

import (
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
)

// Redacted is what stands in an event in the place of a secret. The place is in
// the event's masked list.
const Redacted = "**REDACTED**"

// What is hidden, where Config.Redact says so, wherever it stands in an event:
//
//   - the values of secret headers: of members that have such a name, and of the
//     objects with a key or name, and a value, that lists of headers have;
//   - the certificate of a source or destination;
//   - of nd_builtin_cache: arguments of io.jwt builtins, and the tokens they give;
//     of http.send, the body, the client's key and certificate, the credentials
//     and the query of the URL, the raw body of the answer, and members that have
//     the name of a credential; the environment in opa.runtime.

// secretHeader reports whether a header of this name is a credential or has one.
// Case does not matter.
func secretHeader(name string) bool {
	if len(name) == 0 {
		return false
	}
	switch name[0] | 0x20 {
	case 'a':
		return strings.EqualFold(name, "authorization")
	case 'c':
		return strings.EqualFold(name, "cookie")
	case 'p':
		return strings.EqualFold(name, "proxy-authorization")
	case 's':
		return strings.EqualFold(name, "set-cookie")
	case 'x':
		const amazon = "x-amz-"
		return strings.EqualFold(name, "x-api-key") || strings.EqualFold(name, "x-forwarded-client-cert") ||
			len(name) > len(amazon) && strings.EqualFold(name[:len(amazon)], amazon)
	}
	return false
}

// cachedSecrets are the members of what http.send was given and gave that are
// hidden, beside headers.
var cachedSecrets = []string{
	"raw_body", "tls_client_key", "tls_client_cert",
	"access_token", "refresh_token", "id_token", "client_secret", "client_assertion", "password", "api_key",
}

// hiding is what an encoder knows of where it is, where secrets are hidden.
type hiding struct {
	hide   bool
	frames []frame  // of the part of the event and what is open in it
	guard  guard    // of the next value
	skip   int      // objects and arrays that are open and not written
	masked []string // the pointers to what was hidden

	pointer  []byte            // room for one
	pointers map[string]string // :: pointer → itself, of some that were hidden before
}

// frame is an object or an array that is open, or a part of the event.
type frame struct {
	key    string // of the member that is written, or the part's name
	index  int    // of the element that is written
	array  bool
	header bool // an object that may be a header in a list: a key or name, and a value or values
	secret bool // and is one that is secret
}

// guard says what is to be done with a value.
type guard uint8

const (
	openly     guard = iota // nothing
	concealing              // it is that of a member that has the name of a secret
	hidden                  // it is that of a secret header in a list
	header                  // it is a header, if it is an object
)

// valueKind is what kind of value begins.
type valueKind uint8

const (
	plainValue  valueKind = iota // true, false or null, which are no secrets
	stringValue                  //
	objectValue                  //
	otherValue                   // a number or an array
)

// maxPointers and maxPointer bound how many pointers are kept, and how many bytes
// one of them has.
const (
	maxPointers = 256
	maxPointer  = 256
)

func (h *hiding) reset(hide bool) {
	h.hide, h.frames, h.guard, h.skip = hide, h.frames[:0], openly, 0
	clear(h.masked)
	h.masked = h.masked[:0]
}

// guardMember begins a member of the object that is open.
func (h *hiding) guardMember(key string) {
	n := len(h.frames)
	f := &h.frames[n-1]
	f.key = key
	switch {
	case f.secret && (key == "value" || key == "values" || key == "raw_value" || key == "rawValue"):
		h.guard = hidden
	case secretHeader(key):
		h.guard = concealing
	case key == "certificate" && n > 1 && !h.frames[n-2].array && (h.frames[n-2].key == "source" || h.frames[n-2].key == "destination"):
		h.guard = concealing
	case key == "header":
		h.guard = header
	default:
		h.guard = openly
	}
}

// admit reports whether a value that begins may be seen. One that may not is in
// the list of what is masked then. The text is that of a string.
func (h *hiding) admit(k valueKind, text string) bool {
	n := len(h.frames)
	if n == 0 {
		return true
	}
	f := &h.frames[n-1]
	if f.array {
		f.index++
		return true
	}
	switch h.guard {
	case openly:
		if f.header && k == stringValue && (f.key == "key" || f.key == "name") && secretHeader(text) {
			f.secret = true
		}
		return true
	case concealing:
		// What can be no secret is left, and so is an object that is not among
		// headers: it is no header, but has the name of one.
		if k == plainValue || k == objectValue && !(n > 1 && !h.frames[n-2].array && strings.Contains(strings.ToLower(h.frames[n-2].key), "header")) {
			h.guard = openly
			return true
		}
		if k == stringValue && text == Redacted { // and listed
			h.guard = openly
			return true
		}
	case hidden:
	default:
		return true
	}
	h.guard = openly
	h.note()
	return false
}

// enter goes into an object or an array that begins.
func (h *hiding) enter(array bool) {
	f := frame{array: array, index: -1}
	if n := len(h.frames); n > 0 && !array {
		f.header = h.guard == header || h.frames[n-1].array
	}
	h.guard = openly
	h.frames = append(h.frames, f)
}

// leave comes out of it.
func (h *hiding) leave() {
	h.frames = h.frames[:len(h.frames)-1]
}

// note puts the place of the value that begins in the list of what is masked.
func (h *hiding) note() {
	p := h.pointer[:0]
	for i := range h.frames {
		p = append(p, '/')
		if f := &h.frames[i]; f.array {
			p = strconv.AppendInt(p, int64(f.index), 10)
		} else {
			p = append(p, url.PathEscape(f.key)...)
		}
	}
	h.pointer = p
	h.noted(p)
}

// noted puts a pointer in the list of what is masked, unless it is there.
func (h *hiding) noted(p []byte) {
	for _, other := range h.masked {
		if other == string(p) {
			return
		}
	}
	pointer, ok := h.pointers[string(p)]
	if !ok {
		pointer = string(p)
		switch {
		case len(p) > maxPointer:
		case h.pointers == nil || len(h.pointers) >= maxPointers:
			h.pointers = map[string]string{pointer: pointer}
		default:
			h.pointers[pointer] = pointer
		}
	}
	h.masked = append(h.masked, pointer)
}

// ndCache writes an nd_builtin_cache. The keys of what it has of a builtin are the
// arguments of the call, which may be secret too: keys that become equal get a
// number.
func (e *encoder) ndCache(cache ast.Value) {
	obj, ok := cache.(ast.Object)
	if !ok || !e.hide {
		e.value(cache)
		return
	}
	e.open('{')
	obj.Foreach(func(k, v *ast.Term) {
		builtin := e.keyText(k.Value)
		e.key(builtin)
		e.guard = openly // it is the name of no header
		if calls, ok := v.Value.(ast.Object); ok {
			e.calls(builtin, calls)
		} else {
			e.value(v.Value) // a mask has put it there
		}
	})
	e.shut('}')
}

// calls writes what the cache has of one builtin.
func (e *encoder) calls(builtin string, calls ast.Object) {
	seen := map[string]int{}
	e.open('{')
	calls.Foreach(func(args, result *ast.Term) {
		hiddenArgs, changed := hideArgs(builtin, args.Value)
		value, alsoChanged := hideCached(builtin, result.Value)
		key := e.keyText(hiddenArgs)
		if seen[key]++; seen[key] > 1 {
			key += " " + strconv.Itoa(seen[key])
		}
		e.key(key)
		e.guard = openly
		if changed || alsoChanged {
			e.note()
		}
		e.value(value)
	})
	e.shut('}')
}

// hideArgs returns the arguments of a call without what is secret, and reports
// whether that changed them.
func hideArgs(builtin string, args ast.Value) (ast.Value, bool) {
	switch {
	case strings.HasPrefix(builtin, "io.jwt."):
		return ast.NewArray(ast.StringTerm(Redacted)), true
	case builtin != "http.send":
		return args, false
	}
	if _, ok := args.(ast.String); ok {
		return ast.String(Redacted), true // a text that would have to be parsed
	}
	return rewrite(args, func(key string, v ast.Value) (ast.Value, bool) {
		if key == "body" {
			return ast.String(Redacted), true
		}
		if s, ok := v.(ast.String); ok && key == "url" {
			return hideURL(string(s))
		}
		return hideMember(key, v)
	})
}

// hideCached returns what a call gave without what is secret, and reports whether
// that changed it.
func hideCached(builtin string, result ast.Value) (ast.Value, bool) {
	switch {
	case strings.HasPrefix(builtin, "io.jwt.encode"):
		return ast.String(Redacted), true
	case builtin == "opa.runtime":
		return rewrite(result, func(key string, v ast.Value) (ast.Value, bool) {
			if key == "env" {
				return ast.String(Redacted), true
			}
			return v, false
		})
	case builtin == "http.send":
		return rewrite(result, hideMember)
	}
	return result, false
}

// hideMember hides a member of what http.send was given or gave.
func hideMember(key string, v ast.Value) (ast.Value, bool) {
	_, null := v.(ast.Null)
	if !null && (secretHeader(key) || slices.Contains(cachedSecrets, strings.ToLower(key))) {
		return ast.String(Redacted), true
	}
	return v, false
}

// hideURL hides credentials and the query of a URL.
func hideURL(text string) (ast.Value, bool) {
	u, err := url.Parse(text)
	if err != nil {
		return ast.String(Redacted), true
	}
	query := u.RawQuery != ""
	if u.User == nil && !query {
		return ast.String(text), false
	}
	u.User, u.RawQuery, u.Fragment, u.RawFragment = nil, "", "", ""
	text = u.String()
	if query {
		text += "?" + Redacted
	}
	return ast.String(text), true
}

// rewrite returns v with each member of its objects as f gives it, and reports
// whether anything is another value. What f leaves is rewritten inside.
func rewrite(v ast.Value, f func(key string, v ast.Value) (ast.Value, bool)) (ast.Value, bool) {
	changed := false
	switch v := v.(type) {
	case ast.Object:
		pairs := make([][2]*ast.Term, 0, v.Len())
		v.Foreach(func(k, t *ast.Term) {
			value, other := t.Value, false
			if key, ok := k.Value.(ast.String); ok {
				value, other = f(string(key), value)
			}
			if !other {
				value, other = rewrite(value, f)
			}
			if other {
				changed = true
				t = ast.NewTerm(value)
			}
			pairs = append(pairs, ast.Item(k, t))
		})
		if changed {
			return ast.NewObject(pairs...), true
		}
	case *ast.Array:
		terms := slices.Collect(elements(v))
		for i, t := range terms {
			if value, other := rewrite(t.Value, f); other {
				changed = true
				terms[i] = ast.NewTerm(value)
			}
		}
		if changed {
			return ast.NewArray(terms...), true
		}
	case ast.Set:
		if value, other := rewrite(ast.NewArray(v.Slice()...), f); other {
			return value, true
		}
	}
	return v, false
}
