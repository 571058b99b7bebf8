package decisionlog

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	maxRedirects   = 3
	maxRetryAfter  = 10 * time.Minute
	maxAnswer      = 4 << 10 // bytes of an answer's body; a longer one is not read
	defaultTimeout = 30 * time.Second
)

// HTTPConfig says how chunks are sent over HTTP.
type HTTPConfig struct {
	// URL is the service, such as https://logs.example.com/v1.
	URL string

	// Header is sent with each request. Optional.
	Header http.Header

	// Authorize adds credentials to a request just before it is sent. It is
	// called for each attempt, a redirect within the same host included; it may
	// read the body. Optional.
	Authorize func(*http.Request) error

	// Client sends the requests; its CheckRedirect is replaced. Optional: by
	// default all sinks share a client that has bounds on each step, and takes
	// no proxy from the environment.
	Client *http.Client

	// Credentials names what Authorize and Client do, for Sink.Identity.
	// Optional.
	Credentials string

	// Timeout bounds one request as a whole. Default 30 s.
	Timeout time.Duration

	// UserAgent is sent with each request. Default "gatehouse".
	UserAgent string
}

// identity is the parts of a sink's identity that the configuration gives.
func (c *HTTPConfig) identity() []any {
	var header []string
	for _, name := range slices.Sorted(maps.Keys(c.Header)) {
		header = append(header, name)
		header = append(header, c.Header[name]...)
	}
	return []any{c.URL, header, c.Credentials, int64(c.Timeout), c.UserAgent}
}

// StatusError is the status of an answer that is not 2xx. Its text is that of
// OPA.
type StatusError struct {
	Code int
	// RetryAfter is how long the service asks to be left alone, at most ten
	// minutes; zero if it does not.
	RetryAfter time.Duration
}

func (e *StatusError) Error() string {
	return fmt.Sprintf("log upload failed, server replied with HTTP %d %s", e.Code, http.StatusText(e.Code))
}

// sender sends requests to one service. It follows three redirects, but only
// within the host and where the body goes along; any other is a status that is not
// 2xx. An error names the URL without its query and without credentials, and
// quotes nothing of a body.
type sender struct {
	config HTTPConfig
	base   *url.URL
	err    error // why base cannot be used
	client *http.Client
}

func newSender(config HTTPConfig) *sender {
	config.Header = config.Header.Clone()
	config.UserAgent = cmp.Or(config.UserAgent, "gatehouse")
	if config.Timeout <= 0 {
		config.Timeout = defaultTimeout
	}
	s := &sender{config: config}
	base, err := url.Parse(config.URL)
	switch {
	case err != nil:
		s.err = fmt.Errorf("URL of the service: %w", withoutURL(err))
	case base.Scheme != "http" && base.Scheme != "https" || base.Host == "":
		s.err = errors.New("URL of the service: not an http or https URL")
	}
	s.base = base
	client := config.Client
	if client == nil {
		client = defaultClient()
	}
	own := *client
	own.CheckRedirect = s.redirect
	s.client = &own
	return s
}

