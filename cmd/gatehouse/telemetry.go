package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"regexp"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/gatehouse-authz/gatehouse/telemetry"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// Telemetry says what Gatehouse tells an OpenTelemetry collector. A change of it
// takes a restart.
type Telemetry struct {
	// OTLP says where telemetry goes.
	OTLP OTLP `yaml:"otlp"`

	// Traces are spans of decisions and of the control plane.
	Traces Traces `yaml:"traces"`

	// Metrics are those of /metrics, sent too.
	Metrics OTLPMetrics `yaml:"metrics"`

	// Attributes are those of the resource, beside service.name (gatehouse),
	// service.version and service.instance.id, which they may replace. At most
	// 64. Default none.
	Attributes map[string]string `yaml:"attributes"`
}

// OTLP says where telemetry goes.
type OTLP struct {
	// Endpoint is host:port, http://host:port or https://host:port, over HTTP
	// with a path before /v1/traces and /v1/metrics if need be. Default "":
	// nothing is sent, and nothing is recorded.
	Endpoint string `yaml:"endpoint"`

	// Protocol is grpc; or http, protobuf over HTTP. Default grpc.
	Protocol string `yaml:"protocol"`

	// Insecure has an endpoint that is host:port asked without TLS. Default
	// false.
	Insecure bool `yaml:"insecure"`

	// TLS secures it. Default: the authorities of the system.
	TLS ClientTLS `yaml:"tls"`

	// Headers go with each request; ${NAME} is replaced by the environment
	// variable NAME, which must be set. Default none.
	Headers map[string]string `yaml:"headers"`

	// Compression is gzip or none. Default gzip.
	Compression string `yaml:"compression"`

	// Timeout bounds a request, with the attempts to send it again. Default 10s.
	Timeout Duration `yaml:"timeout"`
}

// ClientTLS secures what is asked.
type ClientTLS struct {
	// CA is a PEM file of the authorities that the other's certificate must come
	// from. Default "": those of the system.
	CA string `yaml:"ca"`

	// Cert and Key are PEM files: the certificate that is shown, with its chain,
	// and its key. They are read for each connection. Default "": none is shown.
	Cert string `yaml:"cert"`
	Key  string `yaml:"key"`
}

// Traces says which spans are recorded.
type Traces struct {
	// Enabled has spans recorded and sent where there is an endpoint. Default
	// true.
	Enabled bool `yaml:"enabled"`

	// Sampling is which part of the decisions is recorded whose caller names no
	// trace, from 0 to 1. Where it names one, its word decides. Default 0.01.
	Sampling float64 `yaml:"sampling"`

	// ControlSampling is which part of the control plane's round trips is
	// recorded, from 0 to 1. Default 1.
	ControlSampling float64 `yaml:"control_sampling"`

	// Propagators are the ways in which callers name their traces:
	// tracecontext, b3, b3multi. The first that names one wins, also for the
	// trace_id of decision logs, and without an endpoint. Default
	// [tracecontext].
	Propagators []string `yaml:"propagators"`

	// Prints has what policies print become events of their decision's span.
	// Policies may print secrets. Default false: print does nothing.
	Prints bool `yaml:"prints"`
}

// OTLPMetrics says how metrics are sent.
type OTLPMetrics struct {
	// Enabled has the metrics of /metrics sent where there is an endpoint.
	// Default true.
	Enabled bool `yaml:"enabled"`

	// Interval is how often. Default 60s.
	Interval Duration `yaml:"interval"`
}

func defaultTelemetry() Telemetry {
	return Telemetry{
		OTLP:    OTLP{Protocol: telemetry.GRPC, Compression: "gzip", Timeout: Duration(telemetry.DefaultTimeout)},
		Traces:  Traces{Enabled: true, Sampling: 0.01, ControlSampling: 1, Propagators: []string{string(tenants.TraceContext)}},
		Metrics: OTLPMetrics{Enabled: true, Interval: Duration(time.Minute)},
	}
}

const (
	maxResourceAttributes = 64
	maxOTLPHeaders        = 32
)

// headerName is a name of a header that an exporter takes: a token, in lower case
// for gRPC.
var headerName = regexp.MustCompile("^[A-Za-z0-9!#$%&'*+.^_`|~-]+$")

