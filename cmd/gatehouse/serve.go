package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
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
	"github.com/gatehouse-authz/gatehouse/decisionlog"
	"github.com/gatehouse-authz/gatehouse/extauthz"
	"github.com/gatehouse-authz/gatehouse/httpserve"
	"github.com/gatehouse-authz/gatehouse/schedule"
	"github.com/gatehouse-authz/gatehouse/telemetry"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// serve runs the server until ctx ends, and drains it.
func serve(ctx context.Context, opts *options) error {
	dir := ""
	if len(opts.args) > 0 {
		dir = opts.args[0]
	}
	cfg, err := load(opts.config, dir, false)
	if err != nil {
		return err
	}
	opts.logAs(cfg.Log)
	defer opts.level.stop()
	for _, n := range cfg.Notes {
		opts.log.Warn("setting "+n.text, "key", n.path, "line", n.line)
	}
	pace, stopPace := fitContainer(opts.log)
	defer stopPace()
	s, err := newGatehouse(opts, dir, cfg, pace)
	if err != nil {
		return err
	}
	if err := s.listen(); err != nil {
		return err
	}
	return s.run(ctx)
}

// gatehouse is what listens, and what stands behind it.
type gatehouse struct {
	cfg *Loaded
	log *slog.Logger

	registry  *prometheus.Registry
	pool      *tenants.Pool
	logs      *decisionlog.Logs
	telemetry *telemetry.Telemetry // nil: off
	records   *telemetry.Records   // nil: off
	ready     *readiness
	reloads   *reloader

	grpc                       *grpc.Server
	http, admin                *http.Server
	grpcTLS, httpTLS, adminTLS *certificates // nil: plain
	onGRPC, onHTTP, onAdmin    net.Listener  // nil: off, but for gRPC
}

