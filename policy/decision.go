package policy

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"unicode/utf8"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/topdown"
)

// Decision is the answer of a policy to one question, free of any transport.
// Its zero value is a denial.
//
// The fields are those of a decision object of opa-envoy-plugin. Fields that
// belong to the other outcome are left empty: Body and Status of an allowing
// decision, for example, are not even read. All its strings are valid UTF-8, no
// header has a CR, LF or NUL, and no number of Metadata is beyond a float64.
type Decision struct {
	// Allowed reports whether the request may pass.
	Allowed bool

	// Object reports whether the policy gave an object, not a bare boolean.
	// A bare boolean says nothing about headers, body or status.
	Object bool

	// Status is the HTTP status of a denial; 0 where the policy named none.
	Status int

	// Headers are set on the request when it is allowed, and on the response
	// when it is denied. A name that stands more than once has several values,
	// which stand next to each other.
	Headers []Header

	// Body is the body of a denial.
	Body string

	// The following change an allowed request or the response to it.
	RemoveHeaders   []string
	ResponseHeaders []Header
	SetQuery        []Header
	RemoveQuery     []string

	// Metadata is the policy's dynamic_metadata, nil where it gave none.
	Metadata ast.Object

	// Value is the whole result, as the policy gave it.
	Value ast.Value
}

// Header is one name with one value: of an HTTP header or a query parameter.
type Header struct{ Name, Value string }

// The faults of a decision. A denial is not a fault: it is a Decision. The
// errors that Decide returns wrap one of these.
var (
	// ErrUndefined: the entry point has no value for this input.
	ErrUndefined = errors.New("undefined decision")
	// ErrConflict: rules of the entry point gave different values.
	ErrConflict = errors.New("conflicting results")
	// ErrResult: the value is not a decision.
	ErrResult = errors.New("ill-typed result")
	// ErrEval: evaluation failed.
	ErrEval = errors.New("evaluation failed")
	// ErrCanceled: evaluation was stopped before it ended.
	ErrCanceled = errors.New("evaluation canceled")
	// ErrEntry: the policy was not compiled for this entry point.
	ErrEntry = errors.New("unknown entry point")
)

// faultError is an error of one class whose text is that of its cause alone.
type faultError struct {
	class error
	cause error
}

func (e *faultError) Error() string   { return e.cause.Error() }
func (e *faultError) Unwrap() []error { return []error{e.class, e.cause} }

// PlaceOf returns the file and the line of the policy at which an evaluation
// failed, like "authz.rego:12"; "" where the error names none.
func PlaceOf(err error) string {
	if e, ok := errors.AsType[*topdown.Error](err); ok && e.Location != nil && e.Location.File != "" {
		return fmt.Sprintf("%s:%d", e.Location.File, e.Location.Row)
	}
	return ""
}

func resultErrorf(format string, args ...any) error {
	return &faultError{ErrResult, fmt.Errorf(format, args...)}
}

// decisionOf reads a value as a decision: a boolean, or an object of the schema
// of opa-envoy-plugin. Only the fields of the object's outcome are read, others
// are ignored. The error wraps ErrResult.
func decisionOf(v ast.Value, rules *headerRules) (Decision, error) {
	switch v := v.(type) {
	case ast.Boolean:
		return Decision{Allowed: bool(v), Value: v}, nil
	case ast.Object:
		return objectDecision(v, rules)
	}
	return Decision{}, resultErrorf("failed to get response status: illegal value for policy evaluation result: %s", goType(v))
}

// The keys of a decision object.
var (
	keyAllowed         = ast.StringTerm("allowed")
	keyHeaders         = ast.StringTerm("headers")
	keyBody            = ast.StringTerm("body")
	keyStatus          = ast.StringTerm("http_status")
	keyMetadata        = ast.StringTerm("dynamic_metadata")
	keyRemoveHeaders   = ast.StringTerm("request_headers_to_remove")
	keyResponseHeaders = ast.StringTerm("response_headers_to_add")
	keySetQuery        = ast.StringTerm("query_parameters_to_set")
	keyRemoveQuery     = ast.StringTerm("query_parameters_to_remove")
)

