package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

// authority signs certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{}
	a.key = newKey(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &a.key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return a
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (a *authority) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

// sign returns a certificate of a with its key, in PEM: for loopback, and for an
// ID where there is one.
func (a *authority) sign(t *testing.T, serial int64, id string) (cert, key []byte) {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: "leaf"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if id != "" {
		u, err := url.Parse(id)
		if err != nil {
			t.Fatal(err)
		}
		template.URIs = []*url.URL{u}
	}
	private := newKey(t)
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &private.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
}

// client returns what a client that has an ID connects with; empty: it shows no
// certificate.
func (a *authority) client(t *testing.T, servers *authority, id string) *tls.Config {
	t.Helper()
	cfg := &tls.Config{RootCAs: x509.NewCertPool()}
	cfg.RootCAs.AddCert(servers.cert)
	if id != "" {
		cert, key := a.sign(t, 100, id)
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		cfg.Certificates = []tls.Certificate{pair}
	}
	return cfg
}

func writeFiles(t *testing.T, dir string, files map[string][]byte) {
	t.Helper()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// ask asks over a new connection.
func ask(t *testing.T, address string, cfg *tls.Config, tenant string) (code int32, serial int64, err error) {
	t.Helper()
	var state tls.ConnectionState
	cfg = cfg.Clone()
	cfg.VerifyConnection = func(s tls.ConnectionState) error { state = s; return nil }
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(cfg)))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	resp, err := authv3.NewAuthorizationClient(conn).Check(ctx, &authv3.CheckRequest{
		Attributes: &authv3.AttributeContext{ContextExtensions: map[string]string{"tenant": tenant}},
	})
	if err != nil {
		return 0, 0, err
	}
	return resp.GetStatus().GetCode(), state.PeerCertificates[0].SerialNumber.Int64(), nil
}

func TestTLS(t *testing.T) {
	servers, clients, others := newAuthority(t), newAuthority(t), newAuthority(t)
	dir := t.TempDir()
	cert, key := servers.sign(t, 1, "")
	writeFiles(t, dir, map[string][]byte{"cert.pem": cert, "key.pem": key, "ca.pem": clients.pem()})
	address := freePort(t)
	tlsBlock := fmt.Sprintf("tls: {cert: %s/cert.pem, key: %s/key.pem, client_ca: %s/ca.pem, allowed_ids: [\"spiffe://x/*\"]}", dir, dir, dir)
	s := start(t, fmt.Sprintf(`grpc: {listen: %q, %s}
tenants:
  peers: {"spiffe://x/all": ["*"], "spiffe://x/orders": [orders]}
`, address, tlsBlock), map[string]string{"orders": "allow := true", "payments": "allow := true"})

	for _, c := range []struct {
		name   string
		cfg    *tls.Config
		tenant string
		want   int32 // -1: no connection
	}{
		{"all", clients.client(t, servers, "spiffe://x/all"), "payments", 0},
		{"its own", clients.client(t, servers, "spiffe://x/orders"), "orders", 0},
		{"another's", clients.client(t, servers, "spiffe://x/orders"), "payments", 7},
		{"no peer of the list", clients.client(t, servers, "spiffe://x/nobody"), "orders", 7},
		{"ID that is not allowed", clients.client(t, servers, "spiffe://y/all"), "orders", -1},
		{"another authority", others.client(t, servers, "spiffe://x/all"), "orders", -1},
		{"no certificate", clients.client(t, servers, ""), "orders", -1},
	} {
		code, _, err := ask(t, address, c.cfg, c.tenant)
		if (err != nil) != (c.want < 0) || err == nil && code != c.want {
			t.Errorf("%s: got code %d, %v, want %d", c.name, code, err, c.want)
		}
	}
	plain, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if _, err := authv3.NewAuthorizationClient(plain).Check(ctx, &authv3.CheckRequest{}); err == nil {
		t.Error("without TLS: got an answer")
	}

	// Certificates change under load: no check fails, new connections get the
	// new ones; a broken file changes nothing.
	client := clients.client(t, servers, "spiffe://x/all")
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if code, _, err := ask(t, address, client, "orders"); err != nil || code != 0 {
					t.Errorf("during rotation: got code %d, %v", code, err)
					return
				}
			}
		})
	}
	cert, key = servers.sign(t, 2, "")
	writeFiles(t, dir, map[string][]byte{"cert.pem": cert, "key.pem": key})
	s.eventually("rotated", func() bool { _, serial, _ := ask(t, address, client, "orders"); return serial == 2 })
	writeFiles(t, dir, map[string][]byte{"key.pem": []byte("broken")})
	s.eventually("refused", func() bool { return strings.Contains(s.log.String(), "changed certificates refused") })
	if _, serial, err := ask(t, address, client, "orders"); serial != 2 || err != nil {
		t.Errorf("with a broken file: got certificate %d, %v, want the one before", serial, err)
	}
	close(stop)
	wg.Wait()

	// A new authority for clients: those of the old one are refused.
	writeFiles(t, dir, map[string][]byte{"key.pem": key, "ca.pem": others.pem()})
	s.eventually("another authority", func() bool { _, _, err := ask(t, address, client, "orders"); return err != nil })
	if code, _, err := ask(t, address, others.client(t, servers, "spiffe://x/all"), "orders"); err != nil || code != 0 {
		t.Errorf("the new authority's: got code %d, %v", code, err)
	}
}

