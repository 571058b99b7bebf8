package decisionlog

import (
	"context"
	"io"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/trace"

	"github.com/gatehouse-authz/gatehouse/schedule"
)

// Config is that of the logs of a process.
type Config struct {
	// Memory bounds what all logs buffer together, in bytes. Default 256 MiB.
	Memory int64

	// Workers is how many events are masked and encoded at once. Default half
	// of GOMAXPROCS, at least 1.
	Workers int

	// Schedule is where chunks are delivered, while it runs. Required.
	Schedule *schedule.Schedule

	// Redact hides secrets in each event before it goes to a sink. See Redacted.
	Redact bool

	// Console is where Console sinks write. Optional where there are none.
	Console io.Writer

	// Exporter is where Records sinks send. Optional where there are none.
	Exporter Exporter

	// Recent is how many of its last decisions are remembered of each tenant.
	// Default 0: none. RecentBytes bounds what those of all tenants take in
	// memory, by estimate; the oldest of all are forgotten to stay within it.
	// Default 16 MiB.
	Recent      int
	RecentBytes int64

	// Tracer makes a span of each request that delivers decisions. Optional.
	Tracer trace.Tracer

	// Registerer takes the metrics. Optional.
	Registerer prometheus.Registerer

	// Logger takes what goes wrong. Optional.
	Logger *slog.Logger
}

const defaultMemory = 256 << 20

// Logs are the logs of all tenants, and what they share. Its methods may be called
// by any number of goroutines.
type Logs struct {
	cfg     Config
	queue   queue
	shared  shared
	metrics *metrics
	recent  recent
	used    atomic.Int64  // bytes that all logs buffer
	stuck   atomic.Int64  // evaluations of filters that nobody waits for
	idle    chan struct{} // has room for one: nothing is buffered

	life     context.Context // that of deliveries: ends with Drain
	quit     context.CancelFunc
	attempts sync.WaitGroup // deliveries that go on

	mu   sync.Mutex
	logs map[*Log]struct{} // those that are not retired, or buffer something; guarded by mu
	past books             // of the logs that are not in logs; guarded by mu

	draining *schedule.Schedule // of Drain; nil: it was not called; guarded by mu
	ended    bool               // Drain delivers no more; guarded by mu
}

// New returns Logs. Nothing is delivered before Run.
func New(cfg Config) *Logs {
	if cfg.Memory <= 0 {
		cfg.Memory = defaultMemory
	}
	if cfg.Workers <= 0 {
		cfg.Workers = max(1, runtime.GOMAXPROCS(0)/2)
	}
	if cfg.RecentBytes <= 0 {
		cfg.RecentBytes = defaultRecentBytes
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	ls := &Logs{
		cfg:    cfg,
		queue:  newQueue(),
		shared: shared{console: cfg.Console, exporter: cfg.Exporter, lanes: map[string]int{}, locks: map[string]*lock{}},
		idle:   make(chan struct{}, 1),
		logs:   map[*Log]struct{}{},
		recent: recent{
			each: cfg.Recent, limit: cfg.RecentBytes,
			tenants: map[string]*recentOfOne{}, showing: make(chan struct{}, 1),
		},
	}
	ls.life, ls.quit = context.WithCancel(context.Background())
	ls.metrics = newMetrics(ls)
	return ls
}

// Open returns a log that takes events. It is to be retired when it is not
// needed any more.
func (ls *Logs) Open(s Settings) *Log {
	l := newLog(ls, s.orDefault())
	ls.mu.Lock()
	defer ls.mu.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	ls.enter(l)
	return l
}

// enter puts a log, in which nothing is buffered, among those that are known. ls.mu
// and l.mu are held.
func (ls *Logs) enter(l *Log) {
	l.known = true
	ls.logs[l] = struct{}{}
	switch {
	case ls.ended:
		l.closed = true
	case ls.draining != nil:
		l.drain(ls.draining)
	}
}

// Run encodes events until ctx ends, and then waits for what it started, but for
// evaluations of filters that do not end.
func (ls *Logs) Run(ctx context.Context) {
	var wg sync.WaitGroup
	for range ls.cfg.Workers {
		wg.Go(func() { ls.work(ctx) })
	}
	wg.Wait()
}

// endings is how long Drain waits, once ctx has ended, for what was begun before.
const endings = time.Second

// Drain encodes and delivers what is buffered until ctx ends. What is left then is
// dropped, and so is what is recorded later. It needs neither Run nor the schedule
// of Config to run; where they do, they help. It returns once all is delivered, or
// soon after ctx has ended.
func (ls *Logs) Drain(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	s := schedule.New(0)
	wg.Go(func() { s.Run(ctx) })
	for range ls.cfg.Workers {
		wg.Go(func() { ls.work(ctx) })
	}
	ls.mu.Lock()
	ls.draining = s
	for l := range ls.logs {
		l.mu.Lock()
		l.drain(s)
		l.mu.Unlock()
	}
	ls.mu.Unlock()
	ls.awaitIdle(ctx)
	cancel()
	wg.Wait()

	all := ls.end()
	for _, l := range all {
		l.close()
	}
	ls.quit()
	ended, stop := context.WithTimeout(context.Background(), endings)
	defer stop()
	ls.awaitIdle(ended)
	for _, l := range all {
		l.abandon()
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		ls.attempts.Wait()
	}()
	select {
	case <-done:
	case <-ended.Done(): // a file or the console does not answer
	}
}

// end returns the logs that there are. Those that are opened from now on deliver
// nothing.
func (ls *Logs) end() []*Log {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	ls.ended = true
	all := make([]*Log, 0, len(ls.logs))
	for l := range ls.logs {
		all = append(all, l)
	}
	return all
}

// awaitIdle returns when nothing is buffered, or ctx ends.
func (ls *Logs) awaitIdle(ctx context.Context) {
	for !ls.empty() {
		select {
		case <-ls.idle:
		case <-ctx.Done():
			return
		}
	}
}

// empty reports whether nothing is buffered. An event on its way from one hand to
// the next is counted nowhere for a moment, in which its log is locked.
func (ls *Logs) empty() bool {
	if ls.used.Load() > 0 {
		return false
	}
	_, bytes := ls.snapshot()
	return bytes == 0
}

// free gives back n bytes of the memory of all.
func (ls *Logs) free(n int64) {
	if ls.used.Add(-n) == 0 {
		select {
		case ls.idle <- struct{}{}:
		default:
		}
	}
}

// remember puts a log that was forgotten back among those that are known, and
// locks it.
func (ls *Logs) remember(l *Log) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	l.mu.Lock()
	if !l.known {
		ls.enter(l)
		ls.past.sub(&l.books)
	}
}

// forget forgets a log that is retired and buffers nothing, but for what it has
// counted.
func (ls *Logs) forget(l *Log) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.known && l.over() {
		l.known = false
		delete(ls.logs, l)
		ls.past.add(&l.books)
		l.filtering.filter = nil // no worker has the log, and a filter holds a policy
	}
}

// snapshot returns the books of all logs, and the bytes they buffer. Each log is
// seen at one instant, at which its books balance.
func (ls *Logs) snapshot() (books, int64) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	sum, bytes := ls.past, int64(0)
	for l := range ls.logs {
		l.mu.Lock()
		sum.add(&l.books)
		bytes += l.bytes
		l.mu.Unlock()
	}
	return sum, bytes
}

// Books returns the books of all logs, those that are retired included.
func (ls *Logs) Books() Books {
	b, _ := ls.snapshot()
	return b.export()
}
