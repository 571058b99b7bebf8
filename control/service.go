package control

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"

	"github.com/gatehouse-authz/gatehouse/bundles"
)

// service is one HTTP service of a configuration.
type service struct {
	source   bundles.Source
	identity string // differs where the source would answer differently
}

// services reads the services, which stand in a map by name, or in a list with
// their names.
func (r *reader) services(o object) map[string]service {
	defs := map[string]object{}
	if list, ok := o.value("services").([]any); ok {
		path := o.at("services")
		for i, v := range list {
			m, ok := v.(map[string]any)
			if !ok {
				r.fault(fmt.Sprintf("%s[%d]", path, i), "is not a mapping")
				continue
			}
			s := r.object(fmt.Sprintf("%s[%d]", path, i), m)
			defs[s.string("name", "")] = s
		}
	} else {
		all := o.object("services")
		for _, name := range slices.Sorted(maps.Keys(all.m)) {
			defs[name] = all.object(name)
		}
		all.end()
	}
	services := make(map[string]service, len(defs))
	for _, name := range slices.Sorted(maps.Keys(defs)) {
		if name == "" {
			r.fault(o.at("services"), "a service has no name")
		}
		services[name] = r.service(defs[name])
	}
	return services
}

func (r *reader) service(o object) service {
	base := o.string("url", "")
	if u, err := url.Parse(base); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		r.fault(o.at("url"), "%q is not an http or https URL", base)
	}
	o.string("name", "")
	if t := o.string("type", ""); t != "" {
		r.fault(o.at("type"), "not supported: %q", t)
	}
	for _, key := range []string{"tls", "allow_insecure_tls"} {
		if o.has(key) {
			r.fault(o.at(key), "not supported")
		}
	}
	if o.has("response_header_timeout_seconds") {
		r.note(o.at("response_header_timeout_seconds"), "has no effect here: the wait is 15 s")
	}
	header := http.Header{}
	for name, value := range o.strings("headers") {
		header.Set(name, value)
	}
	authorize, credentials := r.credentials(o.object("credentials"))
	o.end()

	h := sha256.New()
	fmt.Fprintf(h, "%q %q %+v", base, credentials, r.opts.Limits)
	for _, name := range slices.Sorted(maps.Keys(header)) {
		fmt.Fprintf(h, " %q:%q", name, header[name])
	}
	return service{
		source: bundles.NewHTTP(bundles.HTTPConfig{
			URL:       base,
			Header:    header,
			Authorize: authorize,
			Limits:    r.opts.Limits,
		}),
		identity: hex.EncodeToString(h.Sum(nil)),
	}
}

// maxToken bounds a token that is read from a file.
const maxToken = 64 << 10

// credentials reads how requests to a service are authorized, and what sets
// these credentials apart from others.
func (r *reader) credentials(o object) (authorize func(*http.Request) error, identity string) {
	bearer := o.object("bearer")
	o.end()
	if bearer.m == nil {
		return nil, ""
	}
	scheme := bearer.string("scheme", "Bearer")
	token := bearer.string("token", "")
	path := bearer.string("token_path", "")
	bearer.end()
	switch {
	case token != "" && path != "":
		r.fault(bearer.path, "token and token_path exclude each other")
	case token == "" && path == "":
		r.fault(bearer.path, "token or token_path is needed")
	}
	return func(req *http.Request) error {
		token := token
		if path != "" { // read each time, since such files are rotated
			info, err := os.Stat(path)
			if err != nil {
				return fmt.Errorf("reading token: %w", err)
			}
			if info.Size() > maxToken {
				return fmt.Errorf("token file %q has %d bytes, limit %d", path, info.Size(), maxToken)
			}
			b, err := os.ReadFile(path)
			if err != nil {
				return fmt.Errorf("reading token: %w", err)
			}
			token = strings.TrimSpace(string(b))
		}
		req.Header.Set("Authorization", scheme+" "+token)
		return nil
	}, scheme + "\x00" + token + "\x00" + path
}
