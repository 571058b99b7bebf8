package httpserve

import (
	"bytes"
	"compress/gzip"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// Bounds of permission lists, beside those that a tenant's settings say.
const (
	maxTypes    = 1000             // of resources, in a catalogue or list
	maxActions  = 1000             // of one type
	maxName     = 256              // bytes of the name of a type or action
	maxTarget   = 2 << 10          // bytes of the path of an action
	maxCatalog  = 1 << 20          // bytes of all that a catalogue says
	maxList     = 1 << 20          // bytes of a list
	maxFiltered = 100              // values of ?resource=
	listTime    = 10 * time.Second // for a list to be computed
)

// permissionList answers what the caller may do: the actions of each type that
// are allowed, as JSON or as rules of CASL, each time from what is remembered
// if it is what the policy of this moment says.
func (s *Server) permissionList(w http.ResponseWriter, r *request) error {
	want, err := wantOf(r)
	if err != nil {
		return err
	}
	ctx, cancel := r.bounded(listTime)
	defer cancel()
	l, err := s.lists.get(ctx, r.View, whoOf(r))
	if err != nil {
		return err
	}
	body, tag, err := l.render(want)
	if err != nil {
		return err
	}
	return sendTagged(w, r, body, tag)
}

// permissionCatalog answers which types and actions there are.
func (s *Server) permissionCatalog(w http.ResponseWriter, r *request) error {
	ctx, cancel := r.bounded(listTime)
	defer cancel()
	c, err := s.lists.catalogue(ctx, r.Tenant, r.View)
	if err != nil {
		return err
	}
	if c.mode.rule {
		return errNoCatalog
	}
	out := newOutput()
	out.begin('{')
	out.string("tenant", string(r.Tenant))
	out.string("revision", c.revision)
	out.name("catalog")
	out.actions(c.types(), nil)
	out.end('}')
	out.buf = append(out.buf, '\n')
	return sendTagged(w, r, out.buf, tagOf(out.buf))
}

// errNoCatalog: the tenant's lists come from a rule.
var errNoCatalog = faultf(http.StatusNotFound, codeNotFound, "the tenant's policy has no catalogue")

// want is how a list is wanted.
type want struct {
	casl  bool
	types []string // nil: all
}

// wantOf reads the parameters of a list. Others are not read: nobody asks for
// another's list.
func wantOf(r *request) (want, error) {
	if r.URL.RawQuery == "" {
		return want{}, nil
	}
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return want{}, invalidf("the query of the URL cannot be parsed")
	}
	var w want
	switch formats := query["format"]; {
	case len(formats) > 1:
		return want{}, invalidf("format is there twice")
	case len(formats) == 0 || formats[0] == "map":
	case formats[0] == "casl":
		w.casl = true
	default:
		return want{}, invalidf("format is neither map nor casl")
	}
	w.types = query["resource"]
	if len(w.types) > maxFiltered {
		return want{}, invalidf("resource is there more than %d times", maxFiltered)
	}
	return w, nil
}

// has reports whether a type is one that is wanted.
func (w *want) has(name string) bool { return w.types == nil || slices.Contains(w.types, name) }

// render returns the list as it is wanted, and the entity tag of that.
func (l *listing) render(w want) (body []byte, tag string, err error) {
	if !w.casl && w.types == nil {
		return l.body, l.tag, nil
	}
	body = l.text(w)
	return body, tagOf(body), nil
}

// text writes the list.
func (l *listing) text(w want) []byte {
	out := newOutput()
	out.begin('{')
	out.string("version", l.version)
	out.string("tenant", string(l.tenant))
	out.name("subject")
	out.begin('{')
	out.string("type", l.kind)
	out.string("id", l.subject)
	out.end('}')
	out.string("revision", l.revision)
	out.member("incomplete", strconv.AppendBool(nil, l.incomplete()))
	if l.incomplete() {
		out.name("reasons")
		out.reasons(l.reasons, &w)
	}
	if w.casl {
		out.name("rules")
		out.rules(l, &w)
	} else {
		out.name("permissions")
		out.actions(l.types, &w)
	}
	out.end('}')
	return append(out.buf, '\n')
}

// actions writes {type: [actions]}.
func (o *output) actions(types []typed, w *want) {
	o.begin('{')
	for _, t := range types {
		if w != nil && !w.has(t.name) {
			continue
		}
		o.name(t.name)
		o.begin('[')
		for _, action := range t.actions {
			o.next()
			o.buf = appendString(o.buf, action)
		}
		o.end(']')
	}
	o.end('}')
}

