package bundles

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/open-policy-agent/opa/v1/bundle"
)

const (
	maxETag       = 1024 // bytes; a longer one is treated as none
	maxRedirects  = 10
	maxRetryAfter = 10 * time.Minute
	maxErrorPage  = 4 << 10 // bytes that are read of one
)

// HTTPConfig says how bundles are asked for over HTTP.
type HTTPConfig struct {
	// URL is the service, such as https://bundles.example.com/v1. A bundle is
	// at the URL, a slash and its name; slashes between the two are merged.
	// The name may have slashes and a query, as a resource of OPA's
	// configuration may: "tenants/orders/bundle.tar.gz?version=2". A query of
	// the URL itself, such as a token, goes with each request.
	URL string

	// Header is sent with each request. Optional.
	Header http.Header

	// Authorize adds credentials to a request just before it is sent. It is
	// called for each attempt, a redirect within the same host included.
	// Optional.
	Authorize func(*http.Request) error

	// Client sends the requests; its CheckRedirect is replaced. Optional: by
	// default all sources share a client with the transport that NewTransport
	// makes, and without cookies.
	Client *http.Client

	// S3 says that the service speaks the protocol of Amazon S3. Then a URL is
	// written as S3 wants it signed, an error names the code that S3 gave, and
	// status 403 with AccessDenied, or with nothing, is ErrNotFound: so S3
	// answers for a missing key to whom may not list the bucket. A 403 with
	// another code, such as InvalidAccessKeyId, is a StatusError.
	S3 bool

	// Limits bound what is read.
	Limits Limits

	// Verify says with which keys bundles are verified, as ReadVerified does.
	// Optional: without it, no bundle may be signed.
	Verify *bundle.VerificationConfig

	// KeepArchive gives each Bundle its Archive.
	KeepArchive bool

	// Timeout bounds one Fetch as a whole, the body included, but neither the
	// time that the service was asked to wait nor the wait for a turn. Default
	// 30 s.
	Timeout time.Duration

	// UserAgent is sent with each request. Default "gatehouse".
	UserAgent string
}

// HTTP is a Source that asks an HTTP service, as OPA does: with If-None-Match
// for a bundle that it has, and with a preference for snapshots, or for deltas
// too and for an answer only when there is a change (see Have).
//
// It follows ten redirects, but none from https to http; to another host go
// neither the configured headers nor credentials. An error names the URL
// without its query and without credentials, and quotes nothing of a body.
type HTTP struct {
	config  HTTPConfig
	client  *http.Client
	patient func() *http.Client // waits for the headers of an answer
}

var _ Source = (*HTTP)(nil)

// StatusError is the status of a response that is no answer. It is among the
// errors that Fetch wraps.
type StatusError struct {
	Code int
	// Reason is what S3 calls the error, such as SlowDown; empty elsewhere.
	Reason string
	// RetryAfter is how long the service asks to be left alone, at most ten
	// minutes; zero if it does not.
	RetryAfter time.Duration
}

// Text is what HTTP calls the code, or the number.
func (e *StatusError) Text() string {
	return cmp.Or(http.StatusText(e.Code), strconv.Itoa(e.Code))
}

func (e *StatusError) Error() string {
	text := "status " + strconv.Itoa(e.Code)
	if name := http.StatusText(e.Code); name != "" {
		text += " " + name
	}
	if e.Reason != "" {
		text += " (" + e.Reason + ")"
	}
	return text
}

// NewHTTP returns a source for the bundles of an HTTP service. A URL that
// cannot be used is reported by Fetch.
func NewHTTP(config HTTPConfig) *HTTP {
	config.Limits = config.Limits.orDefault()
	config.Verify = usable(config.Verify)
	config.Header = config.Header.Clone()
	if config.Timeout <= 0 {
		config.Timeout = 30 * time.Second
	}
	if config.UserAgent == "" {
		config.UserAgent = "gatehouse"
	}
	client := config.Client
	if client == nil {
		client = defaultClient()
	}
	h := &HTTP{config: config}
	own := *client
	own.CheckRedirect = h.redirect
	h.client = &own
	h.patient = sync.OnceValue(func() *http.Client { return patient(&own) })
	return h
}

