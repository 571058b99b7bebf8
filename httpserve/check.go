package httpserve

import (
	"context"
	"errors"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// decisionHeader names the decision in the answers whose body is not ours.
const decisionHeader = "X-Decision-Id"

// check is forward-auth: a proxy asks whether a request may pass, and 200 says
// that it may. The policy sees what it would see over gRPC.
//
// With 200 the headers of the answer are those that the policy sets on the
// request; those that it removes are named in x-envoy-auth-headers-to-remove, for
// Envoys. With anything else the answer is the one that the client is to get.
func (s *Server) check(w http.ResponseWriter, r *request) error {
	if s.inputs == nil {
		return errRoute
	}
	method, path, named, err := r.original()
	if err != nil {
		return err
	}
	body, err := s.plainBodyOf(r, bodyBytes(r.View.Settings))
	if err != nil {
		return err
	}
	defer body.release()
	c, err := r.checked(method, path, body)
	if err != nil {
		return err
	}
	if host := r.Header.Get("X-Forwarded-Host"); named && host != "" {
		if !isHost(host) {
			return invalidf("x-forwarded-host is not a host")
		}
		c.Host = host
	}
	c.PartialBody = len(c.Body) == 0 && mayHaveBody(method) && r.Header.Get("Content-Type") != ""

	q := r.question(r.Offers.Check, nil)
	q.Value, q.BodyBytes, q.RequestedBy = false, int64(len(c.Body)), ""
	q.Input = s.inputs(c, q.DecisionID)
	ctx := r.Context()
	if r.unready != nil { // it was waited for already
		gone, cancel := context.WithCancel(ctx)
		cancel()
		ctx = gone
	}
	a := tenants.Answer{Err: errNoAnswer}
	if err := s.pool.Decide(ctx, r.Tenant, []tenants.Question{q}, func(_ int, got tenants.Answer) { a = got }); err != nil {
		return err
	}
	w.Header().Set(decisionHeader, q.DecisionID)
	if a.Naming.On() {
		w = &namer{ResponseWriter: w, naming: a.Naming, id: q.DecisionID}
	}
	if err := answerCheck(w, &a); err != nil {
		if a.Naming.On() && a.Naming.Client {
			w.Header().Set(a.Naming.Header, q.DecisionID)
		}
		return err
	}
	return nil
}

// namer names the decision in a header of an answer to a proxy, just before the
// answer leaves: what the policy says in a header of this name is overwritten. Of
// the headers of a 200, proxies take some for the request and some for the client,
// as they are told; what is not for the request is named as one to remove.
type namer struct {
	http.ResponseWriter
	naming *tenants.Naming
	id     string
}

// WriteHeader sets the header.
func (n *namer) WriteHeader(status int) {
	h := n.Header()
	h.Del(n.naming.Header)
	allowed := status == http.StatusOK
	if n.naming.Client || allowed && n.naming.Upstream {
		h.Set(n.naming.Header, n.id)
	}
	if allowed {
		const remove = "X-Envoy-Auth-Headers-To-Remove"
		names := strings.FieldsFunc(h.Get(remove), func(r rune) bool { return r == ',' })
		names = slices.DeleteFunc(names, func(name string) bool { return strings.EqualFold(name, n.naming.Header) })
		if !n.naming.Upstream {
			names = append(names, n.naming.Header)
		}
		if h.Del(remove); len(names) > 0 {
			h.Set(remove, strings.Join(names, ","))
		}
	}
	n.ResponseWriter.WriteHeader(status)
}

// mayHaveBody reports whether a request of this method that has a content type
// has a body, which a proxy may have kept.
func mayHaveBody(method string) bool {
	return !slices.Contains([]string{http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace}, method)
}

// original returns the method and the path, with its query, of the request that a
// proxy asks about: what follows /check, or, where that is empty, what it names in
// headers. What is named both ways must be equal: a client could have named one of
// them.
func (r *request) original() (method, path string, named bool, err error) {
	path, ok := r.after("/check")
	if !ok {
		return "", "", false, errRoute
	}
	namedMethod, err := agreed(r.Header, "X-Forwarded-Method", "X-Original-Method")
	if err != nil {
		return "", "", false, err
	}
	namedPath, err := agreed(r.Header, "X-Forwarded-Uri", "X-Original-Uri")
	if err != nil {
		return "", "", false, err
	}
	method = r.Method
	path, query, hasQuery := strings.Cut(path, "?")
	if path != "" && hasQuery {
		path += "?" + query
	}
	if path == "" {
		_, namedQuery, _ := strings.Cut(namedPath, "?")
		switch {
		case namedPath == "":
			return "", "", false, invalidf("there is no path after /check, and neither x-forwarded-uri nor x-original-uri")
		case namedMethod == "":
			return "", "", false, invalidf("x-forwarded-uri or x-original-uri is there without x-forwarded-method or x-original-method")
		case hasQuery && query != namedQuery: // a proxy may leave the query where it was
			return "", "", false, invalidf("the query after /check is not the one that the headers name")
		}
		method, path, named = namedMethod, namedPath, true
	}
	switch {
	case namedPath != "" && namedPath != path:
		return "", "", false, invalidf("the path after /check is not the one that the headers name")
	case namedMethod != "" && namedMethod != method:
		return "", "", false, invalidf("the method is not the one that the headers name")
	case !isMethod(method):
		return "", "", false, invalidf("the method is not one of HTTP")
	case !isTarget(path):
		return "", "", false, invalidf("what is asked about is not a path with an optional query")
	case len(path) > maxPath:
		return "", "", false, errPath
	}
	return method, path, named, nil
}

// agreed returns the value that headers have which mean the same; "": there is
// none.
func agreed(h http.Header, names ...string) (value string, err error) {
	for _, name := range names {
		values := h.Values(name)
		if len(values) == 0 {
			continue
		}
		if len(values) > 1 || values[0] == "" || value != "" && value != values[0] {
			return "", invalidf("header %s is empty, or not the only one that says so", strings.ToLower(name))
		}
		value = values[0]
	}
	return value, nil
}

// plainBodyOf reads the body of a request as it stands, however it is encoded.
func (s *Server) plainBodyOf(r *request, limit int64) (*body, error) {
	b := &body{memory: &s.memory}
	if !hasBody(r.Request) {
		return b, nil
	}
	if r.ContentLength > limit {
		return nil, tooLarge(limit)
	}
	text, size, err := b.read(io.Reader(http.MaxBytesReader(nil, r.Body, limit)), r.ContentLength, limit)
	if err != nil {
		s.memory.release(size)
		return nil, bodyError(err, limit)
	}
	b.text, b.size = text, size
	return b, nil
}

// answerCheck writes an answer for a proxy.
func answerCheck(w http.ResponseWriter, a *tenants.Answer) error {
	if a.Err == nil {
		err := decided(w, a)
		if err == nil {
			return nil
		}
		a.Err = err
	}
	h := w.Header()
	if a.OnError == tenants.OnErrorAllow {
		plain(h)
		w.WriteHeader(http.StatusOK)
		return nil
	}
	return checkFailureOf(a.Err, a.OnError)
}

// plain takes out what our own pages have and other's do not: the answer is
// another's.
func plain(h http.Header) {
	for _, name := range []string{"Content-Security-Policy", "Cross-Origin-Resource-Policy", "Referrer-Policy"} {
		h.Del(name)
	}
	h.Set("Cache-Control", "no-store")
	h["Content-Type"] = nil // and none is guessed
}

// decided writes a decision. Its error, before which nothing was written, wraps
// policy.ErrResult: the decision has what no answer over HTTP can carry.
func decided(w http.ResponseWriter, a *tenants.Answer) error {
	d := &a.Decision
	if !d.Allowed && a.DryRun {
		d = &policy.Decision{Allowed: true}
	}
	if d.Allowed && len(d.SetQuery)+len(d.RemoveQuery) > 0 {
		return resultErrorf("query parameters cannot be changed in forward-auth")
	}
	headers := d.Headers
	if d.Allowed {
		for _, added := range d.ResponseHeaders {
			if !slices.ContainsFunc(d.Headers, func(h policy.Header) bool { return strings.EqualFold(h.Name, added.Name) }) {
				headers = append(slices.Clip(headers), added)
			}
		}
	}
	for _, one := range headers {
		if !isToken(one.Name) {
			return resultErrorf("%q is not the name of a header", one.Name)
		}
		if d.Allowed && isFraming(one.Name) {
			return resultErrorf("header %q would frame the answer", one.Name)
		}
	}
	h := w.Header()
	plain(h)
	if !d.Allowed && d.Body != "" {
		h.Set("Content-Type", "text/plain; charset=utf-8")
	}
	setHeaders(h, headers)
	if d.Allowed {
		if len(d.RemoveHeaders) > 0 {
			h.Set("X-Envoy-Auth-Headers-To-Remove", strings.Join(d.RemoveHeaders, ","))
		}
		w.WriteHeader(http.StatusOK)
		return nil
	}
	status := d.Status
	if status < 300 || status >= 500 { // what would let it in, at some proxies, is no denial
		status = http.StatusForbidden
	}
	h.Set("Content-Length", strconv.Itoa(len(d.Body)))
	w.WriteHeader(status)
	_, _ = io.WriteString(w, d.Body) // the client is gone, or the status has no body
	return nil
}

// isFraming reports whether a header says where an answer ends, which we say.
func isFraming(name string) bool {
	return strings.EqualFold(name, "Content-Length") || slices.Contains(hopHeaders, strings.ToLower(name))
}

// setHeaders sets headers, each with all its values, but for those that frame the
// answer.
func setHeaders(h http.Header, headers []policy.Header) {
	seen := make(map[string]bool, len(headers))
	for _, one := range headers {
		name := http.CanonicalHeaderKey(one.Name)
		if isFraming(name) {
			continue
		}
		if !seen[name] {
			h.Del(name)
			seen[name] = true
		}
		h.Add(name, one.Value)
	}
}

// checkStatuses are the statuses of faults in forward-auth, as over gRPC. The
// first that an error is counts; what else goes wrong is 500.
var checkStatuses = []struct {
	err    error
	status int
}{
	{tenants.ErrInvalid, http.StatusBadRequest},
	{tenants.ErrTooLarge, http.StatusRequestEntityTooLarge},
	{tenants.ErrPartialBody, http.StatusForbidden},
	{tenants.ErrEntry, http.StatusForbidden},
	{tenants.ErrNotLogged, http.StatusServiceUnavailable},
	{policy.ErrUndefined, http.StatusForbidden},
	{policy.ErrConflict, http.StatusForbidden},
	{policy.ErrResult, http.StatusForbidden},
	{tenants.ErrPanic, http.StatusInternalServerError},
	{tenants.ErrNotReady, http.StatusServiceUnavailable},
	{tenants.ErrBusy, http.StatusServiceUnavailable},
	{tenants.ErrDeadline, http.StatusServiceUnavailable},
	{context.DeadlineExceeded, http.StatusServiceUnavailable},
	{policy.ErrCanceled, http.StatusServiceUnavailable},
	{context.Canceled, http.StatusServiceUnavailable},
}

// upstreamError is a fault that is answered with 5xx also where route.closed.
type upstreamError struct{ *fault }

// Unwrap returns the fault.
func (e upstreamError) Unwrap() error { return e.fault }

// checkFailureOf returns how what went wrong is answered to a proxy. Where the
// tenant wants that the proxy's own failure mode decides, it is an error of the
// server's; else it is none, whatever the table says: see route.closed.
func checkFailureOf(err error, onError tenants.OnError) error {
	f := *failureOf(err)
	f.status = http.StatusInternalServerError
	for _, c := range checkStatuses {
		if errors.Is(err, c.err) {
			f.status = c.status
			break
		}
	}
	if onError == tenants.OnErrorUpstream {
		f.status = max(f.status, http.StatusInternalServerError)
		return upstreamError{&f}
	}
	return &f
}
