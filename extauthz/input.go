package extauthz

import (
	"fmt"
	"unicode/utf8"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/tenants"
)

// version says how an input was made.
var version = ast.ObjectTerm(
	item{intern("ext_authz"), intern("v3")},
	item{intern("encoding"), intern("protojson")},
)

// inputOf returns what of the input document of a request is needed. Its error
// wraps ErrInvalid or ErrTooLarge where the request is at fault: it is the same
// whatever is needed.
func inputOf(a *asked, decisionID string, needs tenants.Needs, descriptors map[string]*Descriptors) (ast.Value, error) {
	http := &a.http
	if n := http.bodySize(); int64(n) > needs.BodyBytes {
		return nil, fmt.Errorf("%w: body has %d bytes, limit %d", tenants.ErrTooLarge, n, needs.BodyBytes)
	}
	reads := needs.Reads()
	var t termMaker
	if reads.Whole {
		t.slab = maxSlab
	}
	path, query, err := t.path(http.path, reads.Of("parsed_path") != nil)
	if err != nil {
		return nil, fmt.Errorf("%w: path: %w", tenants.ErrInvalid, err)
	}
	parameters, err := t.query(query, reads.Of("parsed_query"))
	if err != nil {
		return nil, fmt.Errorf("%w: query: %w", tenants.ErrInvalid, err)
	}
	headers := headersOf(http)

	r := bodyReader{terms: &t, http: http, headers: headers, cancel: needs.Cancel, checks: reads.Of("parsed_body") == nil}
	if needs.WholeBody && r.missing() {
		return nil, fmt.Errorf("%w: a part of it is missing", tenants.ErrPartialBody)
	}
	var body *ast.Term
	var truncated bool
	if !needs.SkipBody {
		if needs.ProtoDescriptor != "" {
			r.descriptorFile, r.descriptors = needs.ProtoDescriptor, descriptors[needs.ProtoDescriptor]
		}
		if body, truncated, err = r.read(); err != nil {
			return nil, err
		}
		if needs.WholeBody && (truncated || body == nil && r.size() > 0) {
			return nil, fmt.Errorf("%w: it cannot be parsed", tenants.ErrPartialBody)
		}
		if body == nil {
			body = ast.InternedNullTerm
		}
	}

	var buf [7]item
	items := buf[:0]
	if reads.Of("version") != nil {
		items = append(items, item{keyVersion, version})
	}
	if path != nil {
		items = append(items, item{keyParsedPath, path})
	}
	if parameters != nil {
		items = append(items, item{keyParsedQuery, parameters})
	}
	if s := reads.Of("attributes"); s != nil && (a.there || decisionID != "") {
		items = append(items, item{keyAttributes, t.attributesSlice(s, a, headers, decisionID)})
	}
	if body != nil && reads.Of("parsed_body") != nil {
		items = append(items, item{keyParsedBody, body})
	}
	if body != nil && reads.Of("truncated_body") != nil {
		items = append(items, item{keyTruncatedBody, ast.InternedTerm(truncated)})
	}
	if reads.Of("source_principal") != nil {
		items = t.appendString(items, keySourcePrincipal, a.source.principal)
	}
	return t.object(items).Value, nil
}

// headersOf returns the headers of a request. Where there are none they are made
// from its header map, as Envoy would have: a name in lower case, the values of
// one name joined, each byte that is not UTF-8 as "!".
func headersOf(http *exchange) pairs {
	entries := http.headerMap.GetHeaders()
	if len(http.headers) > 0 || len(entries) == 0 {
		return http.headers
	}
	joined := make(joinedHeaders, len(entries))
	for _, h := range entries {
		value := h.GetRawValue()
		if len(value) == 0 {
			value = []byte(h.GetValue())
		}
		joined.add(h.GetKey(), value)
	}
	return joined.headers()
}

// joinedHeaders are headers whose values of one name are joined as Envoy does.
// They grow in place: a name may have very many values.
type joinedHeaders map[string][]byte // :: name in lower case → values

func (j joinedHeaders) add(name string, value []byte) {
	name = lower(name)
	all, ok := j[name]
	switch {
	case ok && name == "cookie":
		all = append(all, "; "...)
	case ok:
		all = append(all, ',')
	}
	if all = append(all, value...); all == nil {
		all = []byte{} // present, though empty
	}
	j[name] = all
}

func (j joinedHeaders) headers() pairs {
	headers := make(pairs, 0, len(j))
	for name, value := range j {
		headers = append(headers, pair{name, sanitize(value)})
	}
	return headers
}

// sanitize returns b as a string in which each byte that is not UTF-8 is "!".
func sanitize(b []byte) string {
	if utf8.Valid(b) {
		return string(b)
	}
	out := make([]byte, 0, len(b))
	for len(b) > 0 {
		r, n := utf8.DecodeRune(b)
		if r == utf8.RuneError && n == 1 {
			out = append(out, '!')
		} else {
			out = append(out, b[:n]...)
		}
		b = b[n:]
	}
	return string(out)
}

// lower returns s with ASCII letters in lower case.
func lower(s string) string {
	for i := range len(s) {
		if 'A' <= s[i] && s[i] <= 'Z' {
			b := []byte(s)
			for ; i < len(b); i++ {
				if 'A' <= b[i] && b[i] <= 'Z' {
					b[i] += 'a' - 'A'
				}
			}
			return string(b)
		}
	}
	return s
}
