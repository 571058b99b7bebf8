package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"net/http"
	"net/url"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"weak"

	"github.com/open-policy-agent/opa/v1/keys"
	"github.com/open-policy-agent/opa/v1/logging"
	"github.com/open-policy-agent/opa/v1/plugins/rest"

	"github.com/gatehouse-authz/gatehouse/bundles"
)

// credentials reads how a service is reached: the keys tls, allow_insecure_tls
// and credentials, which are those of OPA's rest.Config. Everything that OPA
// accepts there is accepted, but for plugins of one's own.
//
// OPA's code makes the credentials: it reads the environment and files, and asks
// AWS, GCP, Azure or a token endpoint by itself, over the process's default
// transport and the proxy of the environment. The requests for bundles go over
// transports of our own.
func (r *reader) credentials(o object, base *url.URL, wait time.Duration) credentials {
	faults := len(r.faults)
	config := map[string]any{}
	for _, key := range []string{"tls", "allow_insecure_tls"} {
		if o.has(key) {
			config[key] = r.known(o.at(key), o.m[key], fieldOf(reflect.TypeFor[rest.Config](), key))
		}
	}
	all := o.object("credentials")
	if all.has("plugin") {
		r.fault(all.at("plugin"), "not supported: plugins of one's own")
	}
	methods := slices.DeleteFunc(slices.Sorted(maps.Keys(all.m)), func(m string) bool { return m == "plugin" })
	method := ""
	switch len(methods) {
	case 0:
	case 1:
		method = methods[0]
		known := r.known(all.path, map[string]any{method: all.m[method]}, fieldOf(reflect.TypeFor[rest.Config](), "credentials"))
		config["credentials"] = known
	default:
		r.fault(all.path, "%s exclude each other", strings.Join(methods, " and "))
	}
	if len(r.faults) > faults {
		return credentials{}
	}

	c := credentials{}
	var signers map[string]*keys.Config
	switch method {
	case "bearer":
		c.authorize = r.bearer(all.object(method))
	case "oauth2":
		if id, _ := all.m[method].(map[string]any)["signing_key"].(string); id != "" {
			if key := r.keys[id]; key == nil || key.PrivateKey == "" {
				r.fault(all.at(method)+".signing_key", "no key %q with a private_key", id)
				return c
			}
			c.signer = r.keys[id].Algorithm + " " + r.keys[id].PrivateKey
			signers = map[string]*keys.Config{id: r.keys[id]}
			if r.signers == nil {
				r.signers = map[string]bool{}
			}
			r.signers[id] = true
		}
	case "s3_signing":
		service, _ := all.m[method].(map[string]any)["service"].(string)
		c.s3 = service == "" || strings.EqualFold(service, "s3")
	}
	if insecure, _ := config["allow_insecure_tls"].(bool); insecure {
		r.note(o.at("allow_insecure_tls"), "the service is not asked for a certificate that is good")
	}

	// What authorizes depends on the host; what connects, on TLS alone.
	login := maps.Clone(config)
	login["url"] = base.Scheme + "://" + strings.TrimSuffix(base.Host, ":")
	if method != "" && method != "bearer" && method != "client_tls" {
		a := newAuth(login, signers)
		if err := a.check(); err != nil {
			r.fault(all.at(method), "%s", a.text(err))
			return c
		}
		c.authorize = auths.get(identity(login, c.signer), a).authorize
	}
	connect := maps.Clone(config)
	connect["url"] = "https://tls"
	if method != "client_tls" {
		delete(connect, "credentials")
	}
	if len(connect) > 1 || wait != defaultHeaderWait {
		t := &transport{config: encode(connect), wait: wait}
		if _, err := t.open(); err != nil && !unreadable(err) {
			at := o.path
			if method == "client_tls" {
				at = all.at(method)
			}
			r.fault(at, "%s", brief(err.Error()))
			return c
		}
		c.client = &http.Client{Transport: transports.get(identity(connect, wait), t)}
	}
	return c
}

// fieldOf returns the type of the field that JSON calls by that name; nil:
// there is none.
func fieldOf(t reflect.Type, name string) reflect.Type {
	for i := range t.NumField() {
		f := t.Field(i)
		tag, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if f.IsExported() && tag == name {
			return f.Type
		}
	}
	return nil
}

