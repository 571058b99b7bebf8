package policy_test

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/authztest"
	"github.com/gatehouse-authz/gatehouse/policy"
)

// sender asks http.send through a policy whose input is the request.
type sender struct {
	policy *policy.Policy
	env    *policy.Env
}

func newSender(t testing.TB, opts policy.NetworkOptions) *sender {
	t.Helper()
	network, err := policy.NewNetwork(opts)
	if err != nil {
		t.Fatal(err)
	}
	b, err := authztest.Bundle(`
package envoy.authz

allow := http.send(object.union({"method": "GET", "raise_error": false}, input))
`)
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.Compile([]policy.Named{{Name: "policy", Part: prepare(t, b.Bundle)}},
		policy.Options{Entries: []string{entry}, Network: true})
	if err != nil {
		t.Fatal(err)
	}
	return &sender{p, policy.NewEnvWith(policy.EnvOptions{Network: network})}
}

// send returns the answer's body, or the error that the policy sees.
func (s *sender) send(t testing.TB, request map[string]any) (body, message string) {
	t.Helper()
	text, err := json.Marshal(request)
	if err != nil {
		t.Fatal(err)
	}
	v, err := s.policy.Eval(context.Background(), entry, value(t, string(text)), s.env, nil)
	if err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	shown, err := ast.JSON(v)
	if err != nil {
		t.Fatal(err)
	}
	result := shown.(map[string]any)
	if failed, ok := result["error"].(map[string]any); ok {
		return "", failed["message"].(string)
	}
	return result["raw_body"].(string), ""
}

// get sends a request for a URL alone.
func (s *sender) get(t testing.TB, url string) (body, message string) {
	t.Helper()
	return s.send(t, map[string]any{"url": url})
}