// defaultClient is shared: its bounds hold for the process.
var defaultClient = sync.OnceValue(func() *http.Client {
	return &http.Client{Transport: &http.Transport{
		DialContext:            (&net.Dialer{Timeout: 5 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		TLSHandshakeTimeout:    5 * time.Second,
		ResponseHeaderTimeout:  15 * time.Second,
		MaxResponseHeaderBytes: 64 << 10,
		MaxIdleConns:           100,
		MaxIdleConnsPerHost:    16,
		IdleConnTimeout:        90 * time.Second,
		DisableCompression:     true,
		ForceAttemptHTTP2:      true,
	}}
})

// lane names the host.
func (s *sender) lane() string {
	if s.err != nil {
		return "decisionlog"
	}
	return "decisionlog " + s.base.Scheme + "://" + s.base.Host
}

// url is the base, a slash and an escaped path that may have a query.
func (s *sender) url(resource string) (*url.URL, error) {
	if s.err != nil {
		return nil, s.err
	}
	u := *s.base
	path, query, _ := strings.Cut(strings.TrimLeft(resource, "/"), "?")
	escaped := strings.TrimRight(u.EscapedPath(), "/") + "/" + path
	var err error
	if u.Path, err = url.PathUnescape(escaped); err != nil {
		return nil, errors.New("resource is not a path")
	}
	u.RawPath = escaped
	u.Fragment, u.RawFragment = "", ""
	switch {
	case u.RawQuery == "":
		u.RawQuery = query
	case query != "":
		u.RawQuery += "&" + query
	}
	return &u, nil
}

// send sends one request. A status that is not 2xx is a *StatusError.
func (s *sender) send(ctx context.Context, method, resource string, header http.Header, body []byte) error {
	u, err := s.url(resource)
	if err != nil {
		return err
	}
	timed, cancel := context.WithTimeout(ctx, s.config.Timeout)
	defer cancel()
	err = s.do(timed, method, u, header, body)
	if _, ok := errors.AsType[*StatusError](err); err == nil || ok {
		return err
	}
	if ctx.Err() == nil && timed.Err() != nil {
		err = fmt.Errorf("not finished within %v: %w", s.config.Timeout, timed.Err())
	}
	shown := url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path, RawPath: u.RawPath}
	return fmt.Errorf("log upload failed: %s: %w", shown.String(), err)
}

func (s *sender) do(ctx context.Context, method string, u *url.URL, header http.Header, body []byte) error {
	req, err := http.NewRequestWithContext(ctx, method, u.String(), bytes.NewReader(body))
	if err != nil {
		return withoutURL(err)
	}
	for key, values := range s.config.Header {
		req.Header[http.CanonicalHeaderKey(key)] = slices.Clone(values)
	}
	maps.Copy(req.Header, header)
	req.Header.Set("User-Agent", s.config.UserAgent)
	propagate(req)
	if err := s.authorize(req); err != nil {
		return err
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return withoutURL(err)
	}
	defer resp.Body.Close()
	answered(ctx, resp)
	if n := resp.ContentLength; n > 0 && n <= maxAnswer {
		// So that the connection can be used again.
		io.Copy(io.Discard, resp.Body)
	}
	if resp.StatusCode < 200 || resp.StatusCode >= 300 {
		return &StatusError{Code: resp.StatusCode, RetryAfter: retryAfter(resp.Header.Get("Retry-After"))}
	}
	return nil
}

func (s *sender) authorize(req *http.Request) error {
	if s.config.Authorize == nil {
		return nil
	}
	if err := s.config.Authorize(req); err != nil {
		return fmt.Errorf("authorizing the request: %w", err)
	}
	// Who signs the body may have read it.
	body, err := req.GetBody()
	if err != nil {
		return err
	}
	req.Body = body
	return nil
}

// redirect is called before a redirect is followed. One that would lose the body,
// since the method is another, would look as if the chunk were delivered.
func (s *sender) redirect(req *http.Request, via []*http.Request) error {
	first := via[0]
	if len(via) > maxRedirects || req.Method != first.Method || req.URL.Scheme != first.URL.Scheme || req.URL.Host != first.URL.Host {
		return http.ErrUseLastResponse
	}
	req.Header.Del("Referer")
	req.URL.User = first.URL.User
	return s.authorize(req)
}

// withoutURL takes the URL out of an error of the HTTP client: it has the query.
func withoutURL(err error) error {
	if e, ok := errors.AsType[*url.Error](err); ok {
		return e.Err
	}
	return err
}

// retryAfter reads a Retry-After header, in seconds or as a date.
func retryAfter(value string) time.Duration {
	var d time.Duration
	if seconds, err := strconv.ParseInt(value, 10, 64); err == nil {
		d = time.Duration(min(max(seconds, 0), int64(maxRetryAfter/time.Second))) * time.Second
	} else if at, err := http.ParseTime(value); err == nil {
		d = time.Until(at)
	}
	return min(max(d, 0), maxRetryAfter)
}