func objectDecision(obj ast.Object, rules *headerRules) (Decision, error) {
	d := Decision{Object: true, Value: obj}
	allowed := valueAt(obj, keyAllowed)
	if allowed == nil {
		return Decision{}, resultErrorf(`failed to get response status: unable to determine evaluation result due to missing "allowed" key`)
	}
	b, ok := allowed.(ast.Boolean)
	if !ok {
		return Decision{}, resultErrorf("failed to get response status: type assertion error, expected allowed to be of type 'boolean' but got '%s'", goType(allowed))
	}
	d.Allowed = bool(b)

	var err error
	if d.Headers, err = headersOf(valueAt(obj, keyHeaders), rules); err != nil {
		return Decision{}, resultErrorf("failed to get response headers: %w", err)
	}
	if md := valueAt(obj, keyMetadata); md != nil {
		if d.Metadata, ok = md.(ast.Object); !ok {
			return Decision{}, resultErrorf("failed to get dynamic metadata: type assertion error, expected dynamic_metadata to be of type 'object' but got '%s'", goType(md))
		}
		if err := checkMetadata(md); err != nil {
			return Decision{}, resultErrorf("failed to get dynamic metadata: %w", err)
		}
	}
	if d.Allowed {
		err = d.readAllowed(obj, rules)
	} else {
		err = d.readDenied(obj)
	}
	if err != nil {
		return Decision{}, err
	}
	return d, nil
}

// readAllowed reads the fields that only an allowing decision has.
func (d *Decision) readAllowed(obj ast.Object, rules *headerRules) (err error) {
	if d.RemoveHeaders, err = stringsOf(valueAt(obj, keyRemoveHeaders), "request_headers_to_remove"); err != nil {
		return resultErrorf("failed to get request headers to remove: %w", err)
	}
	for _, name := range d.RemoveHeaders {
		if err := rules.check(name, ""); err != nil {
			return resultErrorf("failed to get request headers to remove: %w", err)
		}
	}
	if d.ResponseHeaders, err = headersOf(valueAt(obj, keyResponseHeaders), rules); err != nil {
		return resultErrorf("failed to get response headers to send to client: %w", err)
	}
	if d.RemoveQuery, err = stringsOf(valueAt(obj, keyRemoveQuery), "query_parameters_to_remove"); err != nil {
		return resultErrorf("failed to get request query parameters to remove: %w", err)
	}
	if d.SetQuery, err = queryOf(valueAt(obj, keySetQuery)); err != nil {
		return resultErrorf("failed to get request query parameters to set: %w", err)
	}
	return nil
}

// readDenied reads the fields that only a denying decision has.
func (d *Decision) readDenied(obj ast.Object) error {
	if body := valueAt(obj, keyBody); body != nil {
		s, ok := body.(ast.String)
		if !ok {
			return resultErrorf("failed to get response body: type assertion error, expected body to be of type 'string' but got '%s'", goType(body))
		}
		if !utf8.ValidString(string(s)) {
			return resultErrorf("failed to get response body: %w", errUTF8)
		}
		d.Body = string(s)
	}
	if status := valueAt(obj, keyStatus); status != nil {
		n, ok := status.(ast.Number)
		if !ok {
			return resultErrorf("failed to get response http status: type assertion error, expected http_status to be of type 'number' but got '%s'", goType(status))
		}
		code, err := strconv.ParseInt(string(n), 10, 64)
		if err != nil {
			return resultErrorf("failed to get response http status: error converting JSON number to int: %w", err)
		}
		if !validStatus(code) {
			return resultErrorf("failed to get response http status: invalid HTTP status code %d", code)
		}
		d.Status = int(code)
	}
	return nil
}

// validStatus reports whether a denial may have this HTTP status: those that
// opa-envoy-plugin takes, and 418, 425 and 451, which Envoy takes too.
func validStatus(code int64) bool {
	switch {
	case code == 100,
		200 <= code && code <= 208, code == 226,
		300 <= code && code <= 305, code == 307, code == 308,
		400 <= code && code <= 418, 421 <= code && code <= 426,
		code == 428, code == 429, code == 431, code == 451,
		500 <= code && code <= 508, code == 510, code == 511:
		return true
	}
	return false
}

// valueAt returns the value at key, or nil.
func valueAt(obj ast.Object, key *ast.Term) ast.Value {
	if t := obj.Get(key); t != nil {
		return t.Value
	}
	return nil
}

// headersOf reads an object from name to value or values, or a list of such
// objects, whose order is kept.
func headersOf(v ast.Value, rules *headerRules) ([]Header, error) {
	if v == nil {
		return nil, nil
	}
	if obj, ok := v.(ast.Object); ok {
		return appendHeaders(nil, obj, rules)
	}
	var headers []Header
	isList, err := each(v, func(elem ast.Value) (err error) {
		obj, ok := elem.(ast.Object)
		if !ok {
			return fmt.Errorf("type assertion error, expected headers to be of type 'object' but got '%s'", goType(elem))
		}
		headers, err = appendHeaders(headers, obj, rules)
		return err
	})
	if !isList {
		return nil, fmt.Errorf("type assertion error, expected headers to be of type 'object' but got '%s'", goType(v))
	}
	return headers, err
}

