package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/gatehouse-authz/gatehouse/bundles"
	"github.com/gatehouse-authz/gatehouse/control"
	"github.com/gatehouse-authz/gatehouse/extauthz"
	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// maxConfig bounds the operator's file, in bytes.
const maxConfig = 16 << 20

// Loaded is the operator's file and directory, read and checked: what the rest
// is made of.
type Loaded struct {
	*Config
	Dir         *bundles.Dir // nil: none is served
	Default     tenants.ID
	Preload     []tenants.ID
	Required    []tenants.ID
	Descriptors map[string]*extauthz.Descriptors // :: proto-descriptor file → its types
	Propagators tenants.Propagators
	Notes       []fault
	Guard       *tenants.Settings // nil: there is none

	tenants   tenantSet
	overrides map[tenants.ID]tenantSet
	offered   bool   // some tenant may offer something over HTTP
	seen      string // what tells the state of the files, when they were about to be read
}

// tenantSet is what the file says of a tenant.
type tenantSet struct {
	keys     TenantKeys
	template *control.Template
	network  *policy.Network
}

// load reads the operator's file and the directory; each may be "". With
// anyDir, a file that leaves the bundles to a directory is read as if there were
// one. The error holds all faults, each with its place.
func load(path, dir string, anyDir bool) (*Loaded, error) {
	l := &loader{Loaded: &Loaded{Config: defaultConfig()}}
	if path != "" {
		// Before they are read: who looks at them again sees each change after it.
		seen := seenFile(path)
		if err := l.read(path); err != nil {
			return nil, err
		}
		l.seen = seen + seenFolder(l.OverridesDir)
	}
	if dir != "" {
		var err error
		if l.Dir, err = bundles.NewDir(dir, l.limits(l.Tenants.Limits)); err != nil {
			l.fault("", "%s", err)
		}
	}
	if anyDir && dir == "" && !l.namesBundles() {
		l.Dir = new(bundles.Dir)
	}
	l.check(dir != "" || l.Dir != nil)
	l.faults.file = path
	var all []error
	for _, f := range append([]faults{l.faults}, l.others...) {
		if len(f.all) > 0 {
			slices.SortStableFunc(f.all, func(a, b fault) int { return a.line - b.line })
			all = append(all, &f)
		}
	}
	if len(all) > 0 {
		return nil, errors.Join(all...)
	}
	return l.Loaded, nil
}

// namesBundles reports whether the file says where bundles come from.
func (l *loader) namesBundles() bool {
	n := &l.OPA
	if n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if key := n.Content[i].Value; key == "bundles" || key == "discovery" {
			return true
		}
	}
	return false
}

// loader collects faults while it loads.
type loader struct {
	*Loaded
	root   yaml.Node
	places places
	faults faults
	others []faults // of the files of overrides_dir
}

func (l *loader) fault(path, format string, args ...any) {
	l.faults.all = append(l.faults.all, fault{l.places.line(path), path, fmt.Sprintf(format, args...)})
}

var (
	lineText     = regexp.MustCompile(`^line (\d+): (?s:(.*))$`)
	unknownField = regexp.MustCompile(`^field (\S+) not found in type `)
	badType      = regexp.MustCompile("^cannot unmarshal !!(\\w+)(?: `(.*)`)? into \\S+$")
)

func (l *loader) read(path string) error {
	text, err := readBounded(path)
	if err != nil {
		return err
	}
	if err := yaml.Unmarshal(text, &l.root); err != nil {
		l.yaml(err)
		return nil
	}
	l.places.root = &l.root
	dec := yaml.NewDecoder(bytes.NewReader(text))
	dec.KnownFields(true)
	if err := dec.Decode(l.Config); err != nil && !errors.Is(err, io.EOF) {
		l.yaml(err)
	}
	return nil
}

// readBounded reads a file of the operator.
func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxConfig {
		return nil, fmt.Errorf("%s: file is larger than %d bytes", path, maxConfig)
	}
	return text, nil
}

