package faults

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

var three = []string{"orders", "payments", "storefront"}

// replicas are two gatehouses and two Envoys, each of which asks both.
func replicas(t *testing.T, s *shelf) (gs [2]*stage.Gatehouse, ns [2]*network) {
	t.Helper()
	for _, tenant := range three {
		s.publish(tenant, 1)
	}
	config := strings.Replace(from(s.URL), "drain: {delay: 0s}", "drain: {delay: 2s}", 1)
	var opts options
	for i := range gs {
		gs[i] = serve(t, config)
		opts.gatehouses = append(opts.gatehouses, gs[i].GRPC)
		c := dial(t, gs[i].GRPC)
		for _, tenant := range three {
			c.becomes(t, tenant, 1, 5*time.Second)
		}
	}
	for i := range ns {
		ns[i] = startEnvoy(t, opts)
	}
	return gs, ns
}

// One of two replicas is drained under load: no request fails.
func TestDrain(t *testing.T) {
	s := newShelf(t)
	gs, ns := replicas(t, s)
	var stops [2]func(*testing.T) report
	for i, n := range ns {
		stops[i] = asks(t, s.judge, 300, three, n.ask)
	}
	time.Sleep(time.Second)
	begun := time.Now()
	if err := gs[0].Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	code, err := gs[0].Wait(10 * time.Second)
	took := time.Since(begun)
	if err != nil || code != 0 {
		t.Errorf("exit: got %d, %v, want 0", code, err)
	}
	time.Sleep(time.Second)
	for i, stop := range stops {
		r := stop(t)
		if r.failed > 0 {
			t.Errorf("Envoy %d: %v, want no failed request; %s", i, r.faults, ns[i].errors(t))
		}
		t.Logf("PASS: Envoy %d: %s; the replica ended after %s; %s", i, r, took.Round(10*time.Millisecond), ns[i].errors(t))
	}
}

// One of two replicas is killed under load: what was in flight and what comes
// before Envoy has noticed may fail, and nothing gets in that should not.
func TestKill(t *testing.T) {
	s := newShelf(t)
	gs, ns := replicas(t, s)
	var stops [2]func(*testing.T) report
	for i, n := range ns {
		stops[i] = asks(t, s.judge, 300, three, n.ask)
	}
	time.Sleep(time.Second)
	gs[0].Kill()
	time.Sleep(time.Second)
	for i, stop := range stops {
		r := stop(t)
		again := asks(t, s.judge, 300, three, ns[i].ask)
		time.Sleep(time.Second)
		later := again(t)
		if r.failed > 100 { // 300 a second, half of them here, until Envoy has noticed
			t.Errorf("Envoy %d: %v of %d failed, want at most 100", i, r.faults, r.answers)
		}
		if later.failed > 0 {
			t.Errorf("Envoy %d: %v failed more than a second after the end, want none", i, later.faults)
		}
		t.Logf("PASS: Envoy %d: %s; a second later: %s; %s", i, r, later, ns[i].errors(t))
	}
}

