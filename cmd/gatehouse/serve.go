package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	_ "google.golang.org/grpc/encoding/gzip" // checks may come compressed
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/tap"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/gatehouse-authz/gatehouse/bundles"
	"github.com/gatehouse-authz/gatehouse/extauthz"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// serve runs the server until ctx ends, and drains it.
func serve(ctx context.Context, opts *options) error {
	log := opts.log
	dir := ""
	if len(opts.args) > 0 {
		dir = opts.args[0]
	}
	cfg, err := load(opts.config, dir, false)
	if err != nil {
		return err
	}
	for _, n := range cfg.Notes {
		log.Warn("setting "+n.text, "key", n.path, "line", n.line)
	}
	stopPace := fitContainer(log)
	defer stopPace()

	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))

	var store *bundles.Store
	if cfg.Persist.Directory != "" {
		if store, err = bundles.NewStore(cfg.Persist.Directory); err != nil {
			return fmt.Errorf("persist.directory: %w", err)
		}
	}
	budget := newBudgets(&cfg.Tenants)
	pool := tenants.New(tenants.Config{
		Settings:   cfg.Settings,
		Capacity:   int(cfg.Tenants.Capacity),
		Parked:     parked(cfg.Tenants.Parked),
		Grace:      time.Duration(cfg.Tenants.GracePeriod),
		Store:      store,
		MaxStale:   time.Duration(cfg.Persist.MaxStale),
		Guard:      cfg.Guard,
		Lend:       lender(),
		Memory:     budget.tenants,
		BodyMemory: budget.bodies,
		Preload:    cfg.Preload,
		Required:   cfg.Required,
		Registerer: registry,
		Logger:     log,
	})
	checkConfig := routing(cfg)
	checkConfig.Pool, checkConfig.Refused, checkConfig.Logger = pool, pool.Refused, log
	checkConfig.MessageMemory = budget.messages
	checkConfig.MaxMessageBytes = int(cfg.GRPC.MaxMessageBytes)
	checks, err := extauthz.New(checkConfig)
	if err != nil {
		return err
	}
	grpcTLS, err := newCertificates("grpc", cfg.GRPC.TLS, log)
	if err != nil {
		return fmt.Errorf("grpc.tls: %w", err)
	}
	adminTLS, err := newCertificates("admin", cfg.Admin.TLS, log)
	if err != nil {
		return fmt.Errorf("admin.tls: %w", err)
	}
	reloads := newReloader(opts.config, dir, cfg, pool, checks, registry, log, grpcTLS, adminTLS)
	grpcServer := newGRPC(&cfg.GRPC, grpcTLS)
	checks.Register(grpcServer)
	healthServer := health.NewServer()
	healthpb.RegisterHealthServer(grpcServer, healthServer)
	if cfg.GRPC.Reflection {
		reflection.Register(grpcServer)
	}
	ready := &readiness{pool: pool, health: healthServer}
	trusted := loopback(cfg.Admin.Listen) || cfg.Admin.TLS.ClientCA != ""
	adminServer := newAdmin(pool, ready, registry, trusted, log)

	mode, err := socketMode(cfg.GRPC.SocketMode)
	if err != nil {
		return fmt.Errorf("grpc.socket_mode: %w", err)
	}
	grpcListener, err := listen(cfg.GRPC.Listen, mode)
	if err != nil {
		return fmt.Errorf("grpc.listen: %w", err)
	}
	var adminListener net.Listener
	if cfg.Admin.Listen != "" {
		if adminListener, err = listen(cfg.Admin.Listen, mode); err != nil {
			return errors.Join(fmt.Errorf("admin.listen: %w", err), grpcListener.Close())
		}
		if adminTLS != nil {
			adminListener = tls.NewListener(adminListener, adminTLS.config())
		}
	}

	// Two that stop one after the other: those that speak, then the pool.
	speaking, stopSpeaking := context.WithCancel(ctx)
	defer stopSpeaking()
	running, stopPool := context.WithCancel(context.Background())
	defer stopPool()
	var pooling, speakers sync.WaitGroup
	var poolErr error
	pooling.Go(func() { poolErr = pool.Run(running) })
	speakers.Go(func() { ready.watch(speaking) })
	speakers.Go(func() { reloads.run(speaking) })

	faults := make(chan error, 2)
	speakers.Go(func() {
		if err := grpcServer.Serve(grpcListener); err != nil {
			faults <- fmt.Errorf("gRPC server: %w", err)
		}
	})
	admin := "off"
	if adminListener != nil {
		admin = adminListener.Addr().String()
		speakers.Go(func() {
			if err := adminServer.Serve(adminListener); !errors.Is(err, http.ErrServerClosed) {
				faults <- fmt.Errorf("admin server: %w", err)
			}
		})
	}
	log.Info("serving", "version", version(), "grpc", grpcListener.Addr().String(), "admin", admin,
		"directory", dir, "config", opts.config, "gomaxprocs", runtime.GOMAXPROCS(0))

	var fault error
	select {
	case <-ctx.Done():
		log.Info("draining", "delay", time.Duration(cfg.Drain.Delay).String(), "timeout", time.Duration(cfg.Drain.Timeout).String())
		ready.stop()
		select { // proxies look elsewhere meanwhile, and those that do not are answered
		case <-time.After(time.Duration(cfg.Drain.Delay)):
		case fault = <-faults:
		}
	case fault = <-faults:
		ready.stop()
	}
	stopSpeaking()
	drain(grpcServer, time.Duration(cfg.Drain.Timeout), log)
	stopPool()
	pooling.Wait()
	if adminListener != nil {
		_ = adminServer.Close()
	}
	speakers.Wait()
	if fault == nil && poolErr != nil {
		log.Warn("stopped with evaluations left running", "error", poolErr)
	}
	log.Info("stopped")
	return fault
}