// yaml adds the faults of a YAML error, which may be many.
func (l *loader) yaml(err error) {
	texts := []string{strings.TrimPrefix(err.Error(), "yaml: ")}
	var typeError *yaml.TypeError
	if errors.As(err, &typeError) {
		texts = typeError.Errors
	}
	for _, text := range texts {
		f := fault{text: text}
		if m := lineText.FindStringSubmatch(text); m != nil {
			f.line, _ = strconv.Atoi(m[1])
			f.text = m[2]
		}
		if m := unknownField.FindStringSubmatch(f.text); m != nil {
			f.text = fmt.Sprintf("unknown key %q", m[1])
		}
		if m := badType.FindStringSubmatch(f.text); m != nil {
			f.text = fmt.Sprintf("value %q has the wrong type (%s)", m[2], m[1])
		}
		l.faults.all = append(l.faults.all, f)
	}
}

// check checks what the file asks for as a whole, and makes of it what the
// rest needs.
func (l *loader) check(hasDir bool) {
	l.redact()
	if _, _, err := listenAddress(l.GRPC.Listen); err != nil {
		l.fault("grpc.listen", "%s", err)
	}
	if l.Admin.Listen != "" {
		if _, _, err := listenAddress(l.Admin.Listen); err != nil {
			l.fault("admin.listen", "%s", err)
		}
	}
	l.http()
	l.log()
	l.transport()
	if l.Tenants.RecentDecisions > maxRecentDecisions {
		l.fault("tenants.recent_decisions", "is %d, limit %d", l.Tenants.RecentDecisions, maxRecentDecisions)
	}
	if l.Tenants.Capacity < 1 {
		l.fault("tenants.capacity", "is 0, at least 1 is needed")
	}
	for i, r := range l.Tenants.Resolve {
		if err := r.Validate(); err != nil {
			l.fault(fmt.Sprintf("tenants.resolve[%d]", i), "%s", err)
		}
	}
	if l.Tenants.Default != "" {
		l.Default = l.tenantID("tenants.default", l.Tenants.Default)
	}
	for i, name := range l.Tenants.Required {
		l.Required = append(l.Required, l.tenantID(fmt.Sprintf("tenants.required[%d]", i), name))
	}
	l.preload(hasDir)
	if n := len(l.Required) + len(l.Preload); l.Tenants.Capacity > 0 && n > int(l.Tenants.Capacity) {
		l.fault("tenants.capacity", "is %d, less than the %d tenants to preload", l.Tenants.Capacity, n)
	}
	l.telemetry()
	l.guard()
	l.opa()
}

// maxRecentDecisions bounds the decisions of a tenant that are remembered.
const maxRecentDecisions = 1000

// log checks what is logged.
func (l *loader) log() {
	if _, err := parseLevel(l.Log.Level); err != nil {
		l.fault("log.level", "%q is not debug, info, warn or error", l.Log.Level)
	}
	if l.Log.Format != "json" && l.Log.Format != "text" {
		l.fault("log.format", "%q is not json or text", l.Log.Format)
	}
}

// transport checks the certificates and what relies on them.
func (l *loader) transport() {
	discard := slog.New(slog.DiscardHandler)
	for key, files := range map[string]TLS{"grpc.tls": l.GRPC.TLS, "admin.tls": l.Admin.TLS, "http.tls": l.HTTP.TLS} {
		if _, err := newCertificates(key, files, discard); err != nil {
			l.fault(key, "%s", err)
		}
		if files.ClientOptional && key != "http.tls" {
			l.fault(key+".client_optional", "is of http.tls alone")
		}
	}
	if l.GRPC.TLS.ClientCA == "" {
		if len(l.Tenants.Peers) > 0 {
			l.fault("tenants.peers", "needs grpc.tls.client_ca: without it no proxy has an ID")
		}
		for i, r := range l.Tenants.Resolve {
			if r.PeerID != nil {
				l.fault(fmt.Sprintf("tenants.resolve[%d]", i), "peer_id needs grpc.tls.client_ca: without it no proxy has an ID")
			}
		}
	}
	if _, err := socketMode(l.GRPC.SocketMode); err != nil {
		l.fault("grpc.socket_mode", "%s", err)
	}
}

// redact checks what is hidden.
func (l *loader) redact() {
	if l.Redact != "default" && l.Redact != "none" {
		l.fault("redact", "%q is not default or none", l.Redact)
	}
}

func (l *loader) note(path, text string) {
	l.Notes = append(l.Notes, fault{l.places.line(path), path, text})
}

