package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/gatehouse-authz/gatehouse/tenants"
)

// newAdmin returns the server of the admin listener:
//
//	GET /healthz            the process lives
//	GET /readyz[?verbose]   the required tenants have a policy
//	GET /metrics            Prometheus
//	GET /tenants            all tenants that are known
//	GET /tenants/{tenant}   one of them
//	POST /tenants/{tenant}/refresh   ask its sources now; answers when done
//	GET /tenants/{tenant}/decisions  its last decisions
//	POST /tenants/{tenant}/explain   why its policy decides as it does
//	GET, PUT, DELETE /log            from which level on the server logs
//
// From /tenants on they name tenants, say why they fail, show what was asked and
// cause work, and answer only where the listener is reached from this machine
// alone, or asks for certificates.
func newAdmin(pool *tenants.Pool, ready *readiness, gatherer prometheus.Gatherer, local bool, log *slog.Logger, level *logLevel) *http.Server {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		unready := ready.unready()
		if len(unready) > 0 {
			w.WriteHeader(http.StatusServiceUnavailable)
			fmt.Fprintln(w, "not ready")
		} else {
			fmt.Fprintln(w, "ready")
		}
		if r.URL.Query().Has("verbose") {
			for _, what := range slices.Sorted(maps.Keys(unready)) {
				fmt.Fprintf(w, "%s: %s\n", what, unready[what])
			}
		}
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(gatherer, promhttp.HandlerOpts{
		ErrorLog:            slog.NewLogLogger(log.Handler(), slog.LevelError),
		EnableOpenMetrics:   true, // exemplars are shown in it alone
		MaxRequestsInFlight: 4,
		Timeout:             20 * time.Second,
	}))
	if local {
		handleDecisions(mux, pool)
		level.handle(mux, log)
		mux.HandleFunc("GET /tenants", func(w http.ResponseWriter, _ *http.Request) {
			writeJSON(w, http.StatusOK, pool.Tenants())
		})
		mux.HandleFunc("GET /tenants/{tenant}", func(w http.ResponseWriter, r *http.Request) {
			id, err := tenants.ParseID(r.PathValue("tenant"))
			if err != nil {
				writeJSON(w, http.StatusBadRequest, map[string]string{"error": err.Error()})
				return
			}
			status, ok := pool.Tenant(id)
			if !ok {
				writeJSON(w, http.StatusNotFound, map[string]string{"error": fmt.Sprintf("tenant %q is not known here; a check loads it", id)})
				return
			}
			writeJSON(w, http.StatusOK, status)
		})
		mux.HandleFunc("POST /tenants/{tenant}/refresh", func(w http.ResponseWriter, r *http.Request) {
			id, err := tenants.ParseID(r.PathValue("tenant"))
			if err != nil {
				writeJSON(w, http.StatusBadRequest, map[string]string{"error": err.Error()})
				return
			}
			ctx, cancel := context.WithTimeout(r.Context(), refreshTime)
			defer cancel()
			code := http.StatusOK
			if err := pool.Refresh(ctx, id); errors.Is(err, tenants.ErrUnknown) {
				code = http.StatusNotFound
			} else if err != nil {
				code = http.StatusBadGateway // its source, or what it gave
			}
			status, _ := pool.Tenant(id)
			writeJSON(w, code, status)
		})
	}
	return &http.Server{
		Handler:           http.NewCrossOriginProtection().Handler(ownName(mux)),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
}

// ownName refuses requests for names that are no address, "localhost" apart, on
// a listener of this machine alone: a page in a browser here reaches the listener
// under a name of its own, which it has made an address of this machine.
func ownName(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		local, _ := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
		if r.TLS == nil && local != nil && local.IP.IsLoopback() {
			host := r.Host
			if h, _, err := net.SplitHostPort(host); err == nil {
				host = h
			}
			if host != "localhost" && net.ParseIP(strings.Trim(host, "[]")) == nil {
				http.Error(w, "ask for localhost or an address", http.StatusMisdirectedRequest)
				return
			}
		}
		next.ServeHTTP(w, r)
	})
}

// refreshTime bounds the wait for a refresh, which goes on without it.
const refreshTime = 25 * time.Second

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	_ = enc.Encode(v) // the client is gone
}
