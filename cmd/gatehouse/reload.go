package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"reflect"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/gatehouse-authz/gatehouse/extauthz"
	"github.com/gatehouse-authz/gatehouse/httpserve"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// reloadInterval is how often the operator's files are looked at. They are read
// when they have changed and then stayed as they are for as long.
const reloadInterval = time.Second

// reloader reads the operator's file again, on SIGHUP and when it or a file of
// overrides_dir has changed, and certificates. A file with a fault changes
// nothing.
type reloader struct {
	config, dir string
	current     *Loaded
	pool        *tenants.Pool
	checks      *extauthz.Server
	web         *httpserve.Server
	certs       []*certificates
	log         *slog.Logger
	level       *logLevel
	outcomes    *prometheus.CounterVec
	applied     prometheus.Gauge
}

func newReloader(config, dir string, current *Loaded, pool *tenants.Pool, checks *extauthz.Server, web *httpserve.Server, reg prometheus.Registerer, log *slog.Logger, certs ...*certificates) *reloader {
	r := &reloader{
		config: config, dir: dir, current: current, pool: pool, checks: checks, web: web, log: log,
		outcomes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "gatehouse_config_reloads_total",
			Help: "Reads of a changed configuration, by outcome: applied, or refused for its faults.",
		}, []string{"outcome"}),
		applied: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "gatehouse_config_applied_timestamp_seconds",
			Help: "When the configuration in force was applied, in seconds since 1970.",
		}),
	}
	for _, c := range certs {
		if c != nil {
			r.certs = append(r.certs, c)
		}
	}
	r.outcomes.WithLabelValues("applied")
	r.outcomes.WithLabelValues("refused")
	r.applied.SetToCurrentTime()
	reg.MustRegister(r.outcomes, r.applied)
	return r
}

// run reloads until ctx ends.
func (r *reloader) run(ctx context.Context) {
	if r.config == "" {
		return // there is nothing to read again, and a directory's tenants are polled
	}
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)
	tick := time.NewTicker(reloadInterval)
	defer tick.Stop()
	inForce := r.current.seen
	last := inForce
	for {
		select {
		case <-hangup:
			inForce = r.reload(r.fingerprint())
		case <-tick.C:
			for _, c := range r.certs {
				c.reread()
			}
			now := r.fingerprint()
			if now != inForce && now == last {
				inForce = r.reload(now)
			}
			last = now
		case <-ctx.Done():
			return
		}
	}
}

// reload reads the files and applies them. It returns what they were seen to be,
// at the latest when they were read; seen: when they were looked at before.
func (r *reloader) reload(seen string) string {
	next, err := load(r.config, r.dir, false)
	if err != nil {
		r.outcomes.WithLabelValues("refused").Inc()
		r.log.Error("changed configuration refused, the old one stays in force", "error", err)
		return seen
	}
	if err := r.checks.Reload(routing(next)); err != nil { // load has compiled them already
		r.log.Error("changed configuration refused", "error", err)
		return seen
	}
	if err := r.web.Reload(httpConfig(next)); err != nil { // load has parsed it already
		r.log.Error("changed configuration refused", "error", err)
		return seen
	}
	moving := r.pool.Reload(tenants.Live{
		Settings: next.Settings,
		Capacity: int(next.Tenants.Capacity),
		Parked:   parked(next.Tenants.Parked),
		Grace:    time.Duration(next.Tenants.GracePeriod),
	})
	for _, n := range next.Notes {
		r.log.Warn("setting "+n.text, "key", n.path, "line", n.line)
	}
	for _, key := range needRestart(r.current, next) {
		r.log.Warn("changed setting needs a restart", "key", key)
	}
	level, _ := parseLevel(next.Log.Level) // load has checked it already
	r.level.configure(level)
	r.current = next
	r.outcomes.WithLabelValues("applied").Inc()
	r.applied.SetToCurrentTime()
	r.log.Info("configuration applied", "tenants_moving", moving)
	return next.seen
}

// needRestart returns the keys that differ and do not change while the server
// runs.
func needRestart(old, next *Loaded) []string {
	var keys []string
	for key, pair := range map[string][2]any{
		"grpc":                     {old.GRPC, next.GRPC},
		"drain":                    {old.Drain, next.Drain},
		"admin":                    {old.Admin, next.Admin},
		"http.listen":              {[]any{old.HTTP.Listen, old.listensHTTP()}, []any{next.HTTP.Listen, next.listensHTTP()}},
		"http.tls":                 {old.HTTP.TLS, next.HTTP.TLS},
		"persist":                  {old.Persist, next.Persist},
		"guard":                    {old.Guard, next.Guard},
		"tenants.preload":          {old.Tenants.Preload, next.Tenants.Preload},
		"tenants.required":         {old.Tenants.Required, next.Tenants.Required},
		"tenants.memory":           {old.Tenants.Memory, next.Tenants.Memory},
		"tenants.log_memory":       {old.Tenants.LogMemory, next.Tenants.LogMemory},
		"tenants.max_long_polls":   {old.Tenants.MaxLongPolls, next.Tenants.MaxLongPolls},
		"tenants.metric_labels":    {old.Tenants.MetricLabels, next.Tenants.MetricLabels},
		"redact":                   {old.Redact, next.Redact},
		"telemetry":                {old.Telemetry, next.Telemetry},
		"log.format":               {old.Log.Format, next.Log.Format},
		"tenants.recent_decisions": {old.Tenants.RecentDecisions, next.Tenants.RecentDecisions},
		"tenants.recent_memory":    {old.Tenants.RecentMemory, next.Tenants.RecentMemory},
		"tenants.body_memory":      {old.Tenants.BodyMemory, next.Tenants.BodyMemory},
	} {
		if !reflect.DeepEqual(pair[0], pair[1]) {
			keys = append(keys, key)
		}
	}
	return keys
}

// fingerprint tells states of the operator's files apart.
func (r *reloader) fingerprint() string {
	return seenFile(r.config) + seenFolder(r.current.OverridesDir)
}

// seenFile tells states of a file apart, by its size and its time.
func seenFile(path string) string {
	h := sha256.New()
	noteFile(h, path)
	return hex.EncodeToString(h.Sum(nil))
}

// seenFolder tells states of a folder's files apart. An empty name has none.
func seenFolder(dir string) string {
	if dir == "" {
		return ""
	}
	h := sha256.New()
	files, err := os.ReadDir(dir)
	if err != nil {
		fmt.Fprintf(h, "%v\n", err)
	}
	for _, f := range files {
		noteFile(h, filepath.Join(dir, f.Name()))
	}
	return hex.EncodeToString(h.Sum(nil))
}

func noteFile(h hash.Hash, path string) {
	info, err := os.Stat(path)
	if err != nil {
		fmt.Fprintf(h, "%q %v\n", path, err)
		return
	}
	fmt.Fprintf(h, "%q %d %d\n", path, info.Size(), info.ModTime().UnixNano())
}
