package control

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/gatehouse-authz/gatehouse/bundles"
)

// Status says where a tenant's status goes: to a service, to standard output, or
// to both.
type Status struct {
	Console bool // one line each

	// Service identifies the service; empty: there is none.
	Service string
	// Manual has the status sent only when somebody asks for a refresh.
	Manual bool

	url       string
	header    http.Header
	authorize func(*http.Request) error
	client    *http.Client
}

// Equal reports whether two say the same.
func (s *Status) Equal(other *Status) bool {
	if s == nil || other == nil {
		return s == other
	}
	return s.Console == other.Console && s.Service == other.Service && s.Manual == other.Manual
}

// statusTime bounds the sending of one status.
const statusTime = 10 * time.Second

// Send sends a status, in JSON, to the service. An error of the service's own is
// a *bundles.StatusError.
func (s *Status) Send(ctx context.Context, message []byte) error {
	ctx, cancel := context.WithTimeout(ctx, statusTime)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.url, bytes.NewReader(message))
	if err != nil {
		return errors.New("status: the URL of the service is none")
	}
	for name, values := range s.header {
		req.Header[name] = values
	}
	req.Header.Set("Content-Type", "application/json")
	bundles.Trace(req)
	if s.authorize != nil {
		if err := s.authorize(req); err != nil {
			return fmt.Errorf("status: authorizing the request: %w", err)
		}
		req.Body = io.NopCloser(bytes.NewReader(message)) // who signs it may have read it
	}
	resp, err := s.client.Do(req)
	if err != nil {
		if e, ok := errors.AsType[*url.Error](err); ok {
			err = e.Err // the URL may have a secret in its query
		}
		return fmt.Errorf("status: %w", err)
	}
	defer resp.Body.Close()
	bundles.Traced(ctx, resp)
	_, _ = io.CopyN(io.Discard, resp.Body, maxStatusAnswer) // so that the connection is used again
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("status: %w", &bundles.StatusError{
			Code: resp.StatusCode, RetryAfter: bundles.RetryAfter(resp.Header.Get("Retry-After")),
		})
	}
	return nil
}

// maxStatusAnswer bounds what is read of an answer, in bytes.
const maxStatusAnswer = 64 << 10

func (r *reader) status(o object, services map[string]service, t *Tenant) {
	if !o.has("status") {
		return
	}
	s := o.object("status")
	if s.has("plugin") {
		r.fault(s.at("plugin"), "not supported: plugins of one's own")
	}
	if s.bool("prometheus") {
		r.note(s.at("prometheus"), "has no effect: the metrics of all tenants are at /metrics")
	}
	s.value("prometheus_config")
	t.Status = &Status{Console: s.bool("console"), Manual: r.trigger(s) == "manual"}
	partition := s.string("partition_name", "")
	if s.has("service") || !t.Status.Console && !s.bool("prometheus") {
		if service, ok := r.serviceOf(s, services); ok {
			t.Status.Service = identity(service.identity, partition)
			t.Status.url = service.at("status", partition)
			t.Status.header, t.Status.authorize = service.config.Header, service.config.Authorize
			t.Status.client = noRedirects(service.config.Client)
		}
	}
	t.Status = statuses.get(identity(t.Status.Console, t.Status.Manual, t.Status.Service), t.Status)
	s.end()
}

// at returns the URL of one of OPA's APIs at the service.
func (s *service) at(api, partition string) string {
	u, err := url.Parse(s.config.URL)
	if err != nil {
		return "" // faulted already
	}
	u = u.JoinPath(api)
	if partition != "" {
		u = u.JoinPath(url.PathEscape(partition))
	}
	return u.String()
}

// sharedClient sends to services that need no transport of their own.
var sharedClient = &http.Client{Transport: bundles.NewTransport(nil, 0)}

// noRedirects returns a client that sends what it is given nowhere else.
func noRedirects(c *http.Client) *http.Client {
	if c == nil {
		c = sharedClient
	}
	own := *c
	own.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &own
}
