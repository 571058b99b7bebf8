package httpserve

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// fault is an error whose text is meant for the client: it names the field and
// the bound, and has nothing of a parser's text in it.
type fault struct {
	status  int
	code    string
	message string

	challenge string        // WWW-Authenticate; "": none
	retry     time.Duration // Retry-After; 0: none
}

func (f *fault) Error() string { return f.message }

// faultf returns a fault of a request.
func faultf(status int, code, format string, args ...any) *fault {
	return &fault{status: status, code: code, message: fmt.Sprintf(format, args...)}
}

// invalidf returns a fault of what was sent: 400.
func invalidf(format string, args ...any) *fault {
	return faultf(http.StatusBadRequest, codeInvalid, format, args...)
}

// The codes of errors: those of OPA where it has one.
const (
	codeInvalid      = "invalid_parameter"
	codeInternal     = "internal_error"
	codeNotFound     = "resource_not_found"
	codeUnauthorized = "unauthorized"
	codeForbidden    = "forbidden"
	codeMethod       = "method_not_allowed"
	codeTooLarge     = "request_too_large"
	codeContent      = "unsupported_media_type"
	codeMisdirected  = "misdirected_request"
	codeUnavailable  = "unavailable"
	codeBusy         = "busy"
	codeDeadline     = "deadline_exceeded"
	codeEvaluation   = "evaluation_error"
	codeUndefined    = "undefined_document"
)

// The faults of requests that reach no policy.
var (
	errRoute    = faultf(http.StatusNotFound, codeNotFound, "there is nothing at this path")
	errTenant   = faultf(http.StatusNotFound, codeNotFound, "there is no such tenant")
	errMethod   = faultf(http.StatusMethodNotAllowed, codeMethod, "this path takes other methods")
	errPath     = faultf(http.StatusRequestURITooLong, codeTooLarge, "path and query are larger than %d bytes", maxPath)
	errTooLarge = faultf(http.StatusRequestEntityTooLarge, codeTooLarge, "body is too large")
	errMemory   = &fault{http.StatusServiceUnavailable, codeBusy, "too many bodies are being answered", "", time.Second}
	errPeer     = faultf(http.StatusForbidden, codeForbidden, "only trusted peers may ask here")
	errOpen     = faultf(http.StatusForbidden, codeForbidden, "the tenant does not say who may ask it")
	errOrigin   = faultf(http.StatusForbidden, codeForbidden, "the origin of the request may not ask this tenant")
	errHost     = faultf(http.StatusMisdirectedRequest, codeMisdirected, "ask for localhost or an address")
)

// failures says how what went wrong is answered. The first that an error is
// counts.
var failures = []struct {
	err error
	fault
}{
	{tenants.ErrInvalid, fault{http.StatusBadRequest, codeInvalid, "the request cannot be parsed", "", 0}},
	{tenants.ErrTooLarge, fault{http.StatusRequestEntityTooLarge, codeTooLarge, "the request is too large", "", 0}},
	{tenants.ErrPartialBody, fault{http.StatusForbidden, codeForbidden, "the body is not whole", "", 0}},
	{tenants.ErrUnknown, *errTenant},
	{tenants.ErrEntry, *errRoute},
	{policy.ErrUndefined, fault{http.StatusInternalServerError, codeUndefined, "the policy says nothing about this", "", 0}},
	{policy.ErrEntry, fault{http.StatusInternalServerError, codeUndefined, "the policy says nothing about this", "", 0}},
	{policy.ErrConflict, fault{http.StatusInternalServerError, codeInternal, "rules of the policy give different values", "", 0}},
	{policy.ErrResult, fault{http.StatusInternalServerError, codeInternal, "the policy gives a value of another type", "", 0}},
	{tenants.ErrNotLogged, fault{http.StatusServiceUnavailable, codeUnavailable, "the decision cannot be logged", "", time.Second}},
	{tenants.ErrNotReady, fault{http.StatusServiceUnavailable, codeUnavailable, "the tenant is not ready", "", time.Second}},
	{tenants.ErrBusy, fault{http.StatusTooManyRequests, codeBusy, "the tenant is busy", "", time.Second}},
	{tenants.ErrDeadline, fault{http.StatusServiceUnavailable, codeDeadline, "no decision in time", "", time.Second}},
	{context.DeadlineExceeded, fault{http.StatusServiceUnavailable, codeDeadline, "no decision in time", "", time.Second}},
	{policy.ErrCanceled, fault{http.StatusServiceUnavailable, codeDeadline, "no decision in time", "", time.Second}},
	{context.Canceled, fault{http.StatusServiceUnavailable, codeDeadline, "no decision in time", "", time.Second}},
	{tenants.ErrPanic, fault{http.StatusInternalServerError, codeInternal, "internal error", "", 0}},
	{policy.ErrEval, fault{http.StatusInternalServerError, codeInternal, "error(s) occurred while evaluating query", "", 0}},
}

// failureOf returns how an error is answered: as itself if it is a fault, by the
// table, or as an error of ours.
func failureOf(err error) *fault {
	if f, ok := errors.AsType[*fault](err); ok {
		return f
	}
	for i := range failures {
		if errors.Is(err, failures[i].err) {
			return &failures[i].fault
		}
	}
	return &fault{status: http.StatusInternalServerError, code: codeInternal, message: "internal error"}
}

// form is how a route's errors look.
type form int

const (
	ownForm form = iota // {"error": {"code", "message"}}
	opaForm             // {"code", "message"}, as OPA's
)

// write writes the fault as the answer.
func (f *fault) write(w http.ResponseWriter, form form) {
	body := struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	}{f.code, f.message}
	var text []byte
	if form == opaForm {
		text, _ = json.Marshal(body) // strings
	} else {
		text, _ = json.Marshal(map[string]any{"error": body})
	}
	h := w.Header()
	if f.challenge != "" {
		h.Set("WWW-Authenticate", f.challenge)
	}
	if f.retry > 0 {
		h.Set("Retry-After", strconv.Itoa(int(max(f.retry, time.Second)/time.Second)))
	}
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", "no-store")
	h.Set("Content-Length", strconv.Itoa(len(text)+1))
	w.WriteHeader(f.status)
	_, _ = w.Write(append(text, '\n')) // the client is gone
}