// newGatehouse makes one of a configuration.
func newGatehouse(opts *options, dir string, cfg *Loaded, pace *pacer) (*gatehouse, error) {
	registry := newRegistry()
	s := &gatehouse{cfg: cfg, log: opts.log, registry: registry}
	var err error
	for _, c := range []struct {
		key   string
		files TLS
		certs **certificates
	}{{"grpc", cfg.GRPC.TLS, &s.grpcTLS}, {"http", cfg.HTTP.TLS, &s.httpTLS}, {"admin", cfg.Admin.TLS, &s.adminTLS}} {
		if *c.certs, err = newCertificates(c.key, c.files, s.log); err != nil {
			return nil, fmt.Errorf("%s.tls: %w", c.key, err)
		}
	}
	var store *bundles.Store
	if cfg.Persist.Directory != "" {
		if store, err = bundles.NewStore(cfg.Persist.Directory); err != nil {
			return nil, fmt.Errorf("persist.directory: %w", err)
		}
	}
	budget := newBudgets(&cfg.Tenants)
	instance := tenants.NewDecisionID()
	if s.telemetry, err = newTelemetry(&cfg.Telemetry, instance, registry, s.log); err != nil {
		return nil, err
	}
	if s.records, err = newRecords(&cfg.Telemetry, s.telemetry); err != nil {
		return nil, err
	}
	work := schedule.New(int(cfg.Tenants.MaxLongPolls))
	console := new(console)
	s.logs = decisionlog.New(decisionlog.Config{
		Memory: budget.logs, Schedule: work, Redact: cfg.Redact == "default", Console: console,
		Recent: int(cfg.Tenants.RecentDecisions), RecentBytes: budget.recent, Exporter: exporterOf(s.records),
		Registerer: registry, Logger: s.log, Tracer: s.telemetry.Control(),
	})
	var web *httpserve.Server // there before the pool runs
	s.pool = tenants.New(tenants.Config{
		Schedule:   work,
		Logs:       s.logs,
		Console:    console,
		Activated:  func(id tenants.ID) { pace.loaded(); web.Activated(id) },
		Settings:   cfg.Settings,
		Capacity:   int(cfg.Tenants.Capacity),
		Parked:     parked(cfg.Tenants.Parked),
		Grace:      time.Duration(cfg.Tenants.GracePeriod),
		Store:      store,
		MaxStale:   time.Duration(cfg.Persist.MaxStale),
		Guard:      cfg.Guard,
		Lend:       lender(),
		Parallel:   parallel(),
		Memory:     budget.tenants,
		BodyMemory: budget.bodies,
		Preload:    cfg.Preload,
		Required:   cfg.Required,
		Instance:   instance,
		Tracing:    tenants.Tracing{Decisions: s.telemetry.Decisions(), Control: s.telemetry.Control(), Prints: s.telemetry != nil && cfg.Telemetry.Traces.Prints},
		Labels:     parked(cfg.Tenants.MetricLabels),
		Registerer: registry,
		Logger:     s.log,
	})

	checkConfig := routing(cfg)
	checkConfig.Pool, checkConfig.Refused, checkConfig.Logger = s.pool, s.pool.Refused, s.log
	checkConfig.MessageMemory, checkConfig.Propagators = budget.messages, cfg.Propagators
	checkConfig.MaxMessageBytes = int(cfg.GRPC.MaxMessageBytes)
	checks, err := extauthz.New(checkConfig)
	if err != nil {
		return nil, err
	}
	s.grpc = newGRPC(&cfg.GRPC, s.grpcTLS)
	checks.Register(s.grpc)
	healthServer := health.NewServer()
	healthpb.RegisterHealthServer(s.grpc, healthServer)
	if cfg.GRPC.Reflection {
		reflection.Register(s.grpc)
	}

	webConfig := httpConfig(cfg)
	webConfig.Inputs, webConfig.Propagators = inputs(checks), cfg.Propagators
	webConfig.Pool, webConfig.Answered, webConfig.Logger, webConfig.Memory = s.pool, answeredHTTP(registry), s.log, budget.bodies
	if web, err = httpserve.New(webConfig); err != nil {
		return nil, err
	}
	s.http = newHTTP(web, s.log)
	registry.MustRegister(&figures{checks, web, work, []*certificates{s.grpcTLS, s.httpTLS, s.adminTLS}})

	s.ready = &readiness{pool: s.pool, health: healthServer}
	trusted := loopback(cfg.Admin.Listen) || cfg.Admin.TLS.ClientCA != ""
	s.admin = newAdmin(s.pool, s.ready, registry, trusted, s.log, opts.level)
	s.reloads = newReloader(opts.config, dir, cfg, s.pool, checks, web, registry, s.log, s.grpcTLS, s.adminTLS, s.httpTLS)
	s.reloads.level = opts.level
	return s, nil
}

// listen opens the addresses.
func (s *gatehouse) listen() (err error) {
	defer func() {
		for _, l := range []net.Listener{s.onGRPC, s.onHTTP, s.onAdmin} {
			if err != nil && l != nil {
				err = errors.Join(err, l.Close())
			}
		}
	}()
	mode, err := socketMode(s.cfg.GRPC.SocketMode)
	if err != nil {
		return fmt.Errorf("grpc.socket_mode: %w", err)
	}
	if s.onGRPC, err = listen(s.cfg.GRPC.Listen, mode); err != nil {
		return fmt.Errorf("grpc.listen: %w", err)
	}
	if s.cfg.Admin.Listen != "" {
		if s.onAdmin, err = listenTLS(s.cfg.Admin.Listen, mode, s.adminTLS); err != nil {
			return fmt.Errorf("admin.listen: %w", err)
		}
	}
	if s.cfg.listensHTTP() {
		if s.onHTTP, err = listenTLS(s.cfg.HTTP.Listen, mode, s.httpTLS); err != nil {
			return fmt.Errorf("http.listen: %w", err)
		}
	}
	return nil
}

// listenTLS is listen, secured where there are certificates.
func listenTLS(address string, mode fs.FileMode, certs *certificates) (net.Listener, error) {
	l, err := listen(address, mode)
	if err == nil && certs != nil {
		l = tls.NewListener(l, certs.config())
	}
	return l, err
}

// addressOf is where a listener listens.
func addressOf(l net.Listener) string {
	if l == nil {
		return "off"
	}
	return l.Addr().String()
}

