package control

import (
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/gatehouse-authz/gatehouse/bundles"
)

// service is one HTTP service of a configuration.
type service struct {
	config   bundles.HTTPConfig
	identity string // differs where it would answer differently
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
	u, err := url.Parse(base)
	switch {
	case err != nil: // its text may have a password in it
		r.fault(o.at("url"), "is not a URL")
		u = &url.URL{}
	case u.Host == "" || u.Scheme != "http" && u.Scheme != "https":
		u.RawQuery = ""
		r.fault(o.at("url"), "%q is not an http or https URL", u.Redacted())
	}
	o.string("name", "")
	if t := o.string("type", ""); t != "" {
		r.fault(o.at("type"), "not supported: %q", t)
	}
	header := http.Header{}
	for name, value := range o.strings("headers") {
		header.Set(name, value)
	}
	wait := o.seconds("response_header_timeout_seconds", defaultHeaderWait)
	if wait <= 0 {
		r.fault(o.at("response_header_timeout_seconds"), "is not more than 0")
	}
	c := r.credentials(o, u, wait)
	o.end()

	parts := maps.Clone(o.m)
	delete(parts, "name")
	return service{
		config: bundles.HTTPConfig{
			URL:         base,
			Header:      header,
			Authorize:   c.authorize,
			Client:      c.client,
			S3:          c.s3,
			Limits:      r.opts.Limits,
			KeepArchive: r.opts.KeepArchive,
		},
		identity: identity(parts, c.signer, r.opts.Limits),
	}
}

// defaultHeaderWait is that of bundles.
const defaultHeaderWait = 15 * time.Second

// credentials are how requests to a service are sent and authorized.
type credentials struct {
	client    *http.Client              // nil: the one that bundles shares
	authorize func(*http.Request) error // nil: not at all
	s3        bool
	signer    string // the private key, of those in keys, that it signs with
}

// maxToken bounds a token that is read from a file.
const maxToken = 64 << 10

// bearer reads a token, or where to read it each time.
func (r *reader) bearer(o object) func(*http.Request) error {
	scheme := o.string("scheme", "Bearer")
	token := o.string("token", "")
	path := o.string("token_path", "")
	o.end()
	switch {
	case token != "" && path != "":
		r.fault(o.path, "token and token_path exclude each other")
	case token == "" && path == "":
		r.fault(o.path, "token or token_path is needed")
	}
	return func(req *http.Request) error {
		token := token
		if path != "" { // read each time, since such files are rotated
			info, err := os.Stat(path)
			if err != nil {
				return fmt.Errorf("reading token: %w", err)
			}
			if !info.Mode().IsRegular() || info.Size() > maxToken {
				return fmt.Errorf("token file %q is no regular file of at most %d bytes", path, maxToken)
			}
			b, err := os.ReadFile(path)
			if err != nil {
				return fmt.Errorf("reading token: %w", err)
			}
			token = strings.TrimSpace(string(b))
		}
		req.Header.Set("Authorization", scheme+" "+token)
		return nil
	}
}
