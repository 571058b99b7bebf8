// Package control reads a tenant's OPA configuration.
//
// The operator writes one configuration for all tenants, as they would for an
// OPA with opa-envoy-plugin, in which each string may be a template of the
// tenant's name. For a tenant in use, Tenant expands it and reads it into what
// the rest of Gatehouse needs: the bundles with their sources, the labels, the
// entry points.
//
// A configuration is read strictly and whole: Parse reports all its faults at
// once, each with the path of its key. A key that would change a decision or
// lose data, and that is not supported, is a fault that names it. One that has
// no meaning for a tenant is a note.
//
// Where keys are configured that can verify, every bundle must be signed with
// one of them, also a bundle whose signing is not configured.
//
// A tenant's name is the only value that comes from outside. It is a value in
// the templates, never part of one.
package control

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/template"
	"time"

	"github.com/gatehouse-authz/gatehouse/bundles"
	"github.com/gatehouse-authz/gatehouse/policy"
)

// Tenant is the OPA configuration of one tenant, read. It is never changed.
type Tenant struct {
	Labels  map[string]string
	Bundles []Bundle // by name, at least one

	Entry   string   // the entry point that is asked by default
	Entries []string // others that a request may name

	DryRun          bool
	SkipBody        bool
	ProtoDescriptor string // a file; empty: none
}

// Bundle is one bundle of a tenant and where it comes from.
type Bundle struct {
	Name     string
	Resource string // its name at the source
	Source   bundles.Source

	// Service identifies the source and with which keys it verifies: bundles
	// of equal Service and Resource are the same. It says nothing of secrets.
	Service string

	// Final reports whether the source's word that there is no such bundle
	// ends a tenant that has it. Else the last good one goes on serving.
	Final bool

	// Read reads the bundle's archive as Source would: within its limits,
	// verified with its keys. Nil for a bundle of a directory, of which no
	// archive is kept.
	Read func(io.Reader) (*bundles.Bundle, error)

	MinDelay, MaxDelay time.Duration // between two polls
}

// Options are what a configuration is read with.
type Options struct {
	// Dir supplies every tenant's one bundle. Then the configuration may name
	// neither bundles nor discovery. Optional.
	Dir *bundles.Dir

	// Limits bound each bundle.
	Limits bundles.Limits

	// KeepArchive has services supply bundles with their Archive, as somebody
	// keeps them on disk.
	KeepArchive bool
}

// Fault is one thing that is wrong with a configuration.
type Fault struct {
	Path string // of the key, with dots: "services.s3.url"
	Text string
}

// Error gives the path and what is wrong there.
func (f Fault) Error() string {
	if f.Path == "" {
		return f.Text
	}
	return f.Path + ": " + f.Text
}

// Faults is an error that holds all faults of a configuration.
type Faults []Fault

func (fs Faults) Error() string {
	texts := make([]string, len(fs))
	for i, f := range fs {
		texts[i] = f.Error()
	}
	return strings.Join(texts, "; ")
}

// Template is a configuration for any number of tenants.
type Template struct {
	block map[string]any
	opts  Options
}

// DirBundle is the name of the one bundle of a tenant whose bundle comes from a
// directory.
const DirBundle = "policy"

// sample stands for a tenant's name while a template is checked.
const sample = "sample-tenant"

// Parse reads a configuration as YAML or JSON gives it: maps, lists, strings,
// numbers and booleans. The error is a Faults. The notes name keys that are
// accepted without effect.
func Parse(block map[string]any, opts Options) (t *Template, notes []Fault, err error) {
	t = &Template{block: block, opts: opts}
	_, notes, err = t.read(sample)
	if err != nil {
		return nil, notes, err
	}
	return t, notes, nil
}

// Tenant expands the configuration for a tenant's name, which must be one that
// is safe as it stands in a URL's path: it is not escaped. The error is a Faults.
func (t *Template) Tenant(name string) (*Tenant, error) {
	tenant, _, err := t.read(name)
	return tenant, err
}

