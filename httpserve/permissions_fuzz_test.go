package httpserve

import (
	"slices"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/policy"
)

// A catalogue is within its bounds, sorted, with each pair once, or refused; a
// list is, too.
func FuzzCatalogue(f *testing.F) {
	f.Add(`{"order": ["read", {"action": "cancel", "method": "DELETE", "path": "/orders/0"}], "x": []}`)
	f.Add(`{"order": ["a", "a"]}`)
	f.Add(`{"order": [{"action": "a", "method": "GET", "path": "/ b"}]}`)
	f.Add(`{"permissions": {"order": ["b", "a", "b"]}, "rules": [{"action": "a", "subject": ["x", "y"], "conditions": {}}]}`)
	f.Add(`{"permissions": {"order": []}, "rules": [{"action": [], "subject": "x"}]}`)
	f.Fuzz(func(t *testing.T, text string) {
		v, err := policy.ParseJSON([]byte(text), nil)
		if err != nil {
			return
		}
		if c, err := catalogueOf(v, 10); err == nil {
			if len(c.pairs) > 10 || c.size > maxCatalog || !slices.IsSortedFunc(c.pairs, comparePairs) {
				t.Errorf("%s is read as %+v", text, c.pairs)
			}
			n := 0
			for _, typed := range c.types() {
				n += len(typed.actions)
				for _, action := range typed.actions {
					p := c.find(typed.name, action)
					if p == nil || !isName(p.kind) || !isName(p.action) || p.request() && !isTarget(p.path) {
						t.Errorf("%s has %q %q: %+v", text, typed.name, action, p)
					}
				}
			}
			if n != len(c.pairs) {
				t.Errorf("%s: got %d actions in %d pairs", text, n, len(c.pairs))
			}
		} else if failureOf(err).code != codeCatalog {
			t.Errorf("%s: got %v", text, err)
		}
		l := &listing{state: "s", subject: text, kind: "user"}
		if err := l.read(v, 10); err != nil {
			if failureOf(err).code != codeList {
				t.Errorf("%s: got %v", text, err)
			}
			return
		}
		if err := l.finish(); err != nil {
			t.Fatal(err)
		}
		for _, w := range []want{{}, {casl: true}, {types: []string{"order"}}} {
			body, tag, err := l.render(w)
			if err != nil || tag == "" {
				t.Fatal(err)
			}
			if v, err := policy.ParseJSON(body, nil); err != nil || v.(ast.Object).Get(termSubject) == nil {
				t.Errorf("%s: got %s, %v", text, body, err)
			}
		}
	})
}

// Two callers have one key only if nothing that counts differs.
func FuzzListKey(f *testing.F) {
	f.Add("user", "alice", `{"roles": ["a"], "exp": 1}`, "user", "alice", `{"exp": 2, "roles": ["a"]}`, "h", "v")
	f.Add("user", "alice,5:x", `{}`, "user,5:alice", "x", `{"a": ";b=1"}`, "h", "v")
	f.Fuzz(func(t *testing.T, kindA, idA, claimsA, kindB, idB, claimsB, name, value string) {
		whoOf := func(kind, id, claims string) *who {
			v, err := policy.ParseJSON([]byte(claims), nil)
			obj, ok := v.(ast.Object)
			if err != nil || !ok {
				t.Skip()
			}
			return &who{caller: &Caller{Type: kind, Subject: id, Claims: obj}, identity: CheckedRequest{Headers: []policy.Header{{Name: name, Value: value}}}}
		}
		a, b := whoOf(kindA, idA, claimsA), whoOf(kindB, idB, claimsB)
		same := kindA == kindB && idA == idB
		for _, m := range []mode{{}, {token: true}, {identity: true}} {
			ka, _, errA := keyOf(a, m)
			kb, _, errB := keyOf(b, m)
			if errA != nil || errB != nil {
				return // a number that is none of JSON
			}
			ca, cb := a.caller.Claims, b.caller.Claims
			if !m.token {
				ca, cb = withoutTokenClaims(ca), withoutTokenClaims(cb)
			}
			if want := same && ca.Compare(cb) == 0; want != (ka == kb) && !looseEqual(ca, cb) {
				t.Errorf("%+v: %q %q %s and %q %q %s: got equal %t", m, kindA, idA, claimsA, kindB, idB, claimsB, ka == kb)
			}
		}
	})
}

// looseEqual reports whether two values are equal, or are written alike: numbers
// may be equal that are written otherwise, and then there are two keys.
func looseEqual(a, b ast.Value) bool {
	x, _ := appendValue(nil, a)
	y, _ := appendValue(nil, b)
	return a.Compare(b) == 0 || string(x) == string(y)
}

func withoutTokenClaims(obj ast.Object) ast.Object {
	rest := ast.NewObject()
	obj.Foreach(func(k, v *ast.Term) {
		if !slices.ContainsFunc(policy.TokenClaims(), func(name ast.Value) bool { return name.Compare(k.Value) == 0 }) {
			rest.Insert(k, v)
		}
	})
	return rest
}