// defaultClient is shared: its bounds hold for the process.
var defaultClient = sync.OnceValue(func() *http.Client {
	return &http.Client{Transport: NewTransport(nil, 0)}
})

// NewTransport returns a transport that has bounds on dialling (5 s), on the
// TLS handshake (5 s), on the wait for response headers, on their size (64 KiB)
// and on idle connections (100, 16 to a host, 90 s), and that takes no proxy
// from the environment. A nil config is Go's default; a wait that is not
// positive is 15 s.
func NewTransport(config *tls.Config, headerWait time.Duration) *http.Transport {
	if headerWait <= 0 {
		headerWait = 15 * time.Second
	}
	return &http.Transport{
		TLSClientConfig:        config,
		DialContext:            (&net.Dialer{Timeout: 5 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		TLSHandshakeTimeout:    5 * time.Second,
		ResponseHeaderTimeout:  headerWait,
		MaxResponseHeaderBytes: 64 << 10,
		MaxIdleConns:           100,
		MaxIdleConnsPerHost:    16,
		IdleConnTimeout:        90 * time.Second,
		DisableCompression:     true,
		ForceAttemptHTTP2:      true,
	}
}

// Read reads an archive as Fetch would: within the same limits, verified with
// the same keys. The ETag is left empty.
func (h *HTTP) Read(r io.Reader, name string) (*Bundle, error) {
	return h.ReadContext(context.Background(), r, name)
}

// ReadContext is Read that waits for a turn no longer than ctx lasts.
func (h *HTTP) ReadContext(ctx context.Context, r io.Reader, name string) (*Bundle, error) {
	return newContent(h.config.Limits, h.config.Verify).readFrom(ctx, r, name)
}

// Have is what the caller of Next has of a bundle, and what it takes.
type Have struct {
	// ETag is that of the bundle that it has; empty: it has none.
	ETag string

	// Digest is that of the bundle with the ETag. With it, a delta to that
	// bundle is taken too; zero: none is. Where keys are configured none is,
	// either way, since no signature says what a delta makes of a bundle.
	Digest [32]byte

	// Wait is how long the service is asked to wait, in whole seconds, for
	// something else than what the ETag names before it answers. Services can
	// of which a Bundle says that it Waits; others may answer at once. Zero: it
	// is not asked to. Next may take longer by it than Fetch does.
	Wait time.Duration
}

func (h Have) deltas() bool { return h.ETag != "" && h.Digest != [32]byte{} }

// Fetch implements Source. It returns ErrNotFound for status 404, and for one
// meaning of 403 where the service is S3; for another status that is neither
// 200 nor 304 the error wraps a *StatusError.
func (h *HTTP) Fetch(ctx context.Context, name, etag string) (*Bundle, error) {
	return h.Next(ctx, name, Have{ETag: etag})
}

// Next is Fetch for a caller that takes deltas, or has the service wait. A delta
// is within the limits of a snapshot and is refused, with ErrRefused, unless
// have says that it is taken.
func (h *HTTP) Next(ctx context.Context, name string, have Have) (*Bundle, error) {
	b, err := h.fetch(ctx, name, have)
	if err != nil && err != ErrNotModified {
		return nil, fmt.Errorf("fetching bundle %q: %w", brief(withoutQuery(name)), err)
	}
	return b, err
}

func (h *HTTP) fetch(ctx context.Context, name string, have Have) (*Bundle, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	u, err := h.url(name)
	if err != nil {
		return nil, err
	}
	if h.config.Verify != nil {
		have.Digest = [32]byte{}
	}
	timeout := h.config.Timeout + max(have.Wait, 0)
	timed, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	b, err := h.get(timed, ctx, u, name, have)
	switch {
	case err == nil, err == ErrNotModified:
		return b, err
	case errors.Is(err, ErrRefused):
	case ctx.Err() != nil:
		err = ctx.Err()
	case timed.Err() != nil:
		err = fmt.Errorf("not finished within %v: %w", timeout, timed.Err())
	}
	return nil, fmt.Errorf("%s: %w", display(u), err)
}

// get asks within ctx. A turn is waited for within patience.
func (h *HTTP) get(ctx, patience context.Context, u *url.URL, name string, have Have) (*Bundle, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, withoutURL(err)
	}
	for key, values := range h.config.Header {
		req.Header[http.CanonicalHeaderKey(key)] = append([]string(nil), values...)
	}
	h.setOwn(req.Header)
	req.Header.Set("Prefer", have.preference())
	if have.ETag != "" {
		req.Header.Set("If-None-Match", have.ETag)
	}
	Trace(req)
	if h.config.Authorize != nil {
		if err := h.config.Authorize(req); err != nil {
			return nil, fmt.Errorf("authorizing the request: %w", err)
		}
	}
	client := h.client
	if have.Wait > 0 {
		client = h.patient()
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, withoutURL(err)
	}
	defer resp.Body.Close()
	Traced(ctx, resp)

	reason := ""
	if n := resp.ContentLength; h.config.S3 && resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusNotModified {
		if reason, err = s3Reason(resp.Body); err != nil {
			return nil, fmt.Errorf("reading the answer with status %d: %w", resp.StatusCode, err)
		}
	} else if resp.StatusCode != http.StatusOK && n > 0 && n <= maxErrorPage {
		// Read a short error page, so that the connection can be used again.
		io.Copy(io.Discard, resp.Body)
	}
	status := &StatusError{Code: resp.StatusCode, Reason: reason, RetryAfter: RetryAfter(resp.Header.Get("Retry-After"))}
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusNotModified:
		if have.ETag == "" {
			return nil, errors.New("status 304 to a request that was not conditional")
		}
		return nil, ErrNotModified
	case http.StatusNotFound:
		return nil, ErrNotFound
	case http.StatusForbidden:
		if h.config.S3 && (reason == "" || reason == s3AccessDenied) {
			return nil, fmt.Errorf("%w, or no permission to read it: %w", ErrNotFound, status)
		}
		return nil, status
	default:
		return nil, status
	}
	if limit := h.config.Limits.Bytes; resp.ContentLength > limit {
		return nil, refuse("archive is %d bytes compressed, limit %s", resp.ContentLength, bytesText(limit))
	}
	c := newContent(h.config.Limits, h.config.Verify)
	c.keepArchive = h.config.KeepArchive
	if have.deltas() {
		c.base = &have.Digest
	}
	b, err := c.readFrom(patience, resp.Body, name)
	if err == io.ErrUnexpectedEOF {
		return nil, fmt.Errorf("the connection ended before the body: %w", err)
	}
	if err != nil {
		return nil, err
	}
	b.Waits = resp.Header.Get("Content-Type") == waitingType
	if e := resp.Header.Get("ETag"); len(e) <= maxETag {
		b.ETag = e
	}
	return b, nil
}