// telemetry checks the block, and puts in the environment.
func (l *loader) telemetry() {
	const at = "telemetry."
	c := &l.Config.Telemetry
	for i, name := range c.Traces.Propagators {
		p, err := tenants.ParsePropagator(name)
		if err != nil {
			l.fault(fmt.Sprintf(at+"traces.propagators[%d]", i), "%s", err)
		}
		l.Propagators = append(l.Propagators, p)
	}
	for key, v := range map[string]float64{"sampling": c.Traces.Sampling, "control_sampling": c.Traces.ControlSampling} {
		if !(v >= 0 && v <= 1) {
			l.fault(at+"traces."+key, "%v is not a number from 0 to 1", v)
		}
	}
	if n := len(c.Attributes); n > maxResourceAttributes {
		l.fault(at+"attributes", "are %d, limit %d", n, maxResourceAttributes)
	}
	if n := len(c.OTLP.Headers); n > maxOTLPHeaders {
		l.fault(at+"otlp.headers", "are %d, limit %d", n, maxOTLPHeaders)
	}
	if c.OTLP.Compression != "gzip" && c.OTLP.Compression != "none" {
		l.fault(at+"otlp.compression", "%q is not gzip or none", c.OTLP.Compression)
	}
	for _, name := range slices.Sorted(maps.Keys(c.OTLP.Headers)) {
		if !headerName.MatchString(name) {
			l.fault(at+"otlp.headers", "%q is not the name of a header", name)
		}
		c.OTLP.Headers[name] = l.environment(at+"otlp.headers."+name, c.OTLP.Headers[name]).(string)
	}
	if c.OTLP.Endpoint == "" {
		if c.OTLP.Protocol != telemetry.GRPC && c.OTLP.Protocol != telemetry.HTTP {
			l.fault(at+"otlp.protocol", "%q is not grpc or http", c.OTLP.Protocol)
		}
		return
	}
	secured, err := c.OTLP.TLS.config()
	if err != nil {
		l.fault(at+"otlp.tls", "%s", err)
	}
	otlp := c.OTLP.settings(secured)
	if err := otlp.Check(); err != nil {
		l.fault(at+"otlp.endpoint", "%s", err)
	}
}

// settings are what the rest of the process is given.
func (o *OTLP) settings(secured *tls.Config) telemetry.OTLP {
	return telemetry.OTLP{
		Endpoint: o.Endpoint, Protocol: o.Protocol, Insecure: o.Insecure, TLS: secured,
		Headers: o.Headers, Gzip: o.Compression == "gzip", Timeout: time.Duration(o.Timeout),
	}
}

// config reads the files. It returns nil where there are none.
func (f *ClientTLS) config() (*tls.Config, error) {
	if *f == (ClientTLS{}) {
		return nil, nil
	}
	c := &tls.Config{MinVersion: tls.VersionTLS12}
	if f.CA != "" {
		pem, err := os.ReadFile(f.CA)
		if err != nil {
			return nil, fmt.Errorf("ca: %w", err)
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("ca: %s has no certificate in PEM", f.CA)
		}
	}
	if (f.Cert == "") != (f.Key == "") {
		return nil, errors.New("cert and key go together")
	}
	if f.Cert != "" {
		if _, err := tls.LoadX509KeyPair(f.Cert, f.Key); err != nil {
			return nil, fmt.Errorf("cert: %w", err)
		}
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(f.Cert, f.Key)
			return &pair, err
		}
	}
	return c, nil
}

// newTelemetry returns what sends telemetry; nil: nothing is sent.
func newTelemetry(c *Telemetry, instance string, registry *prometheus.Registry, log *slog.Logger) (*telemetry.Telemetry, error) {
	if c.OTLP.Endpoint == "" {
		return nil, nil
	}
	secured, err := c.OTLP.TLS.config()
	if err != nil {
		return nil, fmt.Errorf("telemetry.otlp.tls: %w", err)
	}
	return telemetry.New(telemetry.Config{
		OTLP:            c.OTLP.settings(secured),
		Traces:          c.Traces.Enabled,
		Sampling:        c.Traces.Sampling,
		ControlSampling: c.Traces.ControlSampling,
		Metrics:         c.Metrics.Enabled,
		Interval:        time.Duration(c.Metrics.Interval),
		Gatherer:        registry,
		Version:         thisBuild().Version,
		Instance:        instance,
		Attributes:      c.Attributes,
		Registerer:      registry,
		Logger:          log,
	})
}

// leastSend is how long telemetry is sent at the end even where the drain has used
// up its time.
const leastSend = time.Second

// drainTelemetry sends what is left of the telemetry.
func drainTelemetry(t *telemetry.Telemetry, end time.Time, log *slog.Logger) {
	ctx, cancel := context.WithTimeout(context.Background(), max(time.Until(end), leastSend))
	defer cancel()
	if err := t.Shutdown(ctx); err != nil {
		log.Warn("telemetry was not sent by the end of the drain")
	}
}
