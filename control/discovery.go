package control

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/gatehouse-authz/gatehouse/policy"
)

// Discovery is where a tenant's configuration comes from beside the operator's:
// a bundle whose policy says it.
//
// Whoever writes that bundle is not the operator. What it says may name the
// services and keys that the operator has, and no others; it may not name files,
// and neither the environment nor templates are put into it. Where both say
// something, the operator's word holds.
type Discovery struct {
	Bundle

	// Decision is the path below data of the document that is the
	// configuration; "" is all of data.
	Decision string

	identity string // of all that the operator says
	read     func(doc map[string]any) (*Tenant, error)
}

// Equal reports whether the operator says the same about two tenants, whatever
// is discovered.
func (d *Discovery) Equal(other *Discovery) bool {
	if d == nil || other == nil {
		return d == other
	}
	return d.identity == other.identity
}

// discoveryName is the name of the bundle, where it needs one.
const discoveryName = "discovery"

func (r *reader) discovery(o object, services map[string]service, t *Tenant) {
	if !o.has("discovery") {
		return
	}
	d := o.object("discovery")
	name := d.string("name", "")
	prefix := d.string("prefix", "bundles")
	resource := d.string("resource", "")
	if resource == "" {
		if name == "" {
			r.fault(d.at("resource"), "is missing")
		}
		resource = strings.Trim(prefix, "/") + "/" + strings.Trim(name, "/")
	}
	decision := d.string("decision", name)
	if decision != "" {
		var err error
		if decision, err = policy.ParseEntry(strings.ReplaceAll(decision, ".", "/")); err != nil {
			r.fault(d.at("decision"), "%s", err)
		}
	}
	t.Discovery = &Discovery{Bundle: r.bundle(d, discoveryName, resource, services), Decision: decision}
	d.end()
}

// Tenant returns the tenant whose configuration is that of the operator and, as
// far as it says nothing, doc: the value of the discovery bundle's Decision as
// JSON gives it. The error is a Faults.
func (d *Discovery) Tenant(doc any) (*Tenant, error) {
	m, ok := doc.(map[string]any)
	if !ok {
		return nil, Faults{{Path: discoveryName, Text: "the discovered configuration is not an object"}}
	}
	return d.read(m)
}

// discovered reads the configuration of a tenant of which boot is the
// operator's part, expanded, and doc what was discovered.
func (t *Template) discovered(name string, boot, doc map[string]any) (*Tenant, error) {
	r := &reader{opts: t.opts}
	r.restrict(boot, doc)
	tenant := &Tenant{Entry: DefaultEntry, Path: DefaultEntry}
	if len(r.faults) == 0 {
		merged := r.merge("", boot, doc)
		for _, key := range []string{"services", "keys"} { // equal to the operator's
			if delete(merged, key); boot[key] != nil {
				merged[key] = boot[key]
			}
		}
		merged["discovery"] = boot["discovery"]
		r.tenant(r.object("", merged), tenant, name)
		if len(r.faults) == 0 && len(tenant.Bundles) == 0 {
			r.fault("bundles", "the discovered configuration names none")
		}
	}
	for i := range r.faults {
		r.faults[i].Path = join(discoveryName, r.faults[i].Path)
	}
	if len(r.faults) > 0 {
		return nil, r.faults
	}
	slices.Sort(r.overridden)
	tenant.Overridden = r.overridden
	return tenant, nil
}

// restrict faults what a discovered configuration may not say.
func (r *reader) restrict(boot, doc map[string]any) {
	for _, key := range []string{"services", "keys"} {
		own := named(boot[key])
		if doc[key] != nil && named(doc[key]) == nil {
			r.fault(key, "may not be discovered: only what the operator's configuration has can be named")
		}
		for name, def := range named(doc[key]) {
			if own[name] == nil || identity(own[name]) != identity(def) {
				r.fault(join(key, name), "may not be discovered: only what the operator's configuration has can be named")
			}
		}
	}
	for _, path := range []string{
		"decision_logs.file", "decision_logs.s3", "decision_logs.otlp",
		"plugins.envoy_ext_authz_grpc.proto-descriptor", "plugins.envoy.ext_authz.grpc.proto-descriptor",
	} {
		if at(doc, path) != nil {
			r.fault(path, "may not be discovered: it names a place outside")
		}
	}
	for _, path := range []string{"plugins.gatehouse_http.auth", "plugins.gatehouse_http.cors"} {
		if at(doc, path) != nil {
			r.fault(path, "may not be discovered: who may ask is the operator's to say")
		}
	}
}

// named returns the members of a mapping, or of a list by their name.
func named(v any) map[string]any {
	switch v := v.(type) {
	case map[string]any:
		return v
	case []any:
		m := make(map[string]any, len(v))
		for i, def := range v {
			name := fmt.Sprint(i)
			if def, ok := def.(map[string]any); ok {
				name, _ = def["name"].(string)
			}
			m[name] = def
		}
		return m
	}
	return nil
}

// at returns the value at a path of keys, of which some have dots.
func at(m map[string]any, path string) any {
	for _, key := range slices.Sorted(maps.Keys(m)) {
		if key == path {
			return m[key]
		}
		if rest, ok := strings.CutPrefix(path, key+"."); ok {
			if child, ok := m[key].(map[string]any); ok {
				if v := at(child, rest); v != nil {
					return v
				}
			}
		}
	}
	return nil
}

// merge returns doc with what boot says put over it, and notes what that changes.
func (r *reader) merge(path string, boot, doc map[string]any) map[string]any {
	merged := maps.Clone(doc)
	if merged == nil {
		merged = map[string]any{}
	}
	for key, value := range boot {
		over, isMap := value.(map[string]any)
		under, wasMap := merged[key].(map[string]any)
		if isMap && wasMap {
			merged[key] = r.merge(join(path, key), over, under)
			continue
		}
		if was, ok := merged[key]; ok && identity(was) != identity(value) {
			r.overridden = append(r.overridden, join(path, key))
		}
		merged[key] = value
	}
	return merged
}
