package control

import (
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/gatehouse-authz/gatehouse/bundles"
)

// Polling delays: those of OPA for services; a directory is near.
const (
	minDelay    = 60 * time.Second
	maxDelay    = 120 * time.Second
	dirMinDelay = time.Second
	dirMaxDelay = 2 * time.Second
)

func (r *reader) bundles(o object, services map[string]service, t *Tenant) {
	all := o.object("bundles")
	if len(all.m) == 0 && t.Discovery == nil {
		r.fault(join(o.path, "bundles"), "a tenant needs at least one bundle, or discovery, or gatehouse serve a directory")
		return
	}
	for _, name := range slices.Sorted(maps.Keys(all.m)) {
		b := all.object(name)
		t.Bundles = append(t.Bundles, r.bundle(b, name, b.string("resource", "bundles/"+name), services))
		b.end()
	}
	all.end()
}

// bundle reads what bundles and a discovery bundle have in common.
func (r *reader) bundle(b object, name, resource string, services map[string]service) Bundle {
	bundle := Bundle{Name: name, Resource: resource}
	if strings.HasPrefix(bundle.Resource, "file:") {
		r.fault(b.at("resource"), "not supported: a file; serve a directory instead")
	}
	if bundle.Resource == "" {
		r.fault(b.at("resource"), "is empty")
	}
	if s, ok := r.serviceOf(b, services); ok {
		config := s.config
		bundle.Service = s.identity
		if config.Verify = r.signing(b); config.Verify != nil {
			bundle.Service = identity(s.identity, config.Verify)
		}
		src := sources.get(identity(bundle.Service, config.KeepArchive), &source{bundles.NewHTTP(config), bundle.Service})
		bundle.Source, bundle.Service = src.HTTP, src.service
		bundle.Read = func(archive io.Reader) (*bundles.Bundle, error) { return src.Read(archive, resource) }
	}
	b.value("signing")
	bundle.Manual = r.trigger(b) == "manual"
	r.polling(b, &bundle)
	if b.bool("persist") && !r.opts.KeepArchive {
		r.fault(b.at("persist"), "bundles are kept on disk where the operator sets persist.directory")
	}
	if b.has("size_limit_bytes") {
		r.note(b.at("size_limit_bytes"), "has no effect here: tenants.limits bounds bundles")
	}
	return bundle
}

// source is where bundles of one Service come from, for all tenants.
type source struct {
	*bundles.HTTP
	service string
}

// serviceOf returns the service that o names, or the only one there is.
func (r *reader) serviceOf(o object, services map[string]service) (service, bool) {
	name := o.string("service", "")
	if name == "" && len(services) == 1 {
		for name = range services {
		}
	}
	s, ok := services[name]
	switch {
	case ok:
	case name == "":
		r.fault(o.at("service"), "is missing")
	default:
		r.fault(o.at("service"), "no service %q", name)
	}
	return s, ok
}

// trigger reads one of OPA's trigger modes.
func (r *reader) trigger(o object, more ...string) string {
	trigger := o.string("trigger", "periodic")
	if trigger != "periodic" && trigger != "manual" && !slices.Contains(more, trigger) {
		r.fault(o.at("trigger"), "not supported: %q", trigger)
	}
	return trigger
}

func (r *reader) polling(b object, bundle *Bundle) {
	polling := b.object("polling")
	bundle.MinDelay, bundle.MaxDelay = r.delays(polling, minDelay, maxDelay)
	bundle.LongPoll = polling.seconds("long_polling_timeout_seconds", 0)
	if polling.has("long_polling_timeout_seconds") && (bundle.LongPoll < time.Second || bundle.LongPoll > maxLongPoll) {
		r.fault(polling.at("long_polling_timeout_seconds"), "is not between 1 and %d", int(maxLongPoll.Seconds()))
	}
	polling.end()
}

// maxLongPoll bounds the time that a source is waited for.
const maxLongPoll = time.Hour

// delays reads the two between which the time to the next turn lies.
func (r *reader) delays(o object, defMin, defMax time.Duration) (least, most time.Duration) {
	least = o.seconds("min_delay_seconds", defMin)
	most = o.seconds("max_delay_seconds", max(defMax, least))
	if o.has("min_delay_seconds") != o.has("max_delay_seconds") {
		r.fault(o.path, "min_delay_seconds and max_delay_seconds go together")
	}
	if least > most {
		r.fault(o.path, "max_delay_seconds is less than min_delay_seconds")
	}
	if least < 0 || most < 100*time.Millisecond {
		r.fault(o.path, "max_delay_seconds is less than 0.1")
	}
	return least, most
}

// directory gives a tenant its one bundle from the directory.
func (r *reader) directory(o object, t *Tenant, name string) {
	for _, key := range []string{"bundles", "discovery"} {
		if o.has(key) {
			r.fault(o.at(key), "must be absent: bundles come from the directory")
		}
	}
	bundle := Bundle{
		Name: DirBundle, Resource: name, Source: r.opts.Dir, Service: "dir", Final: true,
		MinDelay: dirMinDelay, MaxDelay: dirMaxDelay,
	}
	if verify := r.verification("", "", nil); verify != nil {
		bundle.Source = r.opts.Dir.Verified(verify)
		bundle.Service = identity("dir", verify)
	}
	t.Bundles = []Bundle{bundle}
}