func appendHeaders(headers []Header, obj ast.Object, rules *headerRules) ([]Header, error) {
	headers = slices.Grow(headers, obj.Len())
	err := obj.Iter(func(k, v *ast.Term) error {
		name := keyText(k)
		add := func(value string) error {
			if err := rules.check(name, value); err != nil {
				return err
			}
			headers = append(headers, Header{name, value})
			return nil
		}
		if s, ok := v.Value.(ast.String); ok {
			return add(string(s))
		}
		isList, err := each(v.Value, func(elem ast.Value) error {
			s, ok := elem.(ast.String)
			if !ok {
				return fmt.Errorf("invalid value type %s for header '%s'", goType(elem), name)
			}
			return add(string(s))
		})
		if !isList {
			return fmt.Errorf("type assertion error for header '%s'", name)
		}
		return err
	})
	return headers, err
}

// queryOf reads an object from parameter to value or values.
func queryOf(v ast.Value) ([]Header, error) {
	if v == nil {
		return nil, nil
	}
	obj, ok := v.(ast.Object)
	if !ok {
		return nil, fmt.Errorf("type assertion error, expected query_parameters_to_set to be a map but got '%s'", goType(v))
	}
	var params []Header
	err := obj.Iter(func(k, v *ast.Term) error {
		name := keyText(k)
		add := func(value string) error {
			if !utf8.ValidString(name) || !utf8.ValidString(value) {
				return fmt.Errorf("query parameter %q: %w", name, errUTF8)
			}
			params = append(params, Header{name, value})
			return nil
		}
		if s, ok := v.Value.(ast.String); ok {
			return add(string(s))
		}
		isList, err := each(v.Value, func(elem ast.Value) error {
			s, ok := elem.(ast.String)
			if !ok {
				return fmt.Errorf("type assertion error: expected array element to be string but got '%s'", goType(elem))
			}
			return add(string(s))
		})
		if !isList {
			return fmt.Errorf("type assertion error, expected value to be string or array but got '%s'", goType(v.Value))
		}
		return err
	})
	return params, err
}

func stringsOf(v ast.Value, field string) ([]string, error) {
	if v == nil {
		return nil, nil
	}
	var list []string
	isList, err := each(v, func(elem ast.Value) error {
		s, ok := elem.(ast.String)
		if !ok {
			return fmt.Errorf("type assertion error, expected %s value to be of type 'string' but got '%s'", field, goType(elem))
		}
		if !utf8.ValidString(string(s)) {
			return fmt.Errorf("%s value: %w", field, errUTF8)
		}
		list = append(list, string(s))
		return nil
	})
	if !isList {
		return nil, fmt.Errorf("type assertion error, expected %s to be of type '[]string' but got '%s'", field, goType(v))
	}
	return list, err
}

// each calls f for each element of an array or set, in order, until f returns
// an error. It reports whether v is one.
func each(v ast.Value, f func(ast.Value) error) (bool, error) {
	switch v := v.(type) {
	case *ast.Array:
		return true, v.Iter(func(t *ast.Term) error { return f(t.Value) })
	case ast.Set:
		for _, t := range v.Slice() {
			if err := f(t.Value); err != nil {
				return true, err
			}
		}
		return true, nil
	}
	return false, nil
}

// errUTF8: a string of a decision that no message can carry.
var errUTF8 = errors.New("string is not valid UTF-8")

// checkMetadata returns an error for metadata that a protobuf Struct cannot
// hold: strings that are not UTF-8, numbers beyond a float64.
func checkMetadata(v ast.Value) (err error) {
	switch v := v.(type) {
	case ast.String:
		if !utf8.ValidString(string(v)) {
			return errUTF8
		}
	case ast.Number:
		if _, err := strconv.ParseFloat(string(v), 64); err != nil {
			return fmt.Errorf("number is out of range")
		}
	case ast.Object:
		return v.Iter(func(k, v *ast.Term) error {
			if err := checkMetadata(k.Value); err != nil {
				return err
			}
			return checkMetadata(v.Value)
		})
	default:
		_, err = each(v, checkMetadata)
	}
	return err
}

// keyText is the key of an object as it stands in JSON.
func keyText(k *ast.Term) string {
	if s, ok := k.Value.(ast.String); ok {
		return string(s)
	}
	return k.Value.String()
}

// goType names the Go type that JSON of v decodes to, as the error texts of
// opa-envoy-plugin have it.
func goType(v ast.Value) string {
	switch v.(type) {
	case ast.Null:
		return "<nil>"
	case ast.Boolean:
		return "bool"
	case ast.Number:
		return "json.Number"
	case ast.String:
		return "string"
	case ast.Object:
		return "map[string]interface {}"
	}
	return "[]interface {}"
}