// service is an HTTP server at loopback.
func service(t testing.TB, handler http.HandlerFunc) (base, port string) {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	u, err := url.Parse(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	return server.URL, u.Port()
}

func hello(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello") }

// names resolves names as a test says, and counts.
type names struct {
	mu    sync.Mutex
	addrs map[string][]string // :: host → what each look-up gives, the last for ever
	asked []string
}

func (n *names) resolve(_ context.Context, host string) ([]netip.Addr, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.asked = append(n.asked, host)
	addrs := n.addrs[host]
	if len(addrs) == 0 {
		return nil, errors.New("lookup " + host + " on 10.9.8.7:53: no such host")
	}
	if len(addrs) > 1 {
		n.addrs[host] = addrs[1:]
	}
	var all []netip.Addr
	for _, text := range strings.Fields(addrs[0]) {
		all = append(all, netip.MustParseAddr(text))
	}
	return all, nil
}

func TestSendNamed(t *testing.T) {
	_, port := service(t, hello)
	resolver := &names{addrs: map[string][]string{"svc.test": {"127.0.0.1"}, "many.test": {"10.0.0.1 127.0.0.1"}}}
	for _, c := range []struct {
		hosts []string
		url   string
		want  string // in the error; empty: it answers
	}{
		{[]string{"127.0.0.1:" + port}, "http://127.0.0.1:PORT/", ""},
		{[]string{"127.0.0.1:" + port}, "http://[::ffff:127.0.0.1]:PORT/", ""},
		{[]string{"127.0.0.1:" + port, "svc.test:" + port}, "http://svc.test:PORT/", ""},
		{[]string{"127.0.0.0/8", "Svc.TEST.:" + port}, "http://SVC.test.:PORT/", ""},
		{[]string{"127.0.0.0/8", "many.test:" + port}, "http://many.test:PORT/", ""},
		{[]string{"127.0.0.1:" + port}, "http://user:secret@127.0.0.1:PORT/", ""},

		{[]string{"svc.test:" + port}, "http://svc.test:PORT/", `host "svc.test" is where no policy may reach`},
		{[]string{"127.0.0.1:1", "svc.test:" + port}, "http://svc.test:PORT/", "where no policy may reach"},
		{[]string{"svc.test:" + port}, "http://127.0.0.1:PORT/", "is not allowed"},
		{[]string{"127.0.0.1"}, "http://127.0.0.1:PORT/", "at port " + port + " is not allowed"},
		{[]string{"127.0.0.0/8"}, "http://127.0.0.1:PORT/", "is not allowed"},
		{[]string{"svc.test"}, "http://svc.test:PORT/", "is not allowed"},
		{[]string{"svc.test:443"}, "http://svc.test/", "at port 80 is not allowed"},
		{[]string{"svc.test:" + port}, "http://svc.test@127.0.0.1:PORT/", "is not allowed"},
		{[]string{"svc.test:" + port}, "http://127.0.0.1:PORT/#@svc.test", "is not allowed"},
		{[]string{"svc.test:" + port}, "http://other.svc.test:PORT/", "is not allowed"},
		{[]string{"none.test"}, "http://none.test/", `host "none.test" has no address`},
		{nil, "http://example.com/", "is not allowed"},
	} {
		s := newSender(t, policy.NetworkOptions{Hosts: c.hosts, Resolve: resolver.resolve})
		body, message := s.get(t, strings.ReplaceAll(c.url, "PORT", port))
		if c.want == "" && body != "hello" || c.want != "" && !strings.Contains(message, c.want) {
			t.Errorf("%q, %s: got %q, %q, want %q", c.hosts, c.url, body, message, c.want)
		}
		for _, secret := range []string{"10.9.8.7", "10.0.0.1", "secret"} {
			if strings.Contains(message, secret) {
				t.Errorf("%q, %s: the policy is told %q", c.hosts, c.url, message)
			}
		}
	}
}

// Whatever name leads there, and however the address is written, nothing but a
// public address is dialled.
func TestSendAddresses(t *testing.T) {
	for _, addr := range []string{
		"127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254",
		"100.64.0.1", "100.100.100.200", "192.0.0.192", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "168.63.129.16",
		"::", "::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "fe80::1", "fc00::1", "fd00:ec2::254", "ff02::1", "fec0::1",
		"64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::1", "2002:a00:1::", "2001::1", "2001:db8::1", "100::1",
	} {
		resolver := &names{addrs: map[string][]string{"svc.test": {addr}}}
		s := newSender(t, policy.NetworkOptions{Hosts: []string{"svc.test"}, Resolve: resolver.resolve})
		if body, message := s.get(t, "http://svc.test/"); !strings.Contains(message, "where no policy may reach") {
			t.Errorf("%s: got %q, %q, want it refused", addr, body, message)
		}
	}
	s := newSender(t, policy.NetworkOptions{Hosts: []string{"svc.test", "127.0.0.1"}})
	for _, host := range []string{
		"2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "127.1", "127.0.0.1.", "localhost", "[::1]", "[::]", "0",
		"[::ffff:10.0.0.1]", "[64:ff9b::7f00:1]", "①②⑦.0.0.1", "svc。test", "169.254.169.254", "[fe80::1%25lo]", "",
	} {
		if body, message := s.get(t, "http://"+host+"/"); !strings.Contains(message, "not allowed") && !strings.Contains(message, "url is") {
			t.Errorf("%s: got %q, %q, want it not allowed", host, body, message)
		}
	}
	for _, u := range []string{"unix://localhost/x?socket=%2Fvar%2Frun%2Fdocker.sock", "file:///etc/passwd", "ftp://svc.test/", "//svc.test/", "svc.test", `"unix://localhost/x?socket=%2Fx"`} {
		if body, message := s.get(t, u); !strings.Contains(message, "url is not one of http or https") {
			t.Errorf("%s: got %q, %q, want it refused", u, body, message)
		}
	}
}

func TestSendRedirects(t *testing.T) {
	var port string
	inner, innerPort := service(t, hello)
	_, port = service(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/inner":
			http.Redirect(w, r, inner, http.StatusFound)
		case "/metadata":
			http.Redirect(w, r, "http://169.254.169.254/latest/meta-data/", http.StatusFound)
		case "/loop":
			http.Redirect(w, r, "/loop", http.StatusFound)
		case "/good":
			http.Redirect(w, r, "/end", http.StatusFound)
		case "/name":
			http.Redirect(w, r, "http://evil.test:"+innerPort+"/", http.StatusFound)
		default:
			hello(w, r)
		}
	})
	resolver := &names{addrs: map[string][]string{"svc.test": {"127.0.0.1"}, "evil.test": {"127.0.0.1"}}}
	s := newSender(t, policy.NetworkOptions{Hosts: []string{"svc.test:" + port, "127.0.0.1:" + port}, Resolve: resolver.resolve})
	for path, want := range map[string]string{
		"inner": "is not allowed", "metadata": "is not allowed", "name": "is not allowed", "loop": "more than 32 requests", "good": "",
	} {
		body, message := s.send(t, map[string]any{"url": "http://svc.test:" + port + "/" + path, "enable_redirect": true})
		if want == "" && body != "hello" || !strings.Contains(message, want) {
			t.Errorf("%s: got %q, %q, want %q", path, body, message, want)
		}
	}
}

