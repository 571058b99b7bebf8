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
	"sync"
	"text/template"
	"time"

	"github.com/gatehouse-authz/gatehouse/bundles"
	"github.com/gatehouse-authz/gatehouse/policy"
)

// Tenant is the OPA configuration of one tenant, read. It is never changed.
type Tenant struct {
	Labels  map[string]string
	Bundles []Bundle // by name; none before what Discovery supplies is known

	// Discovery supplies the rest of the configuration. Nil: this is all.
	Discovery *Discovery

	// Overridden are keys of what was discovered that are not in force, since
	// the operator's configuration has them too.
	Overridden []string

	// HTTP is what the tenant offers over HTTP. Nil: nothing.
	HTTP *HTTP

	// Log is the decision log. Nil: there is none.
	Log *Log

	// Status says where the tenant's status goes. Nil: nowhere.
	Status *Status

	// Caching says what builtins remember between questions.
	Caching policy.Caching

	// NDBuiltinCache has decision logs show what builtins gave that depends
	// on more than their arguments.
	NDBuiltinCache bool

	Entry   string   // the entry point that is asked by default
	Path    string   // Entry as the configuration has it, and as decisions are logged
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

	// LongPoll is how long the source may wait for something new before it
	// answers, where it can. Zero: it is not asked to wait.
	LongPoll time.Duration

	// Manual has the bundle fetched once, and then only when somebody asks.
	Manual bool
}

// Options are what a configuration is read with.
type Options struct {
	// Dir supplies every tenant's one bundle. Then the configuration may name
	// neither bundles nor discovery. Optional.
	Dir *bundles.Dir

	// Limits bound each bundle.
	Limits bundles.Limits

	// Records says that there is a collector, to which decisions can be sent as
	// log records.
	Records bool

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
	texts sync.Map // :: string of block that is a template → *template.Template
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
	expanded := r.expand("", t.block, &t.texts, map[string]string{"tenant": name, "bundlename": name})
	tenant := &Tenant{Entry: DefaultEntry, Path: DefaultEntry}
	boot := expanded.(map[string]any)
	if len(r.faults) == 0 {
		r.tenant(r.object("", boot), tenant, name)
	}
	if len(r.faults) > 0 {
		return nil, r.notes, r.faults
	}
	if d := tenant.Discovery; d != nil {
		d.identity = identity(boot, t.opts)
		d.read = func(doc map[string]any) (*Tenant, error) { return t.discovered(name, boot, doc) }
	}
	return tenant, r.notes, nil
}

// templated reports whether a string of v is a template.
func templated(v any) bool {
	switch v := v.(type) {
	case map[string]any:
		for _, value := range v {
			if templated(value) {
				return true
			}
		}
	case []any:
		return slices.ContainsFunc(v, templated)
	case string:
		return strings.Contains(v, "{{")
	}
	return false
}

// expand executes the templates in all strings of v, which are kept in texts once
// they are parsed. Keys are not templates. What has no template in it is returned as
// it is; nobody changes it.
func (r *reader) expand(path string, v any, texts *sync.Map, data map[string]string) any {
	if !templated(v) {
		return v
	}
	switch v := v.(type) {
	case map[string]any:
		m := make(map[string]any, len(v))
		for _, k := range slices.Sorted(maps.Keys(v)) {
			m[k] = r.expand(join(path, k), v[k], texts, data)
		}
		return m
	case []any:
		list := make([]any, len(v))
		for i := range v {
			list[i] = r.expand(fmt.Sprintf("%s[%d]", path, i), v[i], texts, data)
		}
		return list
	case string:
		parsed, ok := texts.Load(v)
		if !ok {
			tmpl, err := template.New("").Option("missingkey=error").Parse(v)
			if err != nil {
				r.fault(path, "template: %s", tail(err))
				return v
			}
			parsed, _ = texts.LoadOrStore(v, tmpl)
		}
		var b strings.Builder
		if err := parsed.(*template.Template).Execute(&b, data); err != nil {
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
		"default_authorization_decision", "distributed_tracing", "extra", "addr", "diagnostic_addr"} {
		if o.has(key) {
			r.note(o.at(key), "has no effect here")
		}
	}
	if o.has("bundle") {
		r.fault(o.at("bundle"), "not supported: the deprecated single bundle; use bundles")
	}
	t.Labels = o.strings("labels")
	t.NDBuiltinCache = o.bool("nd_builtin_cache")
	r.caching(o, t)
	r.keys = r.readKeys(o.object("keys"))
	services := r.services(o)
	r.noteKeys(o.at("keys"))
	switch {
	case r.opts.Dir != nil:
		r.directory(o, t, name)
	default:
		r.discovery(o, services, t)
		r.bundles(o, services, t)
	}
	r.decisionLogs(o, services, t)
	r.status(o, services, t)
	r.plugins(o.object("plugins"), t)
	o.end()
}
