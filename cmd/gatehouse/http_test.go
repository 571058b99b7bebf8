package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// dataAPI is a tenant's rule, asked over HTTP.
const dataAPI = "/t/orders/v1/data/envoy/authz/x"

// fetch asks for a path and returns the status, the body and the protocol.
func fetch(t *testing.T, client *http.Client, url string, header ...string) (int, string, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, err.Error(), ""
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body), resp.Proto
}

// The example of docs/http.md is such that load reads it.
func TestHTTPDocs(t *testing.T) {
	doc, err := os.ReadFile("../../docs/http.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(doc), "```yaml\n")
	text, _, ok := strings.Cut(text, "```")
	if cfg := mustLoad(t, text); !ok || !cfg.offered || len(cfg.Notes) > 0 {
		t.Errorf("got notes %v", cfg.Notes)
	}
}

func TestHTTP(t *testing.T) {
	address := freePort(t)
	text := func(peers string) string {
		return fmt.Sprintf(`
http: {listen: %q, trusted_peers: [%s]}
opa: {plugins: {gatehouse_http: {data: [envoy/authz/x], auth: {headers: {subject: x-user}}}}}
`, address, peers)
	}
	s := start(t, text("127.0.0.1"), map[string]string{"orders": "x := 42"})
	code, body, proto := fetch(t, http.DefaultClient, "http://"+address+dataAPI, "x-user", "alice")
	if code != 200 || !strings.Contains(body, `"result":42`) || proto != "HTTP/1.1" {
		t.Errorf("got %d %s over %s", code, body, proto)
	}
	h2 := &http.Client{Transport: &http.Transport{Protocols: new(http.Protocols)}}
	h2.Transport.(*http.Transport).Protocols.SetUnencryptedHTTP2(true)
	if code, body, proto := fetch(t, h2, "http://"+address+dataAPI, "x-user", "alice"); code != 200 || proto != "HTTP/2.0" {
		t.Errorf("got %d %s over %s", code, body, proto)
	}
	if code, _, _ := fetch(t, http.DefaultClient, "http://"+address+dataAPI); code != 401 {
		t.Errorf("got %d for nobody", code)
	}
	if code, body, _ := fetch(t, http.DefaultClient, "http://"+address+dataAPI, "x-user", strings.Repeat("x", 1<<20)); code != 431 {
		t.Errorf("got %d %s for headers of 1 MiB", code, body)
	}
	if _, body := s.get("/metrics"); !strings.Contains(body, `gatehouse_http_requests_total{code="200",route="/v1/data/"} 2`) ||
		!strings.Contains(body, `gatehouse_http_requests_total{code="401",route="/v1/data/"} 1`) {
		t.Errorf("the metrics do not count the answers")
	}

	// Whom to believe is read again; where to listen is not.
	s.configure(text("10.0.0.0/8"))
	s.eventually("the peer is not trusted", func() bool {
		code, _, _ := fetch(t, http.DefaultClient, "http://"+address+dataAPI, "x-user", "alice")
		return code == 401
	})
	s.configure(strings.Replace(text("127.0.0.1"), address, freePort(t), 1))
	s.eventually("a note", func() bool {
		return strings.Contains(s.log.String(), `"changed setting needs a restart","key":"http.listen"`)
	})
}

// A listener that becomes one of this machine alone in the file is still the one
// that others reach.
func TestHTTPStaysShut(t *testing.T) {
	address := strings.Replace(freePort(t), "127.0.0.1", "0.0.0.0", 1)
	local := strings.Replace(address, "0.0.0.0", "127.0.0.1", 1)
	s := start(t, fmt.Sprintf(`
http: {listen: %q}
opa: {plugins: {gatehouse_http: {data: [envoy/authz/x], auth: {tokens: [{subject: x, token: "0123456789abcdef"}]}}}}
`, address), map[string]string{"orders": "x := 42"})
	if code, _, _ := fetch(t, http.DefaultClient, "http://"+local+dataAPI); code != 401 {
		t.Errorf("got %d for nobody", code)
	}
	s.configure(fmt.Sprintf("http: {listen: %q}\nopa: {plugins: {gatehouse_http: {data: [envoy/authz/x]}}}\n", local))
	s.eventually("refused", func() bool {
		code, body, _ := fetch(t, http.DefaultClient, "http://"+local+dataAPI)
		return code == 403 && strings.Contains(body, "does not say who may ask")
	})
	if log := s.log.String(); !strings.Contains(log, "tenant refused over HTTP") {
		t.Errorf("got no warning in the log:\n%s", log)
	}
}

func TestHTTPS(t *testing.T) {
	ca := newAuthority(t)
	dir := t.TempDir()
	cert, key := ca.sign(t, 7, "")
	writeFiles(t, dir, map[string][]byte{"cert.pem": cert, "key.pem": key, "ca.pem": ca.pem()})
	address := freePort(t)
	s := start(t, fmt.Sprintf(`
http:
  listen: %q
  tls: {cert: %[2]s/cert.pem, key: %[2]s/key.pem, client_ca: %[2]s/ca.pem, client_optional: true}
opa: {plugins: {gatehouse_http: {data: [envoy/authz/x], auth: {mtls: ["spiffe://example.org/shop"], tokens: [{subject: x, token: "0123456789abcdef"}]}}}}
`, address, dir), map[string]string{"orders": "x := 42"})
	client := func(id string) *http.Client {
		return &http.Client{Transport: &http.Transport{TLSClientConfig: ca.client(t, ca, id), ForceAttemptHTTP2: true}}
	}
	for _, c := range []struct {
		id     string
		header []string
		want   int
	}{
		{"spiffe://example.org/shop", nil, 200},
		{"spiffe://example.org/other", nil, 401},
		{"", nil, 401},
		{"", []string{"Authorization", "Bearer 0123456789abcdef"}, 200},
	} {
		code, body, proto := fetch(t, client(c.id), "https://"+address+dataAPI, c.header...)
		if code != c.want || proto != "HTTP/2.0" {
			t.Errorf("%q: got %d %s over %s, want %d", c.id, code, body, proto, c.want)
		}
	}

	// A new certificate is taken without a restart.
	cert, key = ca.sign(t, 8, "")
	writeFiles(t, dir, map[string][]byte{"cert.pem": cert, "key.pem": key})
	s.eventually("the new certificate", func() bool {
		resp, err := client("").Get("https://" + address + "/")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.TLS.PeerCertificates[0].SerialNumber.Int64() == 8
	})
}

// On a socket there is no host to be asked under.
func TestHTTPSocket(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "http.sock")
	start(t, fmt.Sprintf("http: {listen: %q}\nopa: {plugins: {gatehouse_http: {data: [envoy/authz/x]}}}\n", "unix://"+socket),
		map[string]string{"orders": "x := 42"})
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	if code, body, _ := fetch(t, client, "http://authz"+dataAPI); code != 200 {
		t.Errorf("got %d %s", code, body)
	}
}

// What was begun is answered at the end, and nothing that is slow to ask stays.
func TestHTTPDrain(t *testing.T) {
	address := freePort(t)
	s := start(t, fmt.Sprintf(`
http: {listen: %q}
drain: {delay: 0s, timeout: 3s}
tenants: {limits: {evaluation_time: 1s}}
opa: {plugins: {gatehouse_http: {data: [envoy/authz/x]}}}
`, address), map[string]string{"orders": "x if {\n\tsome i in numbers.range(1, 20000)\n\tsome j in numbers.range(1, 20000)\n\ti * j < 0\n}"})
	idle, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer idle.Close()
	if _, err := idle.Write([]byte("GET /t/or")); err != nil { // and no more
		t.Fatal(err)
	}
	answered := make(chan int, 1)
	go func() {
		code, _, _ := fetch(t, http.DefaultClient, "http://"+address+dataAPI)
		answered <- code
	}()
	time.Sleep(300 * time.Millisecond) // it is being evaluated
	s.stop()
	if code := <-answered; code != 503 {
		t.Errorf("got %d for what was begun, want 503 at its deadline", code)
	}
	if err := idle.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, idle); err != nil {
		t.Errorf("a connection that never asks is still there: %v", err)
	}
}