func (t *Template) read(name string) (*Tenant, []Fault, error) {
	r := &reader{opts: t.opts}
	expanded := r.expand("", t.block, map[string]string{"tenant": name, "bundlename": name})
	tenant := &Tenant{Entry: DefaultEntry}
	if len(r.faults) == 0 {
		r.tenant(r.object("", expanded.(map[string]any)), tenant, name)
	}
	if len(r.faults) > 0 {
		return nil, r.notes, r.faults
	}
	return tenant, r.notes, nil
}

// expand executes the templates in all strings of v. Keys are not templates.
func (r *reader) expand(path string, v any, data map[string]string) any {
	switch v := v.(type) {
	case map[string]any:
		m := make(map[string]any, len(v))
		for _, k := range slices.Sorted(maps.Keys(v)) {
			m[k] = r.expand(join(path, k), v[k], data)
		}
		return m
	case []any:
		list := make([]any, len(v))
		for i := range v {
			list[i] = r.expand(fmt.Sprintf("%s[%d]", path, i), v[i], data)
		}
		return list
	case string:
		if !strings.Contains(v, "{{") {
			return v
		}
		tmpl, err := template.New("").Option("missingkey=error").Parse(v)
		if err != nil {
			r.fault(path, "template: %s", tail(err))
			return v
		}
		var b strings.Builder
		if err := tmpl.Execute(&b, data); err != nil {
			r.fault(path, "template: %s; there are .tenant and .bundlename", tail(err))
			return v
		}
		return b.String()
	}
	return v
}

// tail is the text of a template's error without the place in the template.
func tail(err error) string {
	s := err.Error()
	if i := strings.LastIndex(s, ">: "); i >= 0 {
		return s[i+3:]
	}
	return strings.TrimPrefix(s, "template: ")
}

// DefaultEntry is the entry point of a tenant that names none.
const DefaultEntry = "envoy/authz/allow"

func (r *reader) tenant(o object, t *Tenant, name string) {
	for _, key := range []string{"server", "storage", "persistence_directory", "default_decision",
		"default_authorization_decision", "caching", "nd_builtin_cache", "distributed_tracing", "extra", "addr", "diagnostic_addr"} {
		if o.has(key) {
			r.note(o.at(key), "has no effect here")
		}
	}
	for key, why := range map[string]string{
		"discovery":     "discovery",
		"decision_logs": "decision logs",
		"decision_log":  "decision logs",
		"status":        "status reports",
		"bundle":        "the deprecated single bundle; use bundles",
	} {
		if o.has(key) {
			r.fault(o.at(key), "not supported: %s", why)
		}
	}
	t.Labels = o.strings("labels")
	r.keys = r.readKeys(o.object("keys"))
	services := r.services(o)
	r.noteKeys(o.at("keys"))
	if r.opts.Dir != nil {
		if o.has("bundles") {
			r.fault(o.at("bundles"), "must be absent: bundles come from the directory")
		}
		o.value("bundles")
		bundle := Bundle{
			Name: DirBundle, Resource: name, Source: r.opts.Dir, Service: "dir", Final: true,
			MinDelay: dirMinDelay, MaxDelay: dirMaxDelay,
		}
		if verify := r.verification("", "", nil); verify != nil {
			bundle.Source = r.opts.Dir.Verified(verify)
			bundle.Service = identity("dir", verify)
		}
		t.Bundles = []Bundle{bundle}
	} else {
		r.bundles(o, services, t)
	}
	r.plugins(o.object("plugins"), t)
	o.end()
}

// Polling delays: those of OPA for services; a directory is near.
const (
	minDelay    = 60 * time.Second
	maxDelay    = 120 * time.Second
	dirMinDelay = time.Second
	dirMaxDelay = 2 * time.Second
)

