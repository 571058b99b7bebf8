package tenants

import (
	"context"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"go.opentelemetry.io/otel/trace"

	"github.com/gatehouse-authz/gatehouse/bundles"
	"github.com/gatehouse-authz/gatehouse/control"
	"github.com/gatehouse-authz/gatehouse/decisionlog"
	"github.com/gatehouse-authz/gatehouse/schedule"
)

// Times of status reports.
const (
	// reportWithin is within what a change is reported: many changes at once are
	// one report.
	reportWithin = time.Second
	// reportMin and reportMax are what lies between two reports of a tenant of
	// which nothing changes.
	reportMin, reportMax = 60 * time.Second, 120 * time.Second
)

// message is the status of a tenant, as OPA's status API takes it
// (https://www.openpolicyagent.org/docs/management-status).
type message struct {
	Labels    map[string]string        `json:"labels"`
	Bundles   map[string]*bundleReport `json:"bundles,omitempty"`
	Discovery *bundleReport            `json:"discovery,omitempty"`
	Logs      *logReport               `json:"decision_logs,omitempty"`
	Plugins   map[string]pluginReport  `json:"plugins,omitempty"`
}

// bundleReport is the status of one bundle.
type bundleReport struct {
	Name                     string      `json:"name"`
	ActiveRevision           string      `json:"active_revision,omitempty"`
	LastSuccessfulActivation time.Time   `json:"last_successful_activation"`
	Type                     string      `json:"type,omitempty"`
	Size                     int64       `json:"size,omitempty"`
	LastSuccessfulDownload   time.Time   `json:"last_successful_download"`
	LastSuccessfulRequest    time.Time   `json:"last_successful_request"`
	LastRequest              time.Time   `json:"last_request"`
	Code                     string      `json:"code,omitempty"`
	Message                  string      `json:"message,omitempty"`
	Errors                   []error     `json:"errors,omitempty"`
	Metrics                  object      `json:"metrics,omitempty"`
	HTTPCode                 json.Number `json:"http_code,omitempty"`
}

// object is a JSON object.
type object map[string]any

// logReport is the status of the decision log.
type logReport struct {
	Code     string      `json:"code,omitempty"`
	Message  string      `json:"message,omitempty"`
	HTTPCode json.Number `json:"http_code,omitempty"`
}

type pluginReport struct {
	State   string `json:"state"`
	Message string `json:"message,omitempty"`
}

// The states of OPA's plugins.
const (
	pluginOK       = "OK"
	pluginNotReady = "NOT_READY"
)

// fail sets the error of a bundle as OPA does.
func (b *bundleReport) fail(err error) {
	if err == nil {
		return
	}
	b.Code, b.Message = "bundle_error", err.Error()
	if compile, ok := errors.AsType[ast.Errors](err); ok {
		b.Message = "error(s) occurred while compiling module(s)"
		for _, e := range compile {
			b.Errors = append(b.Errors, e)
		}
		return
	}
	if status, ok := errors.AsType[*bundles.StatusError](err); ok {
		b.failHTTP(status)
	}
}

// failHTTP sets a status, other than 200 and 304, with which a service has
// answered.
func (b *bundleReport) failHTTP(status *bundles.StatusError) {
	b.HTTPCode = json.Number(strconv.Itoa(status.Code))
	b.Message = "server replied with " + status.Text()
}

// report returns what is known of a feed's bundle.
func (f *feed) report(name string) *bundleReport {
	f.mu.Lock()
	defer f.mu.Unlock()
	b := &bundleReport{
		Name: name, Type: f.kind, Metrics: object{},
		LastRequest: f.requested.UTC(), LastSuccessfulRequest: f.checked.UTC(), LastSuccessfulDownload: f.downloaded.UTC(),
	}
	if f.took > 0 {
		b.Metrics["timer_bundle_request_ns"] = f.took.Nanoseconds()
	}
	b.fail(f.err)
	if _, ok := f.source.(*bundles.HTTP); ok && errors.Is(f.err, bundles.ErrNotFound) && b.HTTPCode == "" {
		b.failHTTP(&bundles.StatusError{Code: 404})
	}
	return b
}

// message returns the status of in.
func (p *Pool) message(in *instance) *message {
	p.mu.Lock()
	settings, feeds := in.settings, in.known
	discovery, from := in.discovery, in.discoveredFrom
	p.mu.Unlock()
	in.mu.Lock()
	st := in.status
	in.mu.Unlock()

	rev := in.current.Load()
	m := &message{
		Labels: p.labelsOf(in.id, settings), Bundles: p.bundlesOf(settings, feeds, rev, &st),
		Plugins: map[string]pluginReport{
			"discovery":            {State: pluginOK},
			"status":               {State: pluginOK},
			"envoy_ext_authz_grpc": {State: pluginOK},
		},
	}
	if discovery != nil {
		m.Discovery = discoveryOf(settings, discovery, from, &st)
		if from.part == nil {
			m.Plugins["discovery"] = pluginReport{State: pluginNotReady}
		}
	}
	switch {
	case rev != nil:
		m.Plugins["bundle"] = pluginReport{State: pluginOK}
	case len(settings.Bundles) > 0:
		m.Plugins["bundle"] = pluginReport{State: pluginNotReady}
	}
	if settings.Log != nil {
		m.Plugins["decision_logs"] = pluginReport{State: pluginOK}
		m.Logs = &logReport{}
	}
	if s, ok := in.logStatus(); ok {
		m.Logs = logReportOf(s)
	}
	return m
}