// known faults what OPA would ignore or not decode: keys that the type has not,
// and values of another kind. It returns v with each mapping without a value
// made an empty one.
func (r *reader) known(path string, v any, t reflect.Type) any {
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	is := ""
	switch t.Kind() {
	case reflect.Struct, reflect.Map:
		m, ok := v.(map[string]any)
		if !ok && v != nil {
			is = "a mapping"
			break
		}
		out := make(map[string]any, len(m))
		for _, key := range slices.Sorted(maps.Keys(m)) {
			var field reflect.Type
			if t.Kind() == reflect.Map {
				field = t.Elem()
			} else if field = fieldOf(t, key); field == nil {
				r.fault(join(path, key), "unknown or unsupported key")
				continue
			}
			out[key] = r.known(join(path, key), m[key], field)
		}
		return out
	case reflect.Slice:
		list, ok := v.([]any)
		if !ok && v != nil {
			is = "a list"
			break
		}
		out := make([]any, len(list))
		for i := range list {
			out[i] = r.known(fmt.Sprintf("%s[%d]", path, i), list[i], t.Elem())
		}
		return out
	case reflect.String:
		if _, ok := v.(string); !ok && v != nil {
			is = "a string"
		}
	case reflect.Bool:
		if _, ok := v.(bool); !ok && v != nil {
			is = "true or false"
		}
	case reflect.Int64:
		switch n := v.(type) {
		case nil, int:
		case float64: // as JSON gives it
			if n != math.Trunc(n) {
				is = "a whole number"
			}
		default:
			is = "a whole number"
		}
	}
	if is != "" {
		r.fault(path, "is not %s", is)
	}
	return v
}

// shared holds values by what makes them equal, as long as somebody uses them.
type shared[T any] struct {
	mu sync.Mutex
	m  map[string]weak.Pointer[T]
}

var (
	auths      shared[auth]
	transports shared[transport]
	sources    shared[source]
	logs       shared[Log]
	statuses   shared[Status]
)

// get returns the value that is used under a key, or makes v that one.
func (s *shared[T]) get(key string, v *T) *T {
	s.mu.Lock()
	defer s.mu.Unlock()
	if used := s.m[key].Value(); used != nil {
		return used
	}
	if s.m == nil {
		s.m = map[string]weak.Pointer[T]{}
	}
	s.m[key] = weak.Make(v)
	runtime.AddCleanup(v, s.forget, key)
	return v
}

func (s *shared[T]) forget(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.m[key].Value() == nil {
		delete(s.m, key)
	}
}

// auth authorizes requests with one of OPA's plugins. These keep credentials
// and renew them without a lock, so it lets one request in at a time.
type auth struct {
	config  []byte // of a rest.Config
	signers map[string]*keys.Config
	secrets []string // not for errors

	turn chan struct{} // has room for the one that is let in
	hung atomic.Int32

	// Those who have the turn may use these.
	plugin rest.HTTPAuthPlugin // nil: to be made
	failed time.Time
	err    error // at failed
}

// Bounds of an auth. OPA bounds most of its own requests (10 s), not all.
const (
	maxPrepare = time.Minute // then the plugin is given up, and a new one made
	maxHung    = 8           // plugins that are given up and have not returned
)

func newAuth(config map[string]any, signers map[string]*keys.Config) *auth {
	a := &auth{config: encode(config), signers: signers, turn: make(chan struct{}, 1)}
	a.secrets = secretsOf("", config)
	for _, key := range signers {
		a.secrets = append(a.secrets, key.PrivateKey)
	}
	return a
}

// check returns what is wrong with the configuration, whatever files there are.
func (a *auth) check() error {
	_, _, err := open(a.config, a.signers)
	if unreadable(err) {
		return nil
	}
	return err
}

// What a plugin sets, and adds to what is there: a request that is authorized
// again, after a redirect, must not have it twice.
var authHeaders = []string{"Authorization", "Host", "X-Amz-Date", "X-Amz-Content-Sha256", "X-Amz-Security-Token"}