func TestAdminTLS(t *testing.T) {
	servers, clients := newAuthority(t), newAuthority(t)
	dir := t.TempDir()
	cert, key := servers.sign(t, 1, "")
	writeFiles(t, dir, map[string][]byte{"cert.pem": cert, "key.pem": key, "ca.pem": clients.pem()})
	address := freePort(t)
	config := filepath.Join(dir, "gatehouse.yaml")
	text := fmt.Sprintf("grpc: {listen: %q}\ndrain: {delay: 0s}\nadmin: {listen: %q, tls: {cert: %s/cert.pem, key: %s/key.pem, client_ca: %s/ca.pem}}\n", freePort(t), address, dir, dir, dir)
	writeFiles(t, dir, map[string][]byte{"gatehouse.yaml": []byte(text)})
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- run(ctx, []string{"serve", "-c", config, t.TempDir()}, none, io.Discard, io.Discard) }()
	defer func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	get := func(cfg *tls.Config) error {
		client := http.Client{Transport: &http.Transport{TLSClientConfig: cfg}}
		defer client.CloseIdleConnections()
		resp, err := client.Get("https://" + address + "/tenants")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("status %d", resp.StatusCode)
		}
		return nil
	}
	good := clients.client(t, servers, "spiffe://x/operator")
	for deadline := time.Now().Add(10 * time.Second); ; {
		err := get(good)
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond) // until it listens
	}
	if err := get(clients.client(t, servers, "")); err == nil {
		t.Error("without a certificate: got an answer")
	}
}

func TestTLSFaults(t *testing.T) {
	dir := t.TempDir()
	cert, key := newAuthority(t).sign(t, 1, "")
	_, otherKey := newAuthority(t).sign(t, 1, "")
	writeFiles(t, dir, map[string][]byte{"cert.pem": cert, "key.pem": key, "other.pem": otherKey, "empty.pem": nil})
	for text, want := range map[string]string{
		"grpc: {tls: {cert: D/cert.pem}}":                                         "grpc.tls: cert and key go together",
		"grpc: {tls: {cert: D/none.pem, key: D/key.pem}}":                         "grpc.tls: open D/none.pem",
		"grpc: {tls: {cert: D/cert.pem, key: D/other.pem}}":                       "private key does not match",
		"grpc: {tls: {cert: D/cert.pem, key: D/key.pem, client_ca: D/empty.pem}}": "D/empty.pem holds no certificate",
		"admin: {tls: {cert: D/cert.pem, key: D/key.pem, allowed_ids: [x]}}":      "admin.tls: allowed_ids need a client_ca",
		"tenants: {peers: {a: [b]}}":                                              "tenants.peers: needs grpc.tls.client_ca",
		"tenants: {resolve: [{peer_id: {map: {a: b}}}]}":                          "tenants.resolve[0]: peer_id needs grpc.tls.client_ca",
		"grpc: {socket_mode: rw}":                                                 `grpc.socket_mode: "rw" is not a mode`,
	} {
		text, want = strings.ReplaceAll(text, "D/", dir+"/"), strings.ReplaceAll(want, "D/", dir+"/")
		if _, err := load(writeFile(t, text+service), "", false); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", text, err, want)
		}
	}
}

func TestSocketMode(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	l, err := listen("unix://"+path, 0o620)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o620 {
		t.Errorf("got mode %v, %v, want 0620", info.Mode(), err)
	}
}
