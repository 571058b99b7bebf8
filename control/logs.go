package control

import (
	"strings"
	"time"

	"github.com/gatehouse-authz/gatehouse/decisionlog"
)

// Log is the decision log of a tenant. It is never changed, and one value for all
// tenants of which the same is said.
type Log struct {
	// Settings are those of decisionlog, but for the tenant and its labels.
	decisionlog.Settings

	// Drop and Mask are the entry points of the rules that say which
	// decisions are not logged, and what of them is not.
	Drop, Mask string

	identity string
}

// Equal reports whether two say the same.
func (l *Log) Equal(other *Log) bool {
	if l == nil || other == nil {
		return l == other
	}
	return l.identity == other.identity
}

// Entry points of OPA's rules about the decision log, where none are configured.
const (
	DefaultDrop = "system/log/drop"
	DefaultMask = "system/log/mask"
)

func (r *reader) decisionLogs(o object, services map[string]service, t *Tenant) {
	if o.has("decision_log") {
		r.fault(o.at("decision_log"), "not supported: use decision_logs")
	}
	if !o.has("decision_logs") {
		return
	}
	l := o.object("decision_logs")
	if l.has("plugin") {
		r.fault(l.at("plugin"), "not supported: plugins of one's own")
	}
	if l.has("request_context") {
		r.note(l.at("request_context"), "has no effect: the input has the request's headers")
	}
	if l.has("nd_builtin_cache") {
		r.note(l.at("nd_builtin_cache"), "has no effect: it belongs at the top of the block")
	}
	t.Log = &Log{
		Drop: r.entry(l.at("drop_decision"), strings.TrimPrefix(l.string("drop_decision", DefaultDrop), "data/")),
		Mask: r.entry(l.at("mask_decision"), strings.TrimPrefix(l.string("mask_decision", DefaultMask), "data/")),
	}
	r.sinks(l, services, t.Log)
	r.reporting(l.object("reporting"), t.Log)
	t.Log.identity = identity(l.m)
	for _, sink := range t.Log.Sinks {
		t.Log.identity = identity(t.Log.identity, sink.Identity())
	}
	t.Log = logs.get(t.Log.identity, t.Log)
	l.end()
}

// sinks reads where a decision log goes.
func (r *reader) sinks(l object, services map[string]service, log *Log) {
	l.value("resource")
	l.value("partition_name")
	if l.bool("console") {
		log.Sinks = append(log.Sinks, decisionlog.Console{})
	}
	if l.has("file") {
		f := l.object("file")
		path := f.string("path", "")
		if path == "" {
			r.fault(f.at("path"), "is missing")
		}
		log.Sinks = append(log.Sinks, decisionlog.NewFile(decisionlog.FileConfig{
			Path: path, MaxBytes: f.count("max_bytes", 100<<20, 1<<10, 1<<40), MaxFiles: int(f.count("max_files", 5, 1, 1000)),
		}))
		f.end()
	}
	if l.has("s3") {
		s3 := l.object("s3")
		prefix := s3.string("prefix", "decisions")
		if service, ok := r.serviceOf(s3, services); ok {
			log.Sinks = append(log.Sinks, decisionlog.NewS3(decisionlog.S3Config{HTTP: service.http(), Prefix: prefix}))
		}
		s3.end()
	}
	if l.bool("otlp") {
		if !r.opts.Records {
			r.fault(l.at("otlp"), "needs telemetry.otlp.endpoint")
		}
		log.Sinks = append(log.Sinks, decisionlog.Records{})
	}
	if l.has("service") || len(log.Sinks) == 0 {
		service, ok := r.serviceOf(l, services)
		if !ok {
			return
		}
		log.Sinks = append(log.Sinks, decisionlog.NewService(decisionlog.ServiceConfig{
			HTTP: service.http(), Resource: l.string("resource", ""), Partition: l.string("partition_name", ""),
		}))
	}
}

// http says how decisions are sent to the service.
func (s *service) http() decisionlog.HTTPConfig {
	return decisionlog.HTTPConfig{
		URL: s.config.URL, Header: s.config.Header, Authorize: s.config.Authorize, Client: s.config.Client,
		Credentials: s.identity,
	}
}

// reporting reads how a decision log is buffered and sent.
func (r *reader) reporting(o object, log *Log) {
	rep := &log.Reporting
	rep.MinDelay, rep.MaxDelay = r.delays(o, 300*time.Second, 600*time.Second)
	rep.UploadBytes = o.count("upload_size_limit_bytes", 32<<10, 90, 64<<20)
	rep.BufferBytes = o.count("buffer_size_limit_bytes", 0, 0, 1<<40)
	events := o.count("buffer_size_limit_events", 10_000, 1, 1<<32)
	switch kind := o.string("buffer_type", "size"); kind {
	case "size":
	case "event":
		rep.BufferEvents = events
	default:
		r.fault(o.at("buffer_type"), "%q is not size or event", kind)
	}
	rep.DecisionsPerSecond = o.number("max_decisions_per_second", 0)
	switch r.trigger(o, "immediate") {
	case "immediate":
		rep.Trigger = decisionlog.Immediate
	case "manual":
		rep.Trigger = decisionlog.Manual
	}
	switch choice := o.string("on_full", "drop_oldest"); choice {
	case "drop_oldest":
		log.OnFull = decisionlog.DropOldest
	case "drop_newest":
		log.OnFull = decisionlog.DropNewest
	case "wait":
		log.OnFull = decisionlog.Wait
	case "deny":
		log.OnFull = decisionlog.Deny
	default:
		r.fault(o.at("on_full"), "%q is not drop_oldest, drop_newest, wait or deny", choice)
	}
	log.MaxWait = o.seconds("max_wait_seconds", 0)
	o.end()
}