// reasons writes {type: {action: code}}.
func (o *output) reasons(reasons []reason, w *want) {
	o.begin('{')
	for i := 0; i < len(reasons); {
		name := reasons[i].name
		if !w.has(name) {
			i++
			continue
		}
		o.name(name)
		o.begin('{')
		for ; i < len(reasons) && reasons[i].name == name; i++ {
			o.string(reasons[i].action, reasons[i].code)
		}
		o.end('}')
	}
	o.end('}')
}

// rules writes rules as CASL has them: those that the policy gives, or one for
// each type.
func (o *output) rules(l *listing, w *want) {
	o.begin('[')
	if l.rules != nil {
		for _, rule := range l.rules {
			if slices.ContainsFunc(rule.subjects, w.has) {
				o.next()
				o.buf = append(o.buf, rule.text...)
			}
		}
		o.end(']')
		return
	}
	for _, t := range l.types {
		if !w.has(t.name) {
			continue
		}
		o.next()
		o.begin('{')
		o.name("action")
		o.begin('[')
		for _, action := range t.actions {
			o.next()
			o.buf = appendString(o.buf, action)
		}
		o.end(']')
		o.string("subject", t.name)
		o.end('}')
	}
	o.end(']')
}

// permissionCheck answers about single resources: {"items": [{"action",
// "resource"}]} with {"results": [bool]}. The subject is the caller.
func (s *Server) permissionCheck(w http.ResponseWriter, r *request) error {
	body, err := s.bodyOf(r, r.Offers.Batch.Bytes)
	if err != nil {
		return err
	}
	defer body.release()
	items, err := checkItemsOf(r, body)
	if err != nil {
		return err
	}
	ctx, cancel := r.bounded(r.Offers.Batch.Time)
	defer cancel()
	results, failed, err := s.lists.check(ctx, r.View, whoOf(r), items)
	if err != nil {
		return err
	}
	out := newOutput()
	out.begin('{')
	out.name("results")
	out.begin('[')
	for _, ok := range results {
		out.next()
		out.buf = strconv.AppendBool(out.buf, ok)
	}
	out.end(']')
	if failed {
		out.member("incomplete", []byte("true"))
	}
	out.end('}')
	return out.send(w, r, http.StatusOK, false)
}

// checkItem is a question about a type, or about one resource of it.
type checkItem struct {
	action, kind string
	id           *ast.Term // nil: it is about the type
}

// checkItemsOf reads the items of a check.
func checkItemsOf(r *request, body *body) ([]checkItem, error) {
	m, err := membersOf(body.text, "items")
	if err != nil {
		return nil, err
	}
	text := m["items"]
	if text == nil || text[0] != '[' {
		return nil, invalidf("items is not a list")
	}
	if err := body.grow(valueFactor * int64(len(text))); err != nil {
		return nil, err
	}
	v, err := policy.ParseJSON(text, nil)
	if err != nil {
		return nil, invalidf("items has an object with one key twice, or a number that is out of range")
	}
	list, ok := v.(*ast.Array)
	if !ok {
		return nil, invalidf("items is not a list")
	}
	if limit := r.Offers.Batch.Items; list.Len() > limit {
		return nil, faultf(http.StatusRequestEntityTooLarge, codeTooLarge, "items has more than %d items", limit)
	}
	items := make([]checkItem, list.Len())
	for i := range items {
		obj, ok := list.Elem(i).Value.(ast.Object)
		if !ok {
			return nil, invalidf("items[%d] is not an object", i)
		}
		if items[i].action, ok = nameIn(obj.Get(termAction), termName); !ok {
			return nil, invalidf("items[%d].action is not a name of 1 to %d bytes", i, maxName)
		}
		resource := obj.Get(termResource)
		if items[i].kind, ok = nameIn(resource, termType); !ok {
			return nil, invalidf("items[%d].resource has no type that is a name of 1 to %d bytes", i, maxName)
		}
		if of, ok := resource.Value.(ast.Object); ok {
			id := of.Get(termID)
			if id != nil {
				if s, ok := id.Value.(ast.String); !ok || len(s) > maxSubject {
					return nil, invalidf("items[%d].resource.id is not a text of at most %d bytes", i, maxSubject)
				}
			}
			items[i].id = id
		}
	}
	return items, nil
}