// tenantKeys checks the keys at path that are a tenant's own.
func (l *loader) tenantKeys(path string, k *TenantKeys) {
	if k.OnPartialBody != "evaluate" && k.OnPartialBody != "deny" {
		l.fault(join(path, "on_partial_body"), "%q is not evaluate or deny", k.OnPartialBody)
	}
	if _, err := policy.ParseEvaluator(k.Evaluator); err != nil {
		l.fault(join(path, "evaluator"), "%q is not auto, topdown or plan", k.Evaluator)
	}
	if _, ok := tenants.ParseShare(k.Verify); !ok {
		l.fault(join(path, "verify"), "%q is not a share like 1/1000", k.Verify)
	}
	if err := tenants.CheckHeader(k.DecisionID.Header); err != nil {
		l.fault(join(path, "decision_id.header"), "%s", err)
	}
	if _, err := networkOf(k.Network.AllowHosts); err != nil {
		l.fault(join(path, "network.allow_hosts"), "%s", err)
	}
}

// networks are what policies may reach, by its hosts: tenants of equal hosts
// share the connections, also over reloads.
var networks sync.Map // :: hosts, with newlines → *policy.Network

// networkOf returns what policies may reach of these hosts; nil: nothing.
func networkOf(hosts []string) (*policy.Network, error) {
	if len(hosts) == 0 {
		return nil, nil
	}
	sorted := slices.Compact(slices.Sorted(slices.Values(hosts)))
	key := strings.Join(sorted, "\n")
	if n, ok := networks.Load(key); ok {
		return n.(*policy.Network), nil
	}
	n, err := policy.NewNetwork(policy.NetworkOptions{Hosts: sorted})
	if err != nil {
		return nil, err
	}
	used, _ := networks.LoadOrStore(key, n)
	return used.(*policy.Network), nil
}

func (l *loader) tenantID(path, name string) tenants.ID {
	id, err := tenants.ParseID(name)
	if err != nil {
		l.fault(path, "%s", err)
	}
	return id
}

func (l *loader) preload(hasDir bool) {
	if slices.Equal(l.Tenants.Preload, []string{"*"}) {
		if !hasDir {
			l.fault("tenants.preload", `"*" needs a directory of tenants`)
			return
		}
		if l.Dir == nil || *l.Dir == (bundles.Dir{}) {
			return // faulted already, or any
		}
		names, err := l.Dir.Names()
		if err != nil {
			l.fault("tenants.preload", "%s", err)
		}
		for _, name := range names {
			if id, err := tenants.ParseID(name); err == nil && !slices.Contains(l.Required, id) {
				l.Preload = append(l.Preload, id)
			}
		}
		return
	}
	for i, name := range l.Tenants.Preload {
		l.Preload = append(l.Preload, l.tenantID(fmt.Sprintf("tenants.preload[%d]", i), name))
	}
}

// limits are the bounds of bundles.
func (l *loader) limits(limits Limits) bundles.Limits {
	return bundles.Limits{Bytes: int64(limits.BundleBytes), Expanded: int64(limits.BundleExpandedBytes), Turns: turns}
}

// turns bound the large bundles that the process reads at once.
var turns = bundles.NewTurns(0)

// opa reads the OPA configuration of all tenants, and of those with overrides.
func (l *loader) opa() {
	l.overrides = map[tenants.ID]tenantSet{}
	l.Descriptors = map[string]*extauthz.Descriptors{}
	block := l.block("opa", &l.OPA)
	l.tenantKeys("tenants", &l.Config.Tenants.TenantKeys)
	l.tenants = l.set("opa", block, l.Config.Tenants.TenantKeys)

	for _, name := range slices.Sorted(maps.Keys(l.Overrides)) {
		node := l.Overrides[name]
		l.override("overrides."+name, name, &node, block)
	}
	l.overridesDir(block)
}

// join joins the path of a key and one below it.
func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

// guard reads what the operator's own policy is.
func (l *loader) guard() {
	if l.Config.Guard.Bundle == "" {
		return
	}
	entry, err := policy.ParseEntry(or(l.Config.Guard.Path, control.DefaultEntry))
	if err != nil {
		l.fault("guard.path", "%s", err)
	}
	path, err := filepath.Abs(l.Config.Guard.Bundle)
	if err != nil {
		l.fault("guard.bundle", "%s", err)
		return
	}
	dir, err := bundles.NewDir(filepath.Dir(path), l.limits(l.Tenants.Limits))
	if err != nil {
		l.fault("guard.bundle", "%s", err)
		return
	}
	name := strings.TrimSuffix(filepath.Base(path), ".tar.gz")
	if _, err := dir.Fetch(context.Background(), name, ""); err != nil {
		l.fault("guard.bundle", "%s", err)
	}
	l.Guard = &tenants.Settings{Tenant: &control.Tenant{
		Bundles: []control.Bundle{control.Local("guard", name, dir, path)},
		Entry:   entry,
	}}
}