// run serves until ctx ends or a listener fails. Three stop one after the other:
// those that speak, the pool, and what delivers the decisions of both.
func (s *gatehouse) run(ctx context.Context) error {
	speaking, stopSpeaking := context.WithCancel(ctx)
	defer stopSpeaking()
	running, stopPool := context.WithCancel(context.Background())
	defer stopPool()
	logging, stopLogs := context.WithCancel(context.Background())
	defer stopLogs()
	var speakers, pooling, delivery sync.WaitGroup
	delivery.Go(func() { s.logs.Run(logging) })
	var poolErr error
	pooling.Go(func() { poolErr = s.pool.Run(running) })
	speakers.Go(func() { s.ready.watch(speaking) })
	speakers.Go(func() { s.reloads.run(speaking) })

	faults := make(chan error, 3)
	speak := func(name string, serve func() error) {
		speakers.Go(func() {
			if err := serve(); err != nil && !errors.Is(err, http.ErrServerClosed) {
				faults <- fmt.Errorf("%s server: %w", name, err)
			}
		})
	}
	speak("gRPC", func() error { return s.grpc.Serve(s.onGRPC) })
	if s.onAdmin != nil {
		speak("admin", func() error { return s.admin.Serve(s.onAdmin) })
	}
	if s.onHTTP != nil {
		speak("HTTP", func() error { return s.http.Serve(s.onHTTP) })
	}
	s.log.Info("serving", "version", version(), "grpc", addressOf(s.onGRPC), "http", addressOf(s.onHTTP), "admin", addressOf(s.onAdmin),
		"directory", s.reloads.dir, "config", s.reloads.config, "gomaxprocs", runtime.GOMAXPROCS(0))

	fault := s.await(ctx, faults)
	stopSpeaking()
	end := time.Now().Add(time.Duration(s.cfg.Drain.Timeout))
	var draining sync.WaitGroup
	draining.Go(func() { drainHTTP(s.http, end, s.log) })
	drain(s.grpc, time.Until(end), s.log)
	draining.Wait()
	stopPool()
	pooling.Wait()
	drainLogs(s.logs, end, s.log)
	stopLogs()
	delivery.Wait()
	_ = s.records.Close()                   // of what nobody uses any more
	drainTelemetry(s.telemetry, end, s.log) // of all that was done before
	_ = s.admin.Close()                     // until now it told how it goes
	speakers.Wait()
	if fault == nil && poolErr != nil {
		s.log.Warn("stopped with evaluations left running", "error", poolErr)
	}
	s.log.Info("stopped")
	return fault
}

// await returns when the server is to stop speaking: when a listener has failed,
// or ctx has ended and proxies have had time to look elsewhere.
func (s *gatehouse) await(ctx context.Context, faults <-chan error) error {
	defer s.ready.stop()
	select {
	case fault := <-faults:
		return fault
	case <-ctx.Done():
	}
	s.log.Info("draining", "delay", time.Duration(s.cfg.Drain.Delay).String(), "timeout", time.Duration(s.cfg.Drain.Timeout).String())
	s.ready.stop()
	select { // those that do not are answered meanwhile
	case <-time.After(time.Duration(s.cfg.Drain.Delay)):
		return nil
	case fault := <-faults:
		return fault
	}
}

// leastFlush is how long decisions are delivered at the end even where the drain
// has used up its time.
const leastFlush = 500 * time.Millisecond

// drainLogs delivers the decisions that are buffered.
func drainLogs(logs *decisionlog.Logs, end time.Time, log *slog.Logger) {
	ctx, cancel := context.WithTimeout(context.Background(), max(time.Until(end), leastFlush))
	defer cancel()
	logs.Drain(ctx)
	if n := logs.Books().Dropped["shutdown"]; n > 0 {
		log.Warn("decisions were not delivered by the end of the drain", "events", n)
	}
}

// console is standard output, to which each Write goes whole.
type console struct{ mu sync.Mutex }

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return os.Stdout.Write(p)
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
		grpc.ForceServerCodecV2(extauthz.Codec()),
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