// nameIn returns the name that a term is, or that it has as a member.
func nameIn(t, key *ast.Term) (string, bool) {
	if t == nil {
		return "", false
	}
	if obj, ok := t.Value.(ast.Object); ok {
		if t = obj.Get(key); t == nil {
			return "", false
		}
	}
	s, ok := t.Value.(ast.String)
	return string(s), ok && isName(string(s))
}

// isName reports whether s can name a type or an action.
func isName(s string) bool {
	return s != "" && len(s) <= maxName && !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f })
}

// sendTagged sends a body, or says that the client has it already. Each caller has
// an answer of its own, which no cache may give to another: it is stored by the
// caller's own browser alone, and asked about each time (RFC 9111 section 5.2.2).
func sendTagged(w http.ResponseWriter, r *request, body []byte, tag string) error {
	h := w.Header()
	h.Set("Cache-Control", "private, no-cache")
	h.Add("Vary", "Authorization, Cookie, Accept-Encoding")
	if headers := r.Offers.Auth.Headers; headers != nil {
		for _, name := range []string{headers.Subject, headers.Payload} {
			if name != "" {
				h.Add("Vary", name)
			}
		}
	}
	if r.Caller != nil && !r.Caller.Expiry.IsZero() {
		h.Set("Expires", r.Caller.Expiry.UTC().Format(http.TimeFormat))
	}
	zipped := len(body) >= minGzip && acceptsGzip(r.Request)
	// What is compressed is another representation, and has a tag of its own.
	plainTag, zippedTag := `"`+tag+`"`, `"`+tag+`-gzip"`
	own := plainTag
	if zipped {
		own = zippedTag
	}
	for _, match := range []string{own, plainTag, zippedTag} {
		if matches(r.Header.Values("If-None-Match"), match) {
			h.Set("ETag", match)
			w.WriteHeader(http.StatusNotModified)
			return nil
		}
	}
	h.Set("ETag", own)
	h.Set("Content-Type", "application/json")
	if zipped {
		text, err := gzipped(body)
		if err != nil {
			return err
		}
		h.Set("Content-Encoding", "gzip")
		body = text
	}
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(http.StatusOK)
	_, _ = w.Write(body) // the client is gone
	return nil
}

// matches reports whether lists of entity tags have one, compared weakly (RFC 9110
// section 13.1.2).
func matches(lists []string, tag string) bool {
	for _, list := range lists {
		for one := range strings.SplitSeq(list, ",") {
			one = strings.TrimSpace(one)
			if one == "*" || strings.TrimPrefix(one, "W/") == tag {
				return true
			}
		}
	}
	return false
}

// identity returns what a proxy that enforces would see of who asks: the
// credential that was verified, and nothing else that the client has sent.
func (r *request) identity() CheckedRequest {
	c := CheckedRequest{Host: r.Host}
	add := func(name, value string) {
		if name != "" && value != "" {
			c.Headers = append(c.Headers, policy.Header{Name: strings.ToLower(name), Value: value})
		}
	}
	auth := &r.Offers.Auth
	switch r.Caller.Kind {
	case ByPeer:
		c.Principal = r.Caller.Subject
	case ByJWT, ByToken:
		add("authorization", r.Header.Get("Authorization"))
		if auth.JWT != nil && auth.JWT.Cookie != "" {
			if value, err := cookieOf(r.Request, auth.JWT.Cookie); err == nil && value != "" {
				add("cookie", auth.JWT.Cookie+"="+value)
			}
		}
	}
	if auth.Headers != nil && r.place.trusted.has(r.Request) {
		for _, name := range []string{auth.Headers.Subject, auth.Headers.Payload} {
			add(name, r.Header.Get(name))
		}
	}
	slices.SortStableFunc(c.Headers, func(a, b policy.Header) int { return strings.Compare(a.Name, b.Name) })
	return c
}

// question returns a question about who.
func (w *who) question() tenants.Question {
	q := w.asked
	q.DecisionID = tenants.NewDecisionID()
	return q
}

// gzipped compresses a body.
func gzipped(body []byte) ([]byte, error) {
	var b bytes.Buffer
	zw, _ := gzip.NewWriterLevel(&b, gzip.BestSpeed) // a level that there is
	if _, err := zw.Write(body); err != nil {
		return nil, err
	}
	if err := zw.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// member writes a member whose value is a JSON text.
func (o *output) member(name string, text []byte) {
	o.name(name)
	o.buf = append(o.buf, text...)
}
