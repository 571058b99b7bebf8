package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/gatehouse-authz/gatehouse/control"
	"github.com/gatehouse-authz/gatehouse/extauthz"
	"github.com/gatehouse-authz/gatehouse/httpserve"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// http checks the listener of the HTTP API.
func (l *loader) http() {
	if l.HTTP.Listen != "" {
		if _, _, err := listenAddress(l.HTTP.Listen); err != nil {
			l.fault("http.listen", "%s", err)
		}
	}
	if l.HTTP.URL != "" {
		if _, err := httpserve.ParseURL(l.HTTP.URL); err != nil {
			l.fault("http.url", "%s", err)
		}
	}
	for i, peer := range l.HTTP.TrustedPeers {
		at := fmt.Sprintf("http.trusted_peers[%d]", i)
		certified, err := httpserve.ParseTrusted(peer)
		switch {
		case err != nil:
			l.fault(at, "%s", err)
		case certified && l.HTTP.TLS.ClientCA == "":
			l.fault(at, "needs http.tls.client_ca: without it no peer has an ID")
		case peer == "unix" && !strings.HasPrefix(l.HTTP.Listen, "unix://"):
			l.fault(at, "needs http.listen to be a socket")
		}
	}
}

// offers checks what the tenants of a template offer over HTTP.
func (l *loader) offers(path string, t *control.Template) {
	sample, err := t.Tenant("sample-tenant")
	if err != nil {
		return // faulted already
	}
	h := sample.HTTP
	l.offered = l.offered || h != nil || sample.Discovery != nil
	if h == nil {
		return
	}
	at := join(path, "plugins.gatehouse_http")
	if h.Open() && l.HTTP.Listen != "" && !loopback(l.HTTP.Listen) {
		l.fault(at, "would be open to all who reach http.listen %q, which is not of this machine alone: it needs auth", l.HTTP.Listen)
	}
	if len(h.Auth.MTLS) > 0 && l.HTTP.TLS.ClientCA == "" {
		l.fault(at+".auth.mtls", "needs http.tls.client_ca: without it no caller has an ID")
	}
	if h.AuthZEN != nil && l.HTTP.URL == "" {
		l.note(at+".authzen", "has no metadata: http.url names no public address")
	}
	if len(l.HTTP.TrustedPeers) == 0 {
		if h.Auth.Headers != nil {
			l.note(at+".auth.headers", "has no effect: nobody is in http.trusted_peers")
		}
		if h.Check != "" {
			l.note(at+".check", "answers nobody: it answers http.trusted_peers alone")
		}
	}
}

// listensHTTP reports whether the HTTP API is listened on: where the file says so,
// or at the default address where some tenant may offer something.
func (l *Loaded) listensHTTP() bool {
	return l.HTTP.Listen != "" && (l.offered || l.HTTP.Listen != defaultHTTP)
}

// httpConfig is what the HTTP API works with, and a reload may change.
func httpConfig(cfg *Loaded) httpserve.Config {
	return httpserve.Config{
		Local:        loopback(cfg.HTTP.Listen),
		URL:          cfg.HTTP.URL,
		TrustedPeers: cfg.HTTP.TrustedPeers,
		Peers:        cfg.Tenants.Peers,
	}
}

// inputs makes the input documents of the HTTP API as those of checks over gRPC.
func inputs(checks *extauthz.Server) httpserve.Inputs {
	return func(r *httpserve.CheckedRequest, decisionID string) tenants.Input {
		return checks.Input((*extauthz.Request)(r), decisionID)
	}
}

// Bounds of a connection to the HTTP API. Those of a request are httpserve's.
const (
	httpHeaderTime = 5 * time.Second
	httpIdleTime   = 2 * time.Minute
	httpStreams    = 250 // requests at once on one connection
)

// newHTTP returns the server of the HTTP API: HTTP/1.1, and HTTP/2 both by TLS and
// without.
func newHTTP(handler *httpserve.Server, log *slog.Logger) *http.Server {
	s := &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: httpHeaderTime,
		IdleTimeout:       httpIdleTime,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: httpStreams, SendPingTimeout: idlePing, PingTimeout: idlePingTimeout},
		Protocols:         new(http.Protocols),
	}
	s.Protocols.SetHTTP1(true)
	s.Protocols.SetHTTP2(true)
	s.Protocols.SetUnencryptedHTTP2(true)
	s.RegisterOnShutdown(handler.Drain)
	return s
}

// answeredHTTP counts the answers of the HTTP API.
func answeredHTTP(reg prometheus.Registerer) func(route string, status int) {
	answers := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "gatehouse_http_requests_total",
		Help: "Answers of the HTTP API, by route and status; 0: the connection was closed instead.",
	}, []string{"route", "code"})
	reg.MustRegister(answers)
	return func(route string, status int) { answers.WithLabelValues(route, strconv.Itoa(status)).Inc() }
}

// drainHTTP lets requests that were begun end, until then.
func drainHTTP(s *http.Server, end time.Time, log *slog.Logger) {
	ctx, cancel := context.WithDeadline(context.Background(), end)
	defer cancel()
	if err := s.Shutdown(ctx); err != nil {
		log.Warn("HTTP requests still run at the end of the drain")
		_ = s.Close()
	}
}