// waitingType is the Content-Type by which a service says that it can wait: see
// "HTTP Long Polling" in OPA's documentation of bundles.
const waitingType = "application/vnd.openpolicyagent.bundles"

// preference is the Prefer header of a request, as OPA writes it.
func (h Have) preference() string {
	text := "modes=snapshot"
	if h.deltas() {
		text += ",delta"
	}
	if seconds := int64(h.Wait / time.Second); seconds > 0 {
		text += ";wait=" + strconv.FormatInt(seconds, 10)
	}
	return text
}

// setOwn sets the headers that hold for any host.
func (h *HTTP) setOwn(header http.Header) {
	header.Set("User-Agent", h.config.UserAgent)
	// A bundle is a gzip file. Nothing on the way may pack or unpack it.
	header.Set("Accept-Encoding", "identity")
}

// Kind is what a span says the source is: http or s3.
func (h *HTTP) Kind() string {
	if h.config.S3 {
		return "s3"
	}
	return "http"
}

// redirect is called before a redirect is followed. The request has the
// headers of the first one.
func (h *HTTP) redirect(req *http.Request, via []*http.Request) error {
	if len(via) > maxRedirects {
		return fmt.Errorf("more than %d redirects", maxRedirects)
	}
	if via[len(via)-1].URL.Scheme == "https" && req.URL.Scheme != "https" {
		return errors.New("redirect from https to another scheme is refused")
	}
	same := true
	for _, v := range via {
		same = same && v.URL.Scheme == req.URL.Scheme && v.URL.Host == req.URL.Host
	}
	if same {
		req.Header.Del("Referer")
		req.URL.User = via[0].URL.User
		if h.config.S3 {
			s3Escape(req.URL)
		}
		if h.config.Authorize != nil {
			if err := h.config.Authorize(req); err != nil {
				return fmt.Errorf("authorizing the request: %w", err)
			}
		}
		return nil
	}
	// Neither what the operator configured nor what Authorize set, whatever
	// it is called, is for another host; nor is the query that a Referer has.
	etag, prefer := req.Header.Get("If-None-Match"), req.Header.Get("Prefer")
	clear(req.Header)
	h.setOwn(req.Header)
	req.Header.Set("Prefer", prefer)
	if etag != "" {
		req.Header.Set("If-None-Match", etag)
	}
	return nil
}