// A name that leads elsewhere the second time leads nowhere then.
func TestSendRebinding(t *testing.T) {
	_, port := service(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Connection", "close")
		hello(w, r)
	})
	resolver := &names{addrs: map[string][]string{"svc.test": {"127.0.0.1", "127.0.0.2"}}}
	s := newSender(t, policy.NetworkOptions{Hosts: []string{"svc.test:" + port, "127.0.0.1:" + port}, Resolve: resolver.resolve})
	if body, message := s.get(t, "http://svc.test:"+port+"/"); body != "hello" {
		t.Errorf("first: got %q, %q", body, message)
	}
	if len(resolver.asked) != 1 {
		t.Errorf("first: got look-ups %q, want one for the one connection", resolver.asked)
	}
	if body, message := s.get(t, "http://svc.test:"+port+"/"); !strings.Contains(message, "where no policy may reach") {
		t.Errorf("second: got %q, %q, want it refused", body, message)
	}
}

func TestSendOptions(t *testing.T) {
	t.Setenv("HTTP_PROXY", "http://127.0.0.1:1")
	t.Setenv("http_proxy", "http://127.0.0.1:1")
	_, port := service(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/large":
			io.WriteString(w, strings.Repeat("x", 5000))
		case "/endless":
			w.(http.Flusher).Flush()
			for r.Context().Err() == nil {
				io.WriteString(w, strings.Repeat("x", 5000))
			}
		case "/reset":
			panic(http.ErrAbortHandler)
		default:
			fmt.Fprint(w, r.Host)
		}
	})
	s := newSender(t, policy.NetworkOptions{Hosts: []string{"127.0.0.1:" + port}, AnswerBytes: 4000})
	base := "http://127.0.0.1:" + port
	for _, c := range []struct {
		request map[string]any
		want    string
	}{
		{map[string]any{"tls_ca_cert_file": "/etc/passwd"}, "tls_ca_cert_file is not allowed"},
		{map[string]any{"tls_client_cert_file": "/x", "tls_client_key_file": "/y"}, "is not allowed"},
		{map[string]any{"tls_ca_cert_env_variable": "PATH"}, "tls_ca_cert_env_variable is not allowed"},
		{map[string]any{"tls_client_key_env_variable": "PATH"}, "is not allowed"},
		{map[string]any{"tls_insecure_skip_verify": true}, "tls_insecure_skip_verify is not allowed"},
		{map[string]any{"headers": map[string]any{"hOST": "other.test"}}, "header Host is not the host of the url"},
		{map[string]any{"max_retry_attempts": 11}, "max_retry_attempts is more than 10"},
		{map[string]any{"unknown": 1}, "invalid request parameters"},
		{map[string]any{"url": 1}, "must be a string"},
		{map[string]any{"url": base + "/large"}, "the answer is larger than 4000 bytes"},
		{map[string]any{"url": base + "/endless"}, "the answer is larger than 4000 bytes"},
		{map[string]any{"url": base + "/reset"}, "the connection failed"},
		{map[string]any{"tls_insecure_skip_verify": false, "tls_use_system_certs": true, "timeout": "0"}, ""},
		{map[string]any{"timeout": 0, "caching_mode": "deserialized", "cache": true}, ""},
	} {
		request := map[string]any{"url": base + "/"}
		for k, v := range c.request {
			request[k] = v
		}
		body, message := s.send(t, request)
		if c.want == "" && body == "" || !strings.Contains(message, c.want) {
			t.Errorf("%v: got %q, %q, want %q", c.request, body, message, c.want)
		}
		if strings.Contains(message, "127.0.0.1:"+port+"->") || strings.Contains(message, "read tcp") {
			t.Errorf("%v: the policy is told %q", c.request, message)
		}
	}

	// An error that is raised leaves the rule undefined, as any of a builtin.
	v, err := s.policy.Eval(context.Background(), entry, value(t, `{"url": "http://other.test", "raise_error": true}`), s.env, nil)
	if !errors.Is(err, policy.ErrUndefined) {
		t.Errorf("an error that is raised: got %v, %v, want %v", v, err, policy.ErrUndefined)
	}
	if _, err := s.policy.Eval(context.Background(), entry, value(t, `{"url": "http://other.test", "raise_error": true}`), nil, nil); !errors.Is(err, policy.ErrUndefined) {
		t.Errorf("no Env: got %v, want %v", err, policy.ErrUndefined)
	}
	s.env = policy.NewEnv(nil)
	if body, message := s.get(t, base); message != "no network" {
		t.Errorf("no network: got %q, %q", body, message)
	}
}

