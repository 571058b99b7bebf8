package policy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/topdown"
)

// The bounds of one call of http.send.
const (
	maxSendTime     = 30 * time.Second // of each attempt, whatever its timeout says
	maxSendRetries  = 10
	maxSendRequests = 32 // attempts and redirects
	maxSendHeaders  = 64 << 10
)

// OPA's http.send reads files and the environment for its TLS settings, and makes
// connections to Unix sockets, before any hook of an evaluation is asked. Nor
// does it leave to such a hook what AllowNet says, which is for schemas, too. So
// what is registered in its place looks at the request first.
func init() {
	send := topdown.GetBuiltin(ast.HTTPSend.Name)
	topdown.RegisterBuiltinFunc(ast.HTTPSend.Name, func(bctx topdown.BuiltinContext, operands []*ast.Term, iter func(*ast.Term) error) error {
		return sendWithin(send, bctx, operands, iter)
	})
}

// sendCapabilities let http.send ask for any host: the Network says which.
var sendCapabilities = func() *ast.Capabilities {
	c := *networkCapabilities
	c.AllowNet = nil
	return &c
}()

func sendWithin(send topdown.BuiltinFunc, bctx topdown.BuiltinContext, operands []*ast.Term, iter func(*ast.Term) error) error {
	request, ok := operands[0].Value.(ast.Object)
	if !ok {
		return send(bctx, operands, iter) // which says so
	}
	if bctx.RoundTripper == nil {
		return sendFails(request, errors.New("no network"), iter)
	}
	request, err := checkRequest(request)
	if err != nil {
		return sendFails(request, err, iter)
	}
	ctx, cancel := context.WithCancel(bctx.Context)
	defer cancel()
	if c, ok := bctx.Cancel.(*Cancel); ok && c != nil {
		defer c.stops(cancel)()
	}
	bctx.Context, bctx.Capabilities = ctx, sendCapabilities
	return send(bctx, []*ast.Term{ast.NewTerm(request)}, iter)
}

// sendFails does what OPA's http.send does with an error.
func sendFails(request ast.Object, err error, iter func(*ast.Term) error) error {
	if raise := valueAt(request, ast.InternedTerm("raise_error")); raise == nil || raise.Compare(ast.Boolean(false)) != 0 {
		return err
	}
	return iter(ast.ObjectTerm(
		ast.Item(ast.InternedTerm("status_code"), ast.InternedTerm(0)),
		ast.Item(ast.InternedTerm("error"), ast.ObjectTerm(
			ast.Item(ast.InternedTerm("code"), ast.StringTerm(topdown.HTTPSendInternalErr)),
			ast.Item(ast.InternedTerm("message"), ast.StringTerm(err.Error())),
		)),
	))
}

// checkRequest refuses what a request may not have, and bounds what it may. It
// returns the request in any case.
func checkRequest(request ast.Object) (ast.Object, error) {
	err := request.Iter(func(k, v *ast.Term) error {
		key, ok := k.Value.(ast.String)
		if !ok {
			return nil // send says what it is
		}
		switch name := string(key); {
		case strings.HasSuffix(name, "_file"), strings.HasSuffix(name, "_env_variable"):
			return fmt.Errorf("%s is not allowed: policies have neither files nor an environment", name)
		case name == "tls_insecure_skip_verify" && v.Value.Compare(ast.Boolean(false)) != 0:
			return fmt.Errorf("%s is not allowed: name the authority in tls_ca_cert", name)
		case name == "max_retry_attempts" && v.Value.Compare(ast.IntNumberTerm(maxSendRetries).Value) > 0:
			return fmt.Errorf("%s is more than %d", name, maxSendRetries)
		}
		return nil
	})
	if err != nil {
		return request, err
	}
	text, ok := valueAt(request, ast.InternedTerm("url")).(ast.String)
	if !ok {
		return request, nil // send says so
	}
	u, err := url.Parse(strings.Trim(string(text), `"`)) // as OPA trims it
	if err != nil {
		return request, errors.New("url is none")
	}
	if u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" {
		return request, errors.New("url is not one of http or https")
	}
	if headers, ok := valueAt(request, ast.InternedTerm("headers")).(ast.Object); ok {
		err := headers.Iter(func(k, v *ast.Term) error {
			name, _ := k.Value.(ast.String)
			value, _ := v.Value.(ast.String)
			if http.CanonicalHeaderKey(string(name)) == "Host" && string(value) != u.Host {
				return errors.New("header Host is not the host of the url")
			}
			return nil
		})
		if err != nil {
			return request, err
		}
	}
	return bounded(request), nil
}

// bounded returns a request with a timeout that is bounded, and without the way
// of caching in which an answer does not say its size.
func bounded(request ast.Object) ast.Object {
	timeout := request.Get(ast.InternedTerm("timeout"))
	mode := request.Get(ast.InternedTerm("caching_mode"))
	long := timeout != nil && !short(timeout.Value)
	if !long && mode == nil {
		return request
	}
	own := ast.NewObject()
	request.Foreach(func(k, v *ast.Term) {
		switch k.Value {
		case ast.String("caching_mode"):
			return
		case ast.String("timeout"):
			if long {
				v = ast.StringTerm(maxSendTime.String())
			}
		}
		own.Insert(k, v)
	})
	return own
}