// bundlesOf returns the status of the bundles of settings, of which these are the
// feeds, and rev what decides; nil: nothing does.
func (p *Pool) bundlesOf(settings *Settings, feeds []*feed, rev *revision, st *status) map[string]*bundleReport {
	loaded := true
	for _, f := range feeds {
		_, ok := f.latest()
		loaded = loaded && ok
	}
	all := map[string]*bundleReport{}
	for i, f := range feeds {
		name := settings.Bundles[i].Name
		b := f.report(name)
		newest, _ := f.latest()
		decides := rev != nil && rev.content[i].equal(newest)
		if rev != nil {
			b.ActiveRevision = rev.policy.Revisions()[i].Revision
			b.LastSuccessfulActivation = st.activated.UTC()
			b.Size = rev.content[i].size
			b.Metrics["timer_rego_module_compile_ns"] = st.compiled.Nanoseconds()
		}
		// What was loaded and does not decide was refused.
		if b.Code == "" && loaded && !decides {
			b.fail(st.err)
		}
		all[name] = b
	}
	return all
}

// discoveryOf returns the status of the discovery bundle; from is the content that
// is in force, if any is.
func discoveryOf(settings *Settings, f *feed, from content, st *status) *bundleReport {
	b := f.report("discovery")
	b.Metrics = nil // as of OPA
	newest, _ := f.latest()
	b.Size = newest.size
	if b.Code == "" {
		b.fail(st.discovery)
	}
	if from.part == nil {
		return b
	}
	if keys := settings.Overridden; len(keys) > 0 && b.Code == "" {
		b.Message = "Keys in the discovered configuration overridden by boot configuration: " + strings.Join(keys, ", ")
	}
	b.ActiveRevision = from.part.Revision
	b.LastSuccessfulActivation = st.discovered.UTC()
	return b
}

// reportSoon has the status sent soon.
func (in *instance) reportSoon() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.reporter.changed()
}

// reporter sends the status of one instance.
type reporter struct {
	pool  *Pool
	in    *instance
	sink  *control.Status
	task  *schedule.Task
	fails int // in a row; the task's own
}

// reportTo has the status of in go to sink from now on; nil: nowhere.
func (p *Pool) reportTo(in *instance, sink *control.Status) {
	r := p.newReporter(in, sink)
	in.mu.Lock()
	old := in.reporter
	in.reporter = r
	in.mu.Unlock()
	old.stop()
}

// newReporter returns what sends the status of in; nil: nobody wants it.
func (p *Pool) newReporter(in *instance, sink *control.Status) *reporter {
	if sink == nil {
		return nil
	}
	r := &reporter{pool: p, in: in, sink: sink}
	r.task = p.schedule.NewTask("status "+sink.Service, r.send)
	return r
}

// changed has the status sent soon.
func (r *reporter) changed() {
	if r != nil && !r.sink.Manual {
		r.task.At(time.Now().Add(rand.N(reportWithin)))
	}
}

// reportNow has the status sent at once, also where it is only when somebody
// asks.
func (in *instance) reportNow() {
	in.mu.Lock()
	defer in.mu.Unlock()
	if r := in.reporter; r != nil {
		r.task.At(time.Now())
	}
}

func (r *reporter) stop() {
	if r != nil {
		r.task.Stop()
	}
}

// send is one report. What could not be sent is not kept: the next report has
// what is so then.
func (r *reporter) send(ctx context.Context, _ bool) (wait time.Duration, slow bool) {
	text, err := json.Marshal(r.pool.message(r.in))
	if err != nil {
		r.pool.log.Error("status of the tenant cannot be written", "tenant", r.in.id, "error", err)
		return -1, false
	}
	if r.sink.Console && r.pool.cfg.Console != nil {
		if _, err := r.pool.cfg.Console.Write(statusLine(text)); err != nil {
			r.pool.log.Error("status not written to the console", "tenant", r.in.id, "error", err)
		}
	}
	if r.sink.Service != "" {
		err = r.post(ctx, text)
	}
	switch {
	case err == nil:
		r.fails = 0
	case r.fails == 0:
		r.pool.log.Warn("status not sent", "tenant", r.in.id, "error", err)
		fallthrough
	default:
		r.fails++
		return backoff(r.fails, reportMax, err), false
	}
	if r.sink.Manual {
		return -1, false
	}
	return reportMin + rand.N(reportMax-reportMin), false
}

// post sends a report to the service, unless that fails for many.
func (r *reporter) post(ctx context.Context, text []byte) error {
	restraint := r.pool.feeds.restraint("status " + r.sink.Service)
	if !restraint.ask(time.Now()) {
		return errRestraint
	}
	ctx, span := r.pool.cfg.Tracing.roundTrip(ctx, "status report", trace.SpanKindClient)
	span.set(attrTenant.String(string(r.in.id)))
	err := r.sink.Send(ctx, text)
	span.end(err)
	restraint.answered(err)
	if err != nil {
		r.pool.metrics.reports.WithLabelValues("failed").Inc()
		return err
	}
	r.pool.metrics.reports.WithLabelValues("sent").Inc()
	return nil
}

// statusLine is a report as OPA writes it to its console.
func statusLine(text []byte) []byte {
	head := `{"level":"info","msg":"Status Log","time":` + strconv.Quote(time.Now().UTC().Format(time.RFC3339)) +
		`,"type":"openpolicyagent.org/status",`
	return slices.Concat([]byte(head), text[1:], []byte("\n"))
}

// logReportOf is how a decision log does, as OPA reports it.
func logReportOf(s decisionlog.Status) *logReport {
	return &logReport{Code: s.Code, Message: s.Message, HTTPCode: json.Number(s.HTTPCode)}
}