// routing is how checks find their tenants, which a reload may change.
func routing(cfg *Loaded) extauthz.Config {
	return extauthz.Config{
		Resolve:     cfg.Tenants.Resolve,
		Default:     string(cfg.Default),
		Peers:       cfg.Tenants.Peers,
		Descriptors: cfg.Descriptors,
	}
}

// parked is the pool's setting for the file's, in which 0 means none.
func parked(c Count) int {
	if c == 0 {
		return -1
	}
	return int(c)
}

// Bounds of the gRPC listener.
const (
	streams          = 1000             // checks at once on one connection
	handshakeTime    = 10 * time.Second // for a connection to say what it wants
	pingInterval     = 10 * time.Second // between two pings of a client
	idlePing         = time.Minute      // a silent connection is asked whether it lives,
	idlePingTimeout  = 20 * time.Second // and closed without an answer
	ageGrace         = 30 * time.Second // for what runs on a connection that has reached its age
	callTime         = 30 * time.Second // for a call whose caller names no time of its own
	maxHeaderBytes   = 64 << 10
	streamWorkers    = 32 // for each CPU: goroutines that are kept for handling calls
	windowBytes      = 1 << 20
	connectionWindow = 4 << 20
)

func newGRPC(cfg *GRPC, certs *certificates) *grpc.Server {
	var security []grpc.ServerOption
	if certs != nil {
		security = append(security, grpc.Creds(credentials.NewTLS(certs.config())))
	}
	return grpc.NewServer(append(security,
		grpc.InTapHandle(bound),
		grpc.MaxRecvMsgSize(int(cfg.MaxMessageBytes)), // of other calls than checks
		grpc.MaxConcurrentStreams(streams),
		grpc.MaxHeaderListSize(maxHeaderBytes),
		grpc.ConnectionTimeout(handshakeTime),
		grpc.NumStreamWorkers(uint32(streamWorkers*runtime.GOMAXPROCS(0))),
		grpc.InitialWindowSize(windowBytes),
		grpc.InitialConnWindowSize(connectionWindow),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: pingInterval, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			Time: idlePing, Timeout: idlePingTimeout,
			MaxConnectionAge: time.Duration(cfg.MaxConnectionAge), MaxConnectionAgeGrace: ageGrace,
		}),
	)...)
}

// bound bounds calls whose callers do not, so that one that never sends its
// message does not stay for ever. A health watch may.
func bound(ctx context.Context, info *tap.Info) (context.Context, error) {
	if _, ok := ctx.Deadline(); ok || info.FullMethodName != authv3.Authorization_Check_FullMethodName {
		return ctx, nil
	}
	bounded, cancel := context.WithTimeout(ctx, callTime)
	context.AfterFunc(ctx, cancel) // ctx ends with the call
	return bounded, nil
}

// drain lets checks that were begun end, for at most that time.
func drain(s *grpc.Server, timeout time.Duration, log *slog.Logger) {
	ended := make(chan struct{})
	go func() { s.GracefulStop(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(timeout):
		log.Warn("checks still run at the end of the drain", "after", timeout.String())
		s.Stop()
		<-ended
	}
}

// readiness is what /readyz and the gRPC health service say.
type readiness struct {
	pool   *tenants.Pool
	health *health.Server

	mu      sync.Mutex
	stopped bool
}

// watch has the health service say what is so until the server is ready.
func (r *readiness) watch(ctx context.Context) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		if len(r.unready()) == 0 {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// set sets what the health service says. r.mu is held.
func (r *readiness) set(serving bool) {
	status := healthpb.HealthCheckResponse_NOT_SERVING
	if serving && !r.stopped {
		status = healthpb.HealthCheckResponse_SERVING
	}
	for _, service := range []string{"", authv3.Authorization_ServiceDesc.ServiceName} {
		r.health.SetServingStatus(service, status)
	}
}

// stop says not ready from now on.
func (r *readiness) stop() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stopped = true
	r.set(false)
}

// unready returns why the server is not ready, by what it waits for; it is
// empty when the server is ready. The health service says the same from then on.
func (r *readiness) unready() map[string]string {
	r.mu.Lock()
	defer r.mu.Unlock()
	why := map[string]string{}
	if r.stopped {
		why["server"] = "draining"
	}
	for id, state := range r.pool.Unready() {
		why["tenant "+string(id)] = state
	}
	r.set(len(why) == 0)
	return why
}
