package extauthz

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"mime"
	"mime/multipart"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// bodyReader reads the body of one request.
type bodyReader struct {
	terms   *termMaker
	http    *exchange
	headers pairs
	cancel  *policy.Cancel
	checks  bool // only that it can be read: nobody reads it

	descriptorFile string       // of the tenant; empty: gRPC bodies are not read
	descriptors    *Descriptors // from that file
}

// read returns the parsed body, or anything where it only checks that; nil where there is none or its type is not
// known, and reports whether the body is known to be incomplete.
func (r *bodyReader) read() (body *ast.Term, truncated bool, err error) {
	if r.cut() {
		return nil, true, nil
	}
	contentType, ok := r.headers.get("content-type")
	if !ok {
		return nil, false, nil
	}
	switch typeOf(contentType) {
	case typeJSON:
		body, truncated, err = r.text(r.json)
	case typeForm:
		body, truncated, err = r.text(r.form)
	case typeMultipart:
		body, truncated, err = r.text(r.multipart)
	case typeGRPC:
		body, truncated, err = r.grpc()
	}
	if errors.Is(err, policy.ErrCanceled) {
		return nil, false, policy.ErrCanceled // nobody waits any more; the body is not at fault
	}
	return body, truncated, err
}

// cut reports whether Envoy says that it sent a part of the body: it does, also
// where the length is not known in advance.
func (r *bodyReader) cut() bool { return r.headers.value("x-envoy-auth-partial-body") == "true" }

// missing reports whether less of the body is here than the request announces,
// whatever its type; all of it may be missing.
func (r *bodyReader) missing() bool {
	n, err := strconv.ParseInt(r.headers.value("content-length"), 10, 64)
	return r.cut() || err == nil && n > int64(r.size())
}

func (r *bodyReader) size() int { return r.http.bodySize() }

type bodyType int

const (
	typeOther bodyType = iota
	typeJSON
	typeGRPC
	typeForm
	typeMultipart
)

// typeOf returns what body a content type announces. The first that it contains
// counts; spelling matters but for JSON, which is also what ends in "+json".
func typeOf(contentType string) bodyType {
	switch {
	case strings.Contains(contentType, "application/json"):
		return typeJSON
	case strings.Contains(contentType, "application/grpc"):
		return typeGRPC
	case strings.Contains(contentType, "application/x-www-form-urlencoded"):
		return typeForm
	case strings.Contains(contentType, "multipart/form-data"):
		return typeMultipart
	case isJSON(contentType):
		return typeJSON
	}
	return typeOther
}

// isJSON reports whether a content type is JSON, in any spelling.
func isJSON(contentType string) bool {
	contentType = lower(contentType)
	if strings.Contains(contentType, "application/json") {
		return true
	}
	if strings.Contains(contentType, "application/grpc") { // its messages are framed
		return false
	}
	mediaType, _, _ := strings.Cut(contentType, ";")
	return strings.HasSuffix(strings.TrimRight(mediaType, " \t"), "+json")
}

// text reads a body that is not framed, if there is one and all of it is here.
func (r *bodyReader) text(parse func(string) (*ast.Term, error)) (body *ast.Term, truncated bool, err error) {
	text := r.http.body
	if text == "" {
		text = r.http.rawBody
	}
	if text == "" {
		return nil, false, nil
	}
	if length, ok := r.headers.get("content-length"); ok {
		n, err := strconv.ParseInt(length, 10, 64)
		if err != nil {
			return nil, false, fmt.Errorf("%w: content-length: %w", tenants.ErrInvalid, err)
		}
		if n > int64(len(text)) {
			return nil, true, nil
		}
	}
	if body, err = parse(text); err != nil {
		return nil, false, fmt.Errorf("%w: body: %w", tenants.ErrInvalid, err)
	}
	return body, false, nil
}