func TestSendTLS(t *testing.T) {
	server := httptest.NewTLSServer(http.HandlerFunc(hello))
	t.Cleanup(server.Close)
	host := strings.TrimPrefix(server.URL, "https://")
	s := newSender(t, policy.NetworkOptions{Hosts: []string{host}})
	authority := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}))
	if body, message := s.send(t, map[string]any{"url": server.URL, "tls_ca_cert": authority}); body != "hello" {
		t.Errorf("named authority: got %q, %q", body, message)
	}
	if body, message := s.get(t, server.URL); !strings.Contains(message, "certificate") {
		t.Errorf("no authority: got %q, %q", body, message)
	}
	if body, message := s.send(t, map[string]any{"url": server.URL, "tls_ca_cert": authority, "tls_server_name": "other.test"}); !strings.Contains(message, "not that of the host") {
		t.Errorf("another name: got %q, %q", body, message)
	}
}

func TestSendCancel(t *testing.T) {
	arrived := make(chan struct{}, 10)
	_, port := service(t, func(w http.ResponseWriter, r *http.Request) {
		arrived <- struct{}{}
		<-r.Context().Done()
	})
	s := newSender(t, policy.NetworkOptions{Hosts: []string{"127.0.0.1:" + port}, TenantRequests: 1})
	input := value(t, `{"url": "http://127.0.0.1:`+port+`/", "max_retry_attempts": 5}`)
	var cancels [3]policy.Cancel
	ended := make(chan error, len(cancels))
	for i := range cancels {
		go func() {
			_, err := s.policy.Eval(context.Background(), entry, input, s.env, &cancels[i])
			ended <- err
		}()
	}
	<-arrived // one hangs, and the others wait for it
	for i := range cancels {
		cancels[i].Cancel()
	}
	for range cancels {
		select {
		case err := <-ended:
			if !errors.Is(err, policy.ErrCanceled) {
				t.Errorf("got %v, want %v", err, policy.ErrCanceled)
			}
		case <-time.After(4 * time.Second):
			t.Fatal("an evaluation goes on")
		}
	}
	var before policy.Cancel
	before.Cancel()
	if _, err := s.policy.Eval(context.Background(), entry, input, s.env, &before); !errors.Is(err, policy.ErrCanceled) {
		t.Errorf("cancelled before: got %v, want %v", err, policy.ErrCanceled)
	}
}

