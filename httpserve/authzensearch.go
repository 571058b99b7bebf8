package httpserve

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"net/http"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/control"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// search is one of AuthZEN's search APIs (section 8): the policy gives all
// entities of one kind for which an evaluation would be true.
type search struct {
	entity string // that is searched
	entry  func(*control.AuthZEN) string
}

var (
	searchSubjects  = search{entitySubject, func(a *control.AuthZEN) string { return a.Subjects }}
	searchResources = search{entityResource, func(a *control.AuthZEN) string { return a.Resources }}
	searchActions   = search{entityAction, func(a *control.AuthZEN) string { return a.Actions }}
)

func (k search) serve(s *Server, w http.ResponseWriter, r *request) error {
	obj, body, err := s.objectOf(r, bodyBytes(r.View.Settings))
	if err != nil {
		return err
	}
	defer body.release()
	if k.entity == entityAction { // there is none in such a request, and one that is there is ignored
		obj = without(obj, entityAction)
	}
	e, err := entitiesIn(obj)
	if err != nil {
		return err
	}
	if err := e.check(k.entity); err != nil {
		return err
	}
	for i, name := range entityNames {
		if name == k.entity && e[i] != nil {
			e[i] = without(e[i].(ast.Object), "id") // it must be ignored
		}
	}
	page, err := pageIn(obj)
	if err != nil {
		return err
	}
	entry := k.entry(r.Offers.AuthZEN)
	if !r.View.Has(entry) {
		return errRoute
	}
	q := r.question(entry, e)
	a, err := s.ask(r, &q)
	if err != nil && !errors.Is(err, errGuard) {
		return err
	}
	var results []*ast.Term
	if err == nil {
		if results, err = k.resultsOf(a.Decision.Value); err != nil {
			return err
		}
	}
	w.Header().Set(decisionHeader, q.DecisionID)
	out := newOutput()
	out.begin('{')
	if page != nil {
		input, _ := e.Input(tenants.Needs{})
		if results, err = page.write(out, results, k.entity, input, r.View.State); err != nil {
			return err
		}
	}
	out.name("results")
	if out.buf, err = appendElements(out.buf, len(results), func(i int) *ast.Term { return results[i] }); err != nil {
		return resultErrorf("results: %w", err)
	}
	out.end('}')
	if err := body.grow(int64(len(out.buf))); err != nil {
		return err
	}
	return out.send(w, r, http.StatusOK, false)
}

// without returns an object without one of its members.
func without(obj ast.Object, name string) ast.Object {
	key := ast.StringTerm(name)
	if obj.Get(key) == nil {
		return obj
	}
	rest := ast.NewObjectWithCapacity(obj.Len())
	obj.Foreach(func(k, v *ast.Term) {
		if !k.Equal(key) {
			rest.Insert(k, v)
		}
	})
	return rest
}

// resultsOf reads a value as a list of entities; nil: there are none. The error
// wraps policy.ErrResult.
func (k search) resultsOf(v ast.Value) (results []*ast.Term, err error) {
	switch v := v.(type) {
	case nil:
		return nil, nil
	case ast.Set:
		results = v.Slice()
	case *ast.Array:
		results = make([]*ast.Term, v.Len())
		for i := range results {
			results[i] = v.Elem(i)
		}
	default:
		return nil, resultErrorf("results are neither a set nor an array")
	}
	for _, t := range results {
		obj, ok := t.Value.(ast.Object)
		if !ok {
			return nil, resultErrorf("a result is not an object")
		}
		for _, field := range entityFields[k.entity] {
			if _, ok := member(obj, field).(ast.String); !ok {
				return nil, resultErrorf("%s of a result is not a string", field)
			}
		}
	}
	return results, nil
}

// resultPage is a part of the results that a client asks for (section 8.3). The
// token of the next one names where that begins, and for which request and
// revision: of another one the results would be others.
type resultPage struct {
	limit int
	token []byte // nil: the first page
}

// tokenSize is the size of a token: where the page begins, and a digest.
const tokenSize = 8 + sha256.Size

// errToken: a token is none of ours, or the policy has changed since.
var errToken = invalidf("page.token is not one of this request and revision: begin again without it")

// pageIn returns the page that a request asks for; nil: it asks for none.
func pageIn(obj ast.Object) (*resultPage, error) {
	v := member(obj, "page")
	if v == nil {
		return nil, nil
	}
	asked, ok := v.(ast.Object)
	if !ok {
		return nil, invalidf("page is not an object")
	}
	p := &resultPage{}
	switch limit := member(asked, "limit").(type) {
	case nil:
	case ast.Number:
		if p.limit, ok = limit.Int(); !ok || p.limit < 1 {
			return nil, invalidf("page.limit is not a whole number of at least 1")
		}
	default:
		return nil, invalidf("page.limit is not a number")
	}
	switch token := member(asked, "token").(type) {
	case nil:
	case ast.String:
		if token == "" { // as next_token is at the end
			break
		}
		var err error
		if p.token, err = base64.RawURLEncoding.DecodeString(string(token)); err != nil || len(p.token) != tokenSize {
			return nil, errToken
		}
	default:
		return nil, invalidf("page.token is not a string")
	}
	return p, nil
}

// write writes the member "page", and returns the results that are on it.
func (p *resultPage) write(o *output, results []*ast.Term, entity string, input ast.Value, state string) ([]*ast.Term, error) {
	request, err := appendValue([]byte(entity+"\n"+state+"\n"), input)
	if err != nil {
		return nil, resultErrorf("%w", err)
	}
	digest := sha256.Sum256(request)
	total, begin := len(results), 0
	if p.token != nil {
		at := binary.BigEndian.Uint64(p.token)
		if !bytes.Equal(p.token[8:], digest[:]) || at > uint64(total) {
			return nil, errToken
		}
		begin = int(at)
	}
	end := total
	if p.limit > 0 {
		end = min(end, begin+min(p.limit, total))
	}
	next := ""
	if end < total {
		next = base64.RawURLEncoding.EncodeToString(append(binary.BigEndian.AppendUint64(nil, uint64(end)), digest[:]...))
	}
	o.name("page")
	o.begin('{')
	o.string("next_token", next)
	o.int("count", int64(end-begin))
	o.int("total", int64(total))
	o.end('}')
	return results[begin:end], nil
}

// metadata is AuthZEN's description of what a tenant offers (section 9). It names
// the public address of the operator's file, and nothing that a client says.
func (s *Server) metadata(w http.ResponseWriter, r *request) error {
	if r.place.url == nil {
		return errAddress
	}
	base := r.place.url.String() + "/t/" + string(r.Tenant)
	a := r.Offers.AuthZEN
	out := newOutput()
	out.begin('{')
	out.string("policy_decision_point", base)
	for _, api := range []struct{ name, path, entry string }{
		{"access_evaluation_endpoint", "/access/v1/evaluation", a.Allow},
		{"access_evaluations_endpoint", "/access/v1/evaluations", a.Allow},
		{"search_subject_endpoint", "/access/v1/search/subject", a.Subjects},
		{"search_resource_endpoint", "/access/v1/search/resource", a.Resources},
		{"search_action_endpoint", "/access/v1/search/action", a.Actions},
	} {
		if api.entry == a.Allow || r.View.Has(api.entry) { // evaluation is required
			out.string(api.name, base+api.path)
		}
	}
	out.end('}')
	return out.send(w, r, http.StatusOK, false)
}

// errAddress: what names addresses cannot be given.
var errAddress = faultf(http.StatusNotFound, codeNotFound, "the public address is not known: http.url of the operator's file names it")
