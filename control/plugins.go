package control

import (
	"fmt"

	"github.com/gatehouse-authz/gatehouse/policy"
)

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
		t.Path = p.string("path", DefaultEntry)
		t.Entry = r.entry(p.at("path"), t.Path)
		for i, path := range p.list("paths") {
			t.Entries = append(t.Entries, r.entry(fmt.Sprintf("%s[%d]", p.at("paths"), i), path))
		}
		t.DryRun = p.bool("dry-run")
		t.SkipBody = p.bool("skip-request-body-parse")
		t.ProtoDescriptor = p.string("proto-descriptor", "")
		p.end()
	}
	if o.has("gatehouse_http") {
		t.HTTP = r.http(o.object("gatehouse_http"), t.Entry)
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