// url joins the base and a name. The name cannot lead to another host, nor out
// of the base's path.
func (h *HTTP) url(name string) (*url.URL, error) {
	base, err := url.Parse(h.config.URL)
	if err != nil {
		return nil, fmt.Errorf("URL of the service: %w", withoutURL(err))
	}
	if base.Scheme != "http" && base.Scheme != "https" || base.Host == "" {
		return nil, errors.New("URL of the service: not an http or https URL")
	}
	resource, query, _ := strings.Cut(strings.TrimLeft(name, "/"), "?")
	if resource == "" || strings.ContainsFunc(name, unicode.IsControl) || strings.Contains(name, "#") {
		return nil, errors.New("name is not a path")
	}
	decoded, err := url.PathUnescape(resource)
	if err != nil {
		return nil, errors.New("name is not a path")
	}
	for segment := range strings.FieldsFuncSeq(decoded, func(r rune) bool { return r == '/' || r == '\\' }) {
		if segment == "." || segment == ".." {
			return nil, fmt.Errorf("name has a %q segment", segment)
		}
	}
	escaped := strings.TrimRight(base.EscapedPath(), "/") + "/" + resource
	if base.Path, err = url.PathUnescape(escaped); err != nil {
		return nil, errors.New("name is not a path")
	}
	base.RawPath = escaped
	base.Fragment, base.RawFragment = "", ""
	switch {
	case base.RawQuery == "":
		base.RawQuery = query
	case query != "":
		base.RawQuery += "&" + query
	}
	if h.config.S3 {
		s3Escape(base)
	}
	return base, nil
}

// display writes a URL without what may be secret in it.
func display(u *url.URL) string {
	shown := url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path, RawPath: u.RawPath}
	return brief(shown.String())
}

func withoutQuery(name string) string {
	name, _, _ = strings.Cut(name, "?")
	return name
}

// withoutURL takes the URL out of an error of the HTTP client: it has the query.
func withoutURL(err error) error {
	if e, ok := errors.AsType[*url.Error](err); ok {
		return e.Err
	}
	return err
}

// RetryAfter reads a Retry-After header, in seconds or as a date: at most ten
// minutes, and zero where it is none.
func RetryAfter(value string) time.Duration {
	var d time.Duration
	if seconds, err := strconv.ParseInt(value, 10, 64); err == nil {
		d = time.Duration(min(max(seconds, 0), int64(maxRetryAfter/time.Second))) * time.Second
	} else if at, err := http.ParseTime(value); err == nil {
		d = time.Until(at)
	}
	return min(max(d, 0), maxRetryAfter)
}