// Killed at any moment, also while it saves what is new, gatehouse starts from
// disk with its source away.
func TestRestartFromDisk(t *testing.T) {
	s := newShelf(t)
	toxiproxy, err := stage.StartToxiproxy(tool(t, "toxiproxy"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(toxiproxy.Kill)
	link, err := toxiproxy.Link("bundles", strings.TrimPrefix(s.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	config := from("http://"+link.Addr) + fmt.Sprintf("persist: {directory: %q}\n", dir)
	for _, tenant := range three {
		s.publish(tenant, 1)
	}
	g := serve(t, config)
	c := dial(t, g.GRPC)
	for _, tenant := range three {
		c.becomes(t, tenant, 1, 5*time.Second)
	}
	n, heard := 1, 0
	var slowest, firstAnswer time.Duration
	for round := range 5 {
		for range 4 { // revisions come thick and fast
			n++
			for _, tenant := range three {
				s.publishWith(tenant, n, bulk(256<<10))
			}
			time.Sleep(time.Duration(50+70*round) * time.Millisecond)
		}
		g.Kill()
		if err := link.Down(); err != nil {
			t.Fatal(err)
		}
		begun := time.Now()
		g = serve(t, config)
		c = dial(t, g.GRPC)
		stop := asks(t, s.judge, 200, three, c.ask)
		for _, tenant := range three {
			eventually(t, tenant+" decides from disk", func() bool { return c.revisionOf(tenant) != "" })
			firstAnswer = max(firstAnswer, time.Since(begun))
			if status := statusOf(t, g, tenant); status.StaleSince == nil {
				t.Errorf("status of %s from disk: got %+v, want a time since when it is stale", tenant, status)
			}
		}
		if err := link.Up(); err != nil {
			t.Fatal(err)
		}
		for _, tenant := range three {
			slowest = max(slowest, c.becomes(t, tenant, n, 10*time.Second))
		}
		r := stop(t)
		heard += r.answers
		if r.failed*20 > r.answers {
			t.Errorf("faults: %v of %d", r.faults, r.answers)
		}
		if temps, _ := filepath.Glob(filepath.Join(dir, "*.tmp")); len(temps) > 3 {
			t.Errorf("leftovers: %q", temps)
		}
	}
	if firstAnswer > 5*time.Second {
		t.Errorf("the first answers from disk took %s, want at most 5 s", firstAnswer)
	}
	t.Logf("PASS: killed 5 times: %d answers compared with opa eval, wrong 0; all answer from disk within %s of the start, the source's newest decides at most %s after it is back",
		heard, firstAnswer.Round(time.Millisecond), slowest)
}

// The configuration changes under load: only the tenants that it changes move,
// and a faulty one changes nothing.
func TestReload(t *testing.T) {
	s := newShelf(t)
	for _, tenant := range append(three, "added") {
		s.publish(tenant, 1)
	}
	dir := t.TempDir()
	overrides := filepath.Join(dir, "overrides")
	if err := os.Mkdir(overrides, 0o700); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "gatehouse.yaml")
	config := from(s.URL) + fmt.Sprintf("overrides_dir: %q\n", overrides)
	write(t, file, config)
	write(t, filepath.Join(overrides, "payments.yaml"), "limits: {evaluation_time: 400ms}\n")
	g := serveFile(t, file)
	c := dial(t, g.GRPC)
	since := map[string]string{}
	for _, tenant := range three {
		c.becomes(t, tenant, 1, 5*time.Second)
		since[tenant] = statusOf(t, g, tenant).Activated
	}
	applied := func() float64 { return metric(t, g, `gatehouse_config_reloads_total{outcome="applied"}`) }
	refused := func() float64 { return metric(t, g, `gatehouse_config_reloads_total{outcome="refused"}`) }
	stop := asks(t, s.judge, 300, three, c.ask)
	change := func(what, path, text string, outcome func() float64) time.Duration {
		t.Helper()
		before := outcome()
		if text == "" {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		} else {
			write(t, path, text)
		}
		return eventually(t, what, func() bool { return outcome() > before })
	}
	took := change("a modified override is applied", filepath.Join(overrides, "payments.yaml"), "limits: {evaluation_time: 300ms}\n", applied)
	// An added one: its labels show that it counts.
	change("an added override is applied", filepath.Join(overrides, "storefront.yaml"), "opa: {labels: {team: shop}}\n", applied)
	change("a removed override is applied", filepath.Join(overrides, "storefront.yaml"), "", applied)
	change("a faulty override is refused", filepath.Join(overrides, "storefront.yaml"), "limits: {evaluation_tim: 1s}\n", refused)
	s.publish("payments", 2)
	c.becomes(t, "payments", 2, 5*time.Second)
	change("without it the rest is applied", filepath.Join(overrides, "storefront.yaml"), "", applied)
	change("a faulty file is refused", file, config+"nonsense: true\n", refused)
	change("half a file is refused", file, config[:len(config)/2]+"\n  {", refused)
	c.becomes(t, "added", 1, 5*time.Second)
	change("a good file is applied", file, config+"# good\n", applied)
	r := stop(t)
	if r.failed > 0 {
		t.Errorf("faults: %v, want none", r.faults)
	}
	if got := statusOf(t, g, "orders").Activated; got != since["orders"] {
		t.Errorf("tenant orders, which no change was about: activated %s, want still %s", got, since["orders"])
	}
	if loads := s.Answers("orders", 200); loads != 1 {
		t.Errorf("bundle of tenant orders was loaded %d times, want once", loads)
	}
	t.Logf("PASS: 5 changes applied (the first after %s), 3 refused: %s; orders was activated once", took, r)
}

// authority issues certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

var serial int64

func issue(t *testing.T, by *authority, template *x509.Certificate) (cert *x509.Certificate, key *ecdsa.PrivateKey, certPEM, keyPEM []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial++
	template.SerialNumber = big.NewInt(serial)
	template.NotBefore = time.Now().Add(-2 * time.Hour)
	if template.NotAfter.IsZero() {
		template.NotAfter = time.Now().Add(24 * time.Hour)
	}
	parent, signer := template, key
	if by != nil {
		parent, signer = by.cert, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	if cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
}

func newAuthority(t *testing.T, name string) *authority {
	cert, key, text, _ := issue(t, nil, &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	})
	return &authority{cert, key, text}
}

// server writes a certificate of a server and its key.
func (a *authority) server(t *testing.T, certFile, keyFile string) {
	t.Helper()
	_, _, cert, key := issue(t, a, &x509.Certificate{
		Subject: pkix.Name{CommonName: "gatehouse"}, DNSNames: []string{"gatehouse"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, KeyUsage: x509.KeyUsageDigitalSignature,
	})
	// Two files cannot change at the same time: between the two writes they do
	// not fit, and the old pair must stay in use.
	write(t, certFile, string(cert))
	time.Sleep(1200 * time.Millisecond)
	write(t, keyFile, string(key))
}

// client returns the TLS context of an Envoy with an ID.
func (a *authority) client(t *testing.T, id string, until time.Time, trust ...*authority) (object, tls.Certificate) {
	t.Helper()
	uri, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	_, _, cert, key := issue(t, a, &x509.Certificate{
		Subject: pkix.Name{CommonName: "envoy"}, URIs: []*url.URL{uri}, NotAfter: until,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, KeyUsage: x509.KeyUsageDigitalSignature,
	})
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	var roots string
	for _, by := range trust {
		roots += string(by.pem)
	}
	return object{
		"@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
		"sni":   "gatehouse",
		"common_tls_context": object{
			"alpn_protocols":     []string{"h2"},
			"tls_certificates":   []object{{"certificate_chain": object{"inline_string": string(cert)}, "private_key": object{"inline_string": string(key)}}},
			"validation_context": object{"trusted_ca": object{"inline_string": roots}, "match_typed_subject_alt_names": []object{{"san_type": "DNS", "matcher": object{"exact": "gatehouse"}}}},
		},
	}, pair
}

// Certificates are replaced under load, and so is the authority that clients'
// come from. Who has none, a foreign one, an old one or a wrong ID is refused.
func TestCertificates(t *testing.T) {
	s := newShelf(t)
	for _, tenant := range three {
		s.publish(tenant, 1)
	}
	old, next, foreign := newAuthority(t, "old"), newAuthority(t, "next"), newAuthority(t, "foreign")
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	old.server(t, file("cert.pem"), file("key.pem"))
	write(t, file("ca.pem"), string(old.pem))
	g := serve(t, strings.Replace(from(s.URL), `grpc:  {listen: "127.0.0.1:0"}`, fmt.Sprintf(
		`grpc: {listen: "127.0.0.1:0", max_connection_age: 1s, tls: {cert: %q, key: %q, client_ca: %q, allowed_ids: ["spiffe://mesh/envoy/*"]}}`,
		file("cert.pem"), file("key.pem"), file("ca.pem")), 1))

	const id = "spiffe://mesh/envoy/a"
	never := time.Time{}
	oldContext, oldPair := old.client(t, id, never, old, next)
	n := startEnvoy(t, options{gatehouses: []string{g.GRPC}, tls: oldContext})
	for _, tenant := range three {
		eventually(t, tenant+" decides", func() bool { return n.ask(tenant, 0).revision == "v1" })
	}
	issuer := func(pair tls.Certificate) string {
		roots := x509.NewCertPool()
		roots.AddCert(old.cert)
		roots.AddCert(next.cert)
		conn, err := tls.Dial("tcp", g.GRPC, &tls.Config{RootCAs: roots, ServerName: "gatehouse", Certificates: []tls.Certificate{pair}, NextProtos: []string{"h2"}})
		if err != nil {
			return err.Error()
		}
		defer conn.Close()
		return conn.ConnectionState().PeerCertificates[0].Issuer.CommonName
	}
	if got := issuer(oldPair); got != "old" {
		t.Fatalf("authority of the server: got %q, want old", got)
	}

	stop := asks(t, s.judge, 300, three, n.ask)
	time.Sleep(time.Second)
	write(t, file("ca.pem"), string(old.pem)+string(next.pem))
	next.server(t, file("cert.pem"), file("key.pem"))
	took := eventually(t, "the new certificate is shown", func() bool { return issuer(oldPair) == "next" })
	newContext, newPair := next.client(t, id, never, old, next)
	n2 := startEnvoy(t, options{gatehouses: []string{g.GRPC}, tls: newContext})
	stop2 := asks(t, s.judge, 100, three, n2.ask)
	time.Sleep(2 * time.Second)
	r, r2 := stop(t), stop2(t)
	if r.failed+r2.failed > 0 {
		t.Errorf("failed requests: %v, %v, want none; %s", r.faults, r2.faults, n.errors(t))
	}

	// The old authority goes: so do its clients, whatever else changes.
	write(t, file("ca.pem"), string(next.pem))
	eventually(t, "the old authority is no more trusted", func() bool { return n.ask("orders", 0).revision == "" })
	if a := n2.ask("orders", 0); a.revision == "" {
		t.Errorf("client of the new authority: got %+v, want an answer", a)
	}
	write(t, file("cert.pem"), "no certificate")
	time.Sleep(2500 * time.Millisecond)
	if got := issuer(newPair); got != "next" {
		t.Errorf("authority of the server with a broken file: got %q, want next", got)
	}

	_, wrongID := next.client(t, "spiffe://mesh/backend", never, next)
	_, expired := next.client(t, id, time.Now().Add(-time.Hour), next)
	_, unknown := foreign.client(t, id, never, next)
	for name, pair := range map[string]tls.Certificate{"wrong ID": wrongID, "expired": expired, "foreign": unknown, "none": {}} {
		if answered(g.GRPC, pair, next) {
			t.Errorf("client with certificate that is %s: got an answer, want none", name)
		}
	}
	if !answered(g.GRPC, newPair, next) {
		t.Error("client that is allowed: got no answer")
	}
	t.Logf("PASS: the new certificate is shown after %s; meanwhile, with connections of at most 1 s: %s; a client of the new authority: %s", took, r, r2)
}

// answered reports whether the server says anything to a client after the
// handshake: with TLS 1.3 a client learns only then that it is refused.
func answered(addr string, pair tls.Certificate, trust *authority) bool {
	roots := x509.NewCertPool()
	roots.AddCert(trust.cert)
	config := &tls.Config{RootCAs: roots, ServerName: "gatehouse", NextProtos: []string{"h2"}}
	if pair.Certificate != nil {
		config.Certificates = []tls.Certificate{pair}
	}
	conn, err := tls.Dial("tcp", addr, config)
	if err != nil {
		return false
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(3 * time.Second))
	if _, err := fmt.Fprint(conn, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"); err != nil {
		return false
	}
	_, err = conn.Read(make([]byte, 9))
	return err == nil
}