// short reports whether a timeout, in nanoseconds or as a duration, is one that
// send takes as it is, or complains of.
func short(timeout ast.Value) bool {
	var d time.Duration
	switch t := timeout.(type) {
	case ast.Number:
		n, ok := t.Int64()
		if !ok {
			return true
		}
		d = time.Duration(n)
	case ast.String:
		var err error
		if d, err = time.ParseDuration(string(t)); err != nil {
			if d, err = time.ParseDuration(string(t) + "ns"); err != nil {
				return true
			}
		}
	default:
		return true
	}
	return 0 < d && d <= maxSendTime
}

// tenant returns what makes the transport of each call of one tenant's http.send.
func (n *Network) tenant() topdown.CustomizeRoundTripper {
	slots := slots{make(chan struct{}, n.perTenant), n.requests}
	return func(t *http.Transport) http.RoundTripper {
		c := &call{network: n, slots: slots, transport: n.plain}
		if t != nil && t.TLSClientConfig != nil {
			c.transport = n.transport(t.TLSClientConfig)
			c.transport.DisableKeepAlives = true
		}
		return c
	}
}

// transport returns a transport that dials as n does.
func (n *Network) transport(config *tls.Config) *http.Transport {
	return &http.Transport{
		DialContext:            n.dial,
		TLSClientConfig:        config,
		TLSHandshakeTimeout:    5 * time.Second,
		MaxResponseHeaderBytes: maxSendHeaders,
		MaxIdleConns:           100,
		MaxIdleConnsPerHost:    8,
		IdleConnTimeout:        90 * time.Second,
		ForceAttemptHTTP2:      true,
	}
}

// call sends the requests of one http.send: its attempts, and what they are
// redirected to.
type call struct {
	network   *Network
	slots     slots
	transport *http.Transport
	requests  int
}

func (c *call) RoundTrip(req *http.Request) (*http.Response, error) {
	if err := c.check(req); err != nil {
		return nil, err
	}
	free, err := c.slots.take(req.Context())
	if err != nil {
		return nil, err
	}
	req, span := traced(req)
	resp, err := c.transport.RoundTrip(req)
	if err != nil {
		err = shownError(err)
		span.ended(0, err)
		free()
		return nil, err
	}
	span.ended(resp.StatusCode, nil)
	if resp.ContentLength > c.network.answerBytes {
		resp.Body.Close()
		free()
		return nil, errAnswer(c.network.answerBytes)
	}
	resp.Body = &body{ReadCloser: resp.Body, left: c.network.answerBytes, limit: c.network.answerBytes, free: free}
	return resp, nil
}

// check refuses a request that may not go where it would.
func (c *call) check(req *http.Request) error {
	if c.requests++; c.requests > maxSendRequests {
		return &networkError{text: fmt.Sprintf("more than %d requests", maxSendRequests)}
	}
	if from := req.Response; from != nil && from.Request.URL.Scheme == "https" && req.URL.Scheme != "https" {
		return &networkError{text: "redirect from https to another scheme"}
	}
	standard := map[string]string{"http": "80", "https": "443"}[req.URL.Scheme]
	if standard == "" {
		return &networkError{text: "url is not one of http or https"}
	}
	host, port := req.URL.Hostname(), req.URL.Port()
	if port == "" {
		port = standard
	}
	if !c.network.allows(host, port, standard) {
		return &networkError{text: fmt.Sprintf("host %q at port %s is not allowed", host, port)}
	}
	return nil
}

// shownError returns an error without the addresses that one of Go has.
func shownError(err error) error {
	if own, ok := errors.AsType[*networkError](err); ok {
		return own
	}
	if _, ok := errors.AsType[x509.HostnameError](err); ok {
		return &networkError{text: "the certificate is not that of the host"}
	}
	if certificate, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return &networkError{text: certificate.Error()}
	}
	switch timeout, ok := errors.AsType[interface {
		error
		Timeout() bool
	}](err); {
	case errors.Is(err, context.Canceled):
		return context.Canceled
	case errors.Is(err, context.DeadlineExceeded):
		return context.DeadlineExceeded
	case ok && timeout.Timeout():
		return &networkError{text: "timed out", timeout: true}
	}
	return &networkError{text: "the connection failed"}
}

func errAnswer(limit int64) error {
	return &networkError{text: fmt.Sprintf("the answer is larger than %d bytes", limit)}
}

// body bounds the body of an answer.
type body struct {
	io.ReadCloser
	left, limit int64
	free        func()
}

func (b *body) Read(p []byte) (int, error) {
	if int64(len(p)) > b.left+1 {
		p = p[:b.left+1]
	}
	n, err := b.ReadCloser.Read(p)
	if int64(n) > b.left {
		return 0, errAnswer(b.limit)
	}
	b.left -= int64(n)
	if err != nil && err != io.EOF {
		err = shownError(err)
	}
	return n, err
}

func (b *body) Close() error {
	defer b.free()
	return b.ReadCloser.Close()
}