// authorize adds the credentials to a request. It returns when the request's
// context ends, if need be without them.
func (a *auth) authorize(req *http.Request) error {
	ctx := req.Context()
	arrived := time.Now()
	select {
	case a.turn <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	// Whoever waited for one that failed has waited enough.
	if a.failed.After(arrived) {
		err := a.err
		<-a.turn
		return err
	}
	if a.plugin == nil {
		plugin, _, err := open(a.config, a.signers)
		if err != nil {
			<-a.turn
			return errors.New(a.text(err))
		}
		a.plugin = plugin
	}
	// Not all plugins heed the context, so the request itself is kept from them.
	own := req.Clone(ctx)
	for _, name := range authHeaders {
		own.Header.Del(name)
	}
	if err := a.prepare(ctx, own); err != nil {
		return err
	}
	req.Header = own.Header
	return nil
}

// prepare has the plugin prepare a request, and gives the turn back when that is
// done. The plugin may still be at it when prepare returns, as ctx has ended.
func (a *auth) prepare(ctx context.Context, req *http.Request) error {
	var end sync.Once
	plugin := a.plugin
	timer := time.AfterFunc(maxPrepare, func() {
		if a.hung.Add(1) > maxHung {
			a.hung.Add(-1)
			return
		}
		given := false
		end.Do(func() {
			given = true
			a.plugin = nil
			<-a.turn
		})
		if !given {
			a.hung.Add(-1)
		}
	})
	done := make(chan error, 1)
	go func() {
		err := safely(plugin, req)
		if err != nil {
			err = errors.New(a.text(err))
		}
		timer.Stop()
		done <- err
		late := true
		end.Do(func() {
			late = false
			if err != nil && ctx.Err() == nil {
				a.failed, a.err = time.Now(), err
			}
			<-a.turn
		})
		if late {
			a.hung.Add(-1)
		}
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// safely makes a panic of a plugin, which runs on a goroutine of ours, an error.
func safely(plugin rest.HTTPAuthPlugin, req *http.Request) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	return plugin.Prepare(req)
}

// text is that of a plugin's error, without secrets and without what a server
// answered.
func (a *auth) text(err error) string {
	s := err.Error()
	for _, mark := range []string{"OAuth2 token endpoint: ", " Body: ", "keyvault response, got: "} {
		if i := strings.Index(s, mark); i >= 0 {
			s = strings.TrimRight(s[:i+len(mark)], ": ")
		}
	}
	for _, secret := range a.secrets {
		s = strings.ReplaceAll(s, secret, "***")
	}
	return brief(s)
}

// secretsOf returns the values that are for nobody to read.
func secretsOf(key string, v any) []string {
	var secrets []string
	switch v := v.(type) {
	case map[string]any:
		for k, value := range v {
			if key == "additional_headers" || key == "additional_parameters" {
				k = "token"
			}
			secrets = append(secrets, secretsOf(k, value)...)
		}
	case string:
		if slices.Contains([]string{"token", "client_secret", "client_assertion", "private_key_passphrase"}, key) && v != "" {
			secrets = append(secrets, v)
		}
	}
	return secrets
}

// brief cuts a text to one line of a length for logs.
func brief(s string) string {
	const limit = 500
	s = strings.Join(strings.Fields(s), " ")
	if len(s) > limit {
		s = strings.ToValidUTF8(s[:limit], "") + "…"
	}
	return s
}

// transport connects with the TLS settings of a service, which are read when it
// is first used: a file that is not there yet is no fault.
type transport struct {
	config []byte // of a rest.Config
	wait   time.Duration

	mu    sync.Mutex
	inner *http.Transport // nil: to be made
}

func (t *transport) RoundTrip(req *http.Request) (*http.Response, error) {
	inner, err := t.get()
	if err != nil {
		return nil, errors.New(brief(err.Error()))
	}
	return inner.RoundTrip(req)
}

func (t *transport) get() (*http.Transport, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.inner != nil {
		return t.inner, nil
	}
	inner, err := t.open()
	if err != nil {
		return nil, err
	}
	t.inner = inner
	// Its connections would live on without it, for a while.
	runtime.AddCleanup(t, (*http.Transport).CloseIdleConnections, inner)
	return inner, nil
}

func (t *transport) open() (*http.Transport, error) {
	_, client, err := open(t.config, nil)
	if err != nil {
		return nil, err
	}
	opas, ok := client.Transport.(*http.Transport)
	if !ok {
		return nil, fmt.Errorf("unexpected transport %T", client.Transport)
	}
	return bundles.NewTransport(opas.TLSClientConfig, t.wait), nil
}

// open makes OPA's plugin and the client that goes with it. OPA's logger gets
// nothing: it has requests and answers of credential services.
func open(config []byte, signers map[string]*keys.Config) (rest.HTTPAuthPlugin, *http.Client, error) {
	c, err := rest.New(config, signers, rest.Logger(logging.NewNoOpLogger()))
	if err != nil {
		return nil, nil, err
	}
	plugin, err := c.Config().AuthPlugin(nil)
	if err != nil {
		return nil, nil, err
	}
	client, err := plugin.NewClient(*c.Config())
	return plugin, client, err
}

// unreadable reports whether an error is that of a file.
func unreadable(err error) bool {
	_, ok := errors.AsType[*fs.PathError](err)
	return ok
}

func encode(config map[string]any) []byte {
	text, err := json.Marshal(config)
	if err != nil {
		panic(err) // maps, lists, strings and numbers
	}
	return text
}