// block decodes an OPA configuration and puts in the environment.
func (l *loader) block(path string, n *yaml.Node) map[string]any {
	block := map[string]any{}
	if n.IsZero() {
		return block
	}
	if err := n.Decode(&block); err != nil {
		l.fault(path, "is not a mapping")
	}
	return l.environment(path, block).(map[string]any)
}

var environmentName = regexp.MustCompile(`\$\{([^{}]*)\}`)

// environment replaces ${NAME} in the strings of v, as OPA does in its own
// configuration.
func (l *loader) environment(path string, v any) any {
	switch v := v.(type) {
	case map[string]any:
		for key, value := range v {
			v[key] = l.environment(join(path, key), value)
		}
	case []any:
		for i, value := range v {
			v[i] = l.environment(fmt.Sprintf("%s[%d]", path, i), value)
		}
	case string:
		return environmentName.ReplaceAllStringFunc(v, func(ref string) string {
			name := strings.TrimSpace(ref[2 : len(ref)-1])
			value, ok := os.LookupEnv(name)
			if !ok {
				l.fault(path, "environment variable %q is not set", name)
			}
			return value
		})
	}
	return v
}

// set reads what the file says of a tenant; path is where its opa block is.
func (l *loader) set(path string, block map[string]any, keys TenantKeys) tenantSet {
	template, notes, err := control.Parse(block, control.Options{
		Dir: l.Dir, Limits: l.limits(keys.Limits), KeepArchive: l.Persist.Directory != "",
		Records: l.Config.Telemetry.OTLP.Endpoint != "",
	})
	for _, n := range notes {
		l.note(join(path, n.Path), n.Text)
	}
	var parse control.Faults
	if errors.As(err, &parse) {
		for _, f := range parse {
			at := path
			if f.Path != "" {
				at = join(path, f.Path)
			}
			l.fault(at, "%s", f.Text)
		}
		return tenantSet{}
	}
	l.descriptors(path, template)
	l.offers(path, template)
	network, _ := networkOf(keys.Network.AllowHosts) // faulted where the keys were checked
	return tenantSet{keys, template, network}
}

// descriptors loads the descriptor set that a configuration names.
func (l *loader) descriptors(path string, t *control.Template) {
	sample, err := t.Tenant("sample-tenant")
	if err != nil || sample.ProtoDescriptor == "" || l.Descriptors[sample.ProtoDescriptor] != nil {
		return
	}
	d, err := extauthz.LoadDescriptors(sample.ProtoDescriptor)
	if err != nil {
		l.fault(path+".plugins.envoy_ext_authz_grpc.proto-descriptor", "%s", err)
		return
	}
	l.Descriptors[sample.ProtoDescriptor] = d
}

// Settings returns the settings of a tenant.
func (l *Loaded) Settings(id tenants.ID) (*tenants.Settings, error) {
	set, ok := l.overrides[id]
	if !ok {
		set = l.tenants
	}
	tenant, err := set.template.Tenant(string(id))
	if err != nil {
		return nil, err
	}
	verify, _ := tenants.ParseShare(set.keys.Verify) // which is checked
	return &tenants.Settings{
		Tenant: tenant,
		Limits: tenants.Limits{
			EvaluationTime: time.Duration(set.keys.Limits.EvaluationTime),
			Concurrency:    int(set.keys.Limits.Concurrency),
			BodyBytes:      int64(set.keys.Limits.BodyBytes),
			BodyMemory:     int64(set.keys.Limits.BodyMemory),
		},
		OnError:      tenants.OnError(set.keys.OnError),
		WholeBody:    set.keys.OnPartialBody == "deny",
		Network:      set.network,
		AllowHeaders: set.keys.AllowHeaders,
		Evaluator:    policy.Evaluator(set.keys.Evaluator),
		Verify:       verify,
		Naming: tenants.Naming{
			Header: strings.ToLower(set.keys.DecisionID.Header), Upstream: set.keys.DecisionID.Upstream, Client: set.keys.DecisionID.Client,
		},
	}, nil
}
