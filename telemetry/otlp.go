package telemetry

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetricgrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetrichttp"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/sdk/metric"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

// The protocols of OTLP.
const (
	GRPC = "grpc" // port 4317, by custom
	HTTP = "http" // protobuf over HTTP; port 4318, by custom
)

// The times of one request.
const (
	DefaultTimeout = 10 * time.Second

	retryFirst = time.Second // after a request that may be sent again
	retryMost  = 5 * time.Second
	dialTime   = 5 * time.Second
)

// OTLP says where telemetry goes (https://opentelemetry.io/docs/specs/otlp/).
type OTLP struct {
	// Endpoint is host:port, or http://host:port or https://host:port, over HTTP
	// with a path before /v1/traces and the like. Required.
	Endpoint string

	// Protocol is GRPC or HTTP; default GRPC.
	Protocol string

	// Insecure has host:port asked without TLS.
	Insecure bool

	// TLS is what secures it; default: the authorities of the system.
	TLS *tls.Config

	// Headers go with each request. They may be secret.
	Headers map[string]string

	// Gzip compresses requests.
	Gzip bool

	// Timeout bounds a request, with the attempts to send it again; default
	// DefaultTimeout.
	Timeout time.Duration
}

// target is an OTLP that has been checked.
type target struct {
	*OTLP
	host    string // with a port
	path    string // over HTTP; "" or one that begins with a slash
	plain   bool   // without TLS
	timeout time.Duration
}

// Check returns an error that says what of the endpoint and the protocol cannot
// be used. It has no secret in it.
func (o *OTLP) Check() error {
	_, err := o.target()
	return err
}

func (o *OTLP) target() (target, error) {
	t := target{OTLP: o, host: o.Endpoint, plain: o.Insecure, timeout: o.Timeout}
	if t.timeout <= 0 {
		t.timeout = DefaultTimeout
	}
	if o.Protocol != "" && o.Protocol != GRPC && o.Protocol != HTTP {
		return t, fmt.Errorf("protocol %q is not grpc or http", o.Protocol)
	}
	if strings.Contains(o.Endpoint, "://") {
		u, err := url.Parse(o.Endpoint)
		switch {
		case err != nil:
			return t, errors.New("endpoint is not a URL")
		case u.Scheme != "http" && u.Scheme != "https":
			return t, fmt.Errorf("endpoint has the scheme %q, which is not http or https", u.Scheme)
		case u.User != nil || u.RawQuery != "" || u.Fragment != "":
			return t, errors.New("endpoint has a user, a query or a fragment: credentials belong into headers")
		case u.Scheme == "https" && o.Insecure:
			return t, errors.New("endpoint is https, and insecure is set")
		}
		t.host, t.plain = u.Host, u.Scheme == "http"
		t.path = strings.TrimRight(u.Path, "/")
		if t.path != "" && o.Protocol != HTTP {
			return t, errors.New("endpoint has a path, which gRPC has not")
		}
		if u.Port() == "" {
			t.host = net.JoinHostPort(u.Hostname(), map[bool]string{true: "80", false: "443"}[t.plain])
		}
	}
	if host, port, err := net.SplitHostPort(t.host); err != nil || host == "" || port == "" || strings.ContainsAny(t.host, "/?#@ ") {
		return t, errors.New("endpoint is not host:port, http://host:port or https://host:port")
	}
	if t.plain && o.TLS != nil {
		return t, errors.New("tls is set, and the endpoint is asked without")
	}
	return t, nil
}

// secrets are the values that no error may quote.
func (o *OTLP) secrets() []string {
	return slices.DeleteFunc(slices.Collect(maps.Values(o.Headers)), func(s string) bool { return len(s) < 4 })
}

// secure is the configuration of TLS, which the exporters would else take from the
// environment.
func (t *target) secure() *tls.Config {
	if t.TLS == nil {
		return &tls.Config{MinVersion: tls.VersionTLS12}
	}
	return t.TLS
}

// headers are never nil: then the exporters would take those of the environment.
func (t *target) headers() map[string]string {
	if t.Headers == nil {
		return map[string]string{}
	}
	return t.Headers
}

// url is where a signal goes over HTTP. That says also whether it goes by TLS: the
// exporters would else ask the environment.
func (t *target) url(signal string) string {
	return map[bool]string{true: "http", false: "https"}[t.plain] + "://" + t.host + t.path + "/v1/" + signal
}