// Answers are remembered for the tenant that asked, within its bound.
func TestSendCache(t *testing.T) {
	var requests atomic.Int32
	_, port := service(t, func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		w.Header().Set("Cache-Control", "max-age=100")
		io.WriteString(w, strings.Repeat("x", 1000))
	})
	network, err := policy.NewNetwork(policy.NetworkOptions{Hosts: []string{"127.0.0.1:" + port}})
	if err != nil {
		t.Fatal(err)
	}
	s := newSender(t, policy.NetworkOptions{})
	a := policy.NewEnvWith(policy.EnvOptions{Network: network, Caching: policy.Caching{Bytes: 10_000}})
	b := policy.NewEnvWith(policy.EnvOptions{Network: network})
	ask := func(env *policy.Env, path string) int {
		t.Helper()
		before := requests.Load()
		s.env = env
		if body, message := s.send(t, map[string]any{"url": "http://127.0.0.1:" + port + path, "cache": true, "caching_mode": "deserialized"}); len(body) != 1000 {
			t.Fatalf("got %q, %q", body, message)
		}
		return int(requests.Load() - before)
	}
	if n := ask(a, "/1") + ask(a, "/1"); n != 1 {
		t.Errorf("one tenant twice: got %d requests, want 1", n)
	}
	if n := ask(b, "/1"); n != 1 {
		t.Errorf("another tenant: got %d requests, want 1", n)
	}
	for i := range 20 {
		ask(a, fmt.Sprint("/more", i))
		ask(b, fmt.Sprint("/more", i))
	}
	if n := ask(a, "/1"); n != 1 {
		t.Errorf("beyond the bound: got %d requests, want 1", n)
	}
	if n := ask(b, "/1"); n != 0 {
		t.Errorf("within the bound: got %d requests, want none", n)
	}
}

func TestNewNetwork(t *testing.T) {
	for _, host := range []string{"", "http://svc.test", "svc.test/path", "svc.test:0", "svc.test:http", "svc.test:70000", "*.svc.test", "10.0.0.0/40", "a b", "2130706433", "127.1", "fe80::1%lo", "a..b", "[::1", "user@svc.test"} {
		if _, err := policy.NewNetwork(policy.NetworkOptions{Hosts: []string{host}}); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%q", host)) {
			t.Errorf("%q: got error %v, want one that names it", host, err)
		}
	}
	for _, host := range []string{"svc.test", "svc.test:8080", "_x.svc-1.test.", "10.0.0.1", "10.0.0.0/8", "::1", "[::1]", "[::1]:80", "fd00::/8", "localhost"} {
		if _, err := policy.NewNetwork(policy.NetworkOptions{Hosts: []string{host}}); err != nil {
			t.Errorf("%q: got error %v", host, err)
		}
	}
}

// The builtins that take schemas refer to nothing remote, network or not.
func TestSchemaReferences(t *testing.T) {
	var requests atomic.Int32
	base, port := service(t, func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		io.WriteString(w, `{"type": "object"}`)
	})
	s := newSender(t, policy.NetworkOptions{Hosts: []string{"127.0.0.1:" + port}})
	const text = `
package envoy.authz

schema := {"$ref": input.ref}

allow := {"verify": json.verify_schema(schema)[0], "match": [r | r := json.match_schema({}, schema)]}
`
	b, err := authztest.Bundle(text)
	if err != nil {
		t.Fatal(err)
	}
	for _, network := range []bool{false, true} {
		p, err := policy.Compile([]policy.Named{{Name: "policy", Part: prepare(t, b.Bundle)}}, policy.Options{Entries: []string{entry}, Network: network})
		if err != nil {
			t.Fatal(err)
		}
		for _, ref := range []string{base + "/schema.json", "file:///etc/hostname", "http://localhost:" + port + "/"} {
			v, err := p.Eval(context.Background(), entry, value(t, `{"ref": "`+ref+`"}`), s.env, nil)
			if err != nil || v.Compare(value(t, `{"verify": false, "match": []}`)) != 0 {
				t.Errorf("%s: got %v, %v, want it refused", ref, v, err)
			}
		}
	}
	if n := requests.Load(); n != 0 {
		t.Errorf("got %d requests", n)
	}
}