func (r *reader) bundles(o object, services map[string]service, t *Tenant) {
	all := o.object("bundles")
	if len(all.m) == 0 {
		r.fault(join(o.path, "bundles"), "a tenant needs at least one bundle, or gatehouse serve a directory")
		return
	}
	for _, name := range slices.Sorted(maps.Keys(all.m)) {
		b := all.object(name)
		bundle := Bundle{Name: name, Resource: b.string("resource", "bundles/"+name)}
		if strings.HasPrefix(bundle.Resource, "file:") {
			r.fault(b.at("resource"), "not supported: a file; serve a directory instead")
		}
		if bundle.Resource == "" {
			r.fault(b.at("resource"), "is empty")
		}
		serviceName := b.string("service", "")
		if serviceName == "" && len(services) == 1 {
			for serviceName = range services {
			}
		}
		s, ok := services[serviceName]
		switch {
		case ok:
			config := s.config
			bundle.Service = s.identity
			if config.Verify = r.signing(b); config.Verify != nil {
				bundle.Service = identity(s.identity, config.Verify)
			}
			source := bundles.NewHTTP(config)
			bundle.Source = source
			bundle.Read = func(archive io.Reader) (*bundles.Bundle, error) { return source.Read(archive, bundle.Resource) }
		case serviceName == "":
			r.fault(b.at("service"), "is missing")
		default:
			r.fault(b.at("service"), "no service %q", serviceName)
		}
		r.polling(b, &bundle)
		b.value("signing")
		if b.bool("persist") && !r.opts.KeepArchive {
			r.fault(b.at("persist"), "bundles are kept on disk where the operator sets persist.directory")
		}
		if b.has("size_limit_bytes") {
			r.note(b.at("size_limit_bytes"), "has no effect here: tenants.limits bounds bundles")
		}
		b.end()
		t.Bundles = append(t.Bundles, bundle)
	}
	all.end()
}

func (r *reader) polling(b object, bundle *Bundle) {
	if trigger := b.string("trigger", "periodic"); trigger != "periodic" {
		r.fault(b.at("trigger"), "not supported: %q", trigger)
	}
	polling := b.object("polling")
	bundle.MinDelay = polling.seconds("min_delay_seconds", minDelay)
	bundle.MaxDelay = polling.seconds("max_delay_seconds", max(maxDelay, bundle.MinDelay))
	if polling.has("min_delay_seconds") != polling.has("max_delay_seconds") {
		r.fault(polling.path, "min_delay_seconds and max_delay_seconds go together")
	}
	if bundle.MinDelay > bundle.MaxDelay {
		r.fault(polling.path, "max_delay_seconds is less than min_delay_seconds")
	}
	if bundle.MinDelay < 0 || bundle.MaxDelay < 100*time.Millisecond {
		r.fault(polling.path, "max_delay_seconds is less than 0.1")
	}
	if polling.has("long_polling_timeout_seconds") {
		r.note(polling.at("long_polling_timeout_seconds"), "has no effect here: the bundle is polled")
	}
	polling.end()
}

// The plugin's two names in an OPA configuration.
var envoyPlugins = []string{"envoy_ext_authz_grpc", "envoy.ext_authz.grpc"}

func (r *reader) plugins(o object, t *Tenant) {
	for _, name := range envoyPlugins {
		p := o.object(name)
		if p.m == nil {
			continue
		}
		for _, key := range []string{"addr", "enable-reflection", "grpc-max-recv-msg-size", "grpc-max-send-msg-size",
			"enable-performance-metrics", "grpc-request-duration-seconds-buckets"} {
			if p.has(key) {
				r.note(p.at(key), "has no effect here: it is a setting of the process")
			}
		}
		if p.has("query") {
			r.fault(p.at("query"), "not supported: use path")
		}
		t.Entry = r.entry(p.at("path"), p.string("path", DefaultEntry))
		for i, path := range p.list("paths") {
			t.Entries = append(t.Entries, r.entry(fmt.Sprintf("%s[%d]", p.at("paths"), i), path))
		}
		t.DryRun = p.bool("dry-run")
		t.SkipBody = p.bool("skip-request-body-parse")
		t.ProtoDescriptor = p.string("proto-descriptor", "")
		p.end()
	}
	if o.has("gatehouse_http") {
		r.note(o.at("gatehouse_http"), "has no effect: this version has no HTTP API")
	}
	o.end()
}

func (r *reader) entry(path, value string) string {
	entry, err := policy.ParseEntry(value)
	if err != nil {
		r.fault(path, "%s", err)
	}
	return entry
}
