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

// guarded writes the value of a member, with what is secret in it hidden. path
// leads to the member.
func (e *encoder) guarded(key string, v ast.Value) {
	switch {
	case secretHeader(key):
		e.conceal(v)
	case key == "certificate" && e.under("source", "destination"):
		e.conceal(v)
	case key == "header":
		if obj, ok := v.(ast.Object); ok {
			e.pair(obj)
			return
		}
		e.value(v)
	default:
		e.value(v)
	}
}

// under reports whether the member that path leads to is in an object that is
// itself a member of one of these names.
func (e *encoder) under(names ...string) bool {
	n := len(e.path)
	return n > 1 && e.path[n-2].index < 0 && slices.Contains(names, e.path[n-2].key)
}

// conceal writes a value that is a secret. What can be none is left, and so is an
// object that is not among headers: it is no header, but has the name of one.
func (e *encoder) conceal(v ast.Value) {
	switch v := v.(type) {
	case ast.Null, ast.Boolean:
		e.value(v)
		return
	case ast.String:
		if v == Redacted {
			e.value(v) // and listed
			return
		}
	case ast.Object:
		if n := len(e.path); n < 2 || !strings.Contains(strings.ToLower(e.path[n-2].key), "header") {
			e.value(v)
			return
		}
	}
	e.buf = appendString(e.buf, Redacted)
	e.note()
}

// note puts where path leads to in the list of what is masked.
func (e *encoder) note() {
	var b strings.Builder
	for _, s := range e.path {
		b.WriteByte('/')
		if s.index >= 0 {
			b.WriteString(strconv.Itoa(s.index))
		} else {
			b.WriteString(url.PathEscape(s.key))
		}
	}
	if pointer := b.String(); !slices.Contains(e.masked, pointer) {
		e.masked = append(e.masked, pointer)
	}
}

var (
	keyTerm  = ast.StringTerm("key")
	nameTerm = ast.StringTerm("name")
)

// pair writes an object that may be a header in a list: a key or name, and a
// value or values.
func (e *encoder) pair(obj ast.Object) {
	if !isSecretName(obj.Get(keyTerm)) && !isSecretName(obj.Get(nameTerm)) {
		e.value(obj)
		return
	}
	e.buf = append(e.buf, '{')
	obj.Foreach(func(k, v *ast.Term) {
		key := e.keyText(k.Value)
		e.name(key)
		e.path = append(e.path, step{key, -1})
		switch key {
		case "value", "values", "raw_value", "rawValue":
			e.buf = appendString(e.buf, Redacted)
			e.note()
		default:
			e.guarded(key, v.Value)
		}
		e.path = e.path[:len(e.path)-1]
	})
	e.buf = append(e.buf, '}')
}

func isSecretName(t *ast.Term) bool {
	if t == nil {
		return false
	}
	name, ok := t.Value.(ast.String)
	return ok && secretHeader(string(name))
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
	e.buf = append(e.buf, '{')
	obj.Foreach(func(k, v *ast.Term) {
		builtin := e.keyText(k.Value)
		e.name(builtin)
		e.path = append(e.path, step{builtin, -1})
		if calls, ok := v.Value.(ast.Object); ok {
			e.calls(builtin, calls)
		} else {
			e.value(v.Value) // a mask has put it there
		}
		e.path = e.path[:len(e.path)-1]
	})
	e.buf = append(e.buf, '}')
}

// calls writes what the cache has of one builtin.
func (e *encoder) calls(builtin string, calls ast.Object) {
	seen := map[string]int{}
	e.buf = append(e.buf, '{')
	calls.Foreach(func(args, result *ast.Term) {
		hiddenArgs, changed := hideArgs(builtin, args.Value)
		value, alsoChanged := hideCached(builtin, result.Value)
		key := e.keyText(hiddenArgs)
		if seen[key]++; seen[key] > 1 {
			key += " " + strconv.Itoa(seen[key])
		}
		e.name(key)
		e.path = append(e.path, step{key, -1})
		if changed || alsoChanged {
			e.note()
		}
		e.value(value)
		e.path = e.path[:len(e.path)-1]
	})
	e.buf = append(e.buf, '}')
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