// client sends over HTTP: to the endpoint alone, and by no proxy of the
// environment.
func (t *target) client() *http.Client {
	transport := &http.Transport{
		DialContext:            (&net.Dialer{Timeout: dialTime, KeepAlive: 30 * time.Second}).DialContext,
		TLSHandshakeTimeout:    dialTime,
		ResponseHeaderTimeout:  t.timeout,
		MaxResponseHeaderBytes: 64 << 10,
		MaxIdleConns:           4,
		MaxConnsPerHost:        4,
		IdleConnTimeout:        90 * time.Second,
		ForceAttemptHTTP2:      true,
	}
	if !t.plain {
		transport.TLSClientConfig = t.secure()
	}
	return &http.Client{
		Transport:     transport,
		Timeout:       t.timeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// noProxy: what is configured is what is dialled.
var noProxy = grpc.WithNoProxy()

// spans returns what sends spans.
func (t *target) spans() (sdktrace.SpanExporter, error) {
	ctx := context.Background()
	if t.Protocol == HTTP {
		opts := []otlptracehttp.Option{
			otlptracehttp.WithEndpointURL(t.url("traces")),
			otlptracehttp.WithHeaders(t.headers()), otlptracehttp.WithHTTPClient(t.client()),
			otlptracehttp.WithRetry(otlptracehttp.RetryConfig{Enabled: true, InitialInterval: retryFirst, MaxInterval: retryMost, MaxElapsedTime: t.timeout}),
			otlptracehttp.WithCompression(otlptracehttp.NoCompression),
		}
		if t.Gzip {
			opts = append(opts, otlptracehttp.WithCompression(otlptracehttp.GzipCompression))
		}
		return otlptrace.NewUnstarted(otlptracehttp.NewClient(opts...)), nil
	}
	opts := []otlptracegrpc.Option{
		otlptracegrpc.WithEndpoint(t.host), otlptracegrpc.WithHeaders(t.headers()), otlptracegrpc.WithTimeout(t.timeout),
		otlptracegrpc.WithRetry(otlptracegrpc.RetryConfig{Enabled: true, InitialInterval: retryFirst, MaxInterval: retryMost, MaxElapsedTime: t.timeout}),
		otlptracegrpc.WithDialOption(noProxy),
	}
	if t.plain {
		opts = append(opts, otlptracegrpc.WithInsecure())
	} else {
		opts = append(opts, otlptracegrpc.WithTLSCredentials(credentials.NewTLS(t.secure())))
	}
	if t.Gzip {
		opts = append(opts, otlptracegrpc.WithCompressor("gzip"))
	}
	return otlptracegrpc.New(ctx, opts...)
}

// metrics returns what sends metrics.
func (t *target) metrics() (metric.Exporter, error) {
	ctx := context.Background()
	if t.Protocol == HTTP {
		opts := []otlpmetrichttp.Option{
			otlpmetrichttp.WithEndpointURL(t.url("metrics")),
			otlpmetrichttp.WithHeaders(t.headers()), otlpmetrichttp.WithHTTPClient(t.client()),
			otlpmetrichttp.WithRetry(otlpmetrichttp.RetryConfig{Enabled: true, InitialInterval: retryFirst, MaxInterval: retryMost, MaxElapsedTime: t.timeout}),
			otlpmetrichttp.WithCompression(otlpmetrichttp.NoCompression),
		}
		if t.Gzip {
			opts = append(opts, otlpmetrichttp.WithCompression(otlpmetrichttp.GzipCompression))
		}
		return otlpmetrichttp.New(ctx, opts...)
	}
	opts := []otlpmetricgrpc.Option{
		otlpmetricgrpc.WithEndpoint(t.host), otlpmetricgrpc.WithHeaders(t.headers()), otlpmetricgrpc.WithTimeout(t.timeout),
		otlpmetricgrpc.WithRetry(otlpmetricgrpc.RetryConfig{Enabled: true, InitialInterval: retryFirst, MaxInterval: retryMost, MaxElapsedTime: t.timeout}),
		otlpmetricgrpc.WithDialOption(noProxy),
	}
	if t.plain {
		opts = append(opts, otlpmetricgrpc.WithInsecure())
	} else {
		opts = append(opts, otlpmetricgrpc.WithTLSCredentials(credentials.NewTLS(t.secure())))
	}
	if t.Gzip {
		opts = append(opts, otlpmetricgrpc.WithCompressor("gzip"))
	}
	return otlpmetricgrpc.New(ctx, opts...)
}