func (r *bodyReader) json(text string) (*ast.Term, error) {
	if r.checks {
		return ast.InternedEmptyObject, policy.CheckJSON(text, r.cancel)
	}
	v, err := policy.ParseJSON(text, r.cancel)
	if err != nil {
		return nil, err
	}
	return r.terms.of(v), nil
}

func (r *bodyReader) form(text string) (*ast.Term, error) {
	values, err := url.ParseQuery(text)
	if err != nil {
		return nil, err
	}
	lists := make(map[string][]*ast.Term, len(values))
	for name, list := range values {
		terms := make([]*ast.Term, len(list))
		for i, value := range list {
			terms[i] = r.terms.string(validUTF8(value))
		}
		lists[name] = terms
	}
	return r.fields(lists), nil
}

// multipart reads a form in parts. A part without a name is skipped, one that is
// JSON is parsed, any other is a string, also a file.
func (r *bodyReader) multipart(text string) (*ast.Term, error) {
	_, params, err := mime.ParseMediaType(r.headers.value("content-type"))
	if err != nil {
		return nil, err
	}
	boundary, ok := params["boundary"]
	if !ok {
		return nil, nil
	}
	lists := map[string][]*ast.Term{}
	for parts := multipart.NewReader(strings.NewReader(text), boundary); ; {
		part, err := parts.NextPart()
		if err == io.EOF { // and not wrapped: the end without a last boundary is an error
			return r.fields(lists), nil
		}
		if err != nil {
			return nil, err
		}
		name := part.FormName()
		if name == "" {
			continue
		}
		content, err := io.ReadAll(part)
		if err != nil {
			return nil, err
		}
		value := r.terms.of(nil)
		if isJSON(part.Header.Get("Content-Type")) {
			if value.Value, err = policy.ParseJSON(content, r.cancel); err != nil {
				return nil, err
			}
		} else {
			value.Value = ast.String(validUTF8(string(content)))
		}
		lists[name] = append(lists[name], value)
	}
}

// fields returns the object of a form: each name with all its values. Of names
// that differ only in bytes that are not UTF-8, the one that sorts last counts.
func (r *bodyReader) fields(lists map[string][]*ast.Term) *ast.Term {
	names := slices.Sorted(maps.Keys(lists))
	if i := slices.IndexFunc(names, func(s string) bool { return !utf8.ValidString(s) }); i >= 0 {
		clean := make(map[string][]*ast.Term, len(lists))
		for _, name := range names {
			clean[validUTF8(name)] = lists[name]
		}
		return r.fields(clean)
	}
	items := make([]item, len(names))
	for i, name := range names {
		items[i] = item{r.terms.string(name), r.terms.of(ast.NewArray(lists[name]...))}
	}
	return r.terms.object(items)
}

func (r *bodyReader) grpc() (body *ast.Term, truncated bool, err error) {
	if r.descriptorFile == "" || r.http.rawBody == "" {
		return nil, false, nil
	}
	if r.descriptors == nil {
		return nil, false, fmt.Errorf("descriptor set %q is not loaded", r.descriptorFile)
	}
	path, _, _ := strings.Cut(r.http.path, "?")
	segments, err := split(path)
	if err != nil || len(segments) != 2 {
		return nil, false, fmt.Errorf("%w: body: path of a gRPC call has %d segments", tenants.ErrInvalid, len(segments))
	}
	text, err := r.descriptors.messageJSON(segments[0], segments[1], []byte(r.http.rawBody))
	if errors.Is(err, errTruncated) {
		return nil, true, nil
	}
	if err == nil && text != nil {
		body, err = r.json(string(text))
	}
	if err != nil {
		return nil, false, fmt.Errorf("%w: body: %w", tenants.ErrInvalid, err)
	}
	return body, false, nil
}

// validUTF8 returns s with each byte that is not UTF-8 as U+FFFD.
func validUTF8(s string) string {
	if utf8.ValidString(s) {
		return s
	}
	return string([]rune(s))
}
