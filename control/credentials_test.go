package control_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gatehouse-authz/gatehouse/bundles"
	"github.com/gatehouse-authz/gatehouse/control"
)

func TestCredentialsAccepted(t *testing.T) {
	t.Setenv("AWS_REGION", "eu-central-1")
	t.Setenv("AWS_ROLE_ARN", "arn:aws:iam::1:role/r")
	t.Setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/run/token")
	for _, def := range []string{
		`credentials: {}`,
		`credentials: {bearer: {token: t, scheme: Basic}}`,
		`credentials: {bearer: {token_path: /run/token}}`,
		`credentials: {client_tls: {cert: /no/cert.pem, private_key: /no/key.pem, private_key_passphrase: p, cert_reread_interval_seconds: 5}}`,
		`credentials: {client_tls: {cert: /no/cert.pem, private_key: /no/key.pem, ca_cert: /no/ca.pem, system_ca_required: true}}`,
		`credentials: {s3_signing: {environment_credentials: {}}}`,
		`credentials: {s3_signing: {environment_credentials: }}`,
		`credentials: {s3_signing: {service: execute-api, signature_version: 4a, environment_credentials: {}}}`,
		`credentials: {s3_signing: {profile_credentials: {path: /no/credentials, profile: p, aws_region: r}}}`,
		`credentials: {s3_signing: {web_identity_credentials: {aws_region: r, session_name: s, aws_domain: d}}}`,
		`credentials: {s3_signing: {metadata_credentials: {aws_region: r, iam_role: i}}}`,
		`credentials: {s3_signing: {assume_role_credentials: {aws_region: r, iam_role_arn: i, session_name: s, aws_domain: d, aws_signing: {profile_credentials: {}}}}}`,
		`credentials: {s3_signing: {sso_credentials: {path: /p, cache_path: /c, profile: p}}}`,
		`credentials: {s3_signing: {environment_credentials: {}, metadata_credentials: {aws_region: r}}}`,
		`credentials: {oauth2: {token_url: "https://example.com/t", client_id: i, client_secret: s, scopes: [a], additional_headers: {a: b}, additional_parameters: {a: b}}}`,
		`credentials: {oauth2: {token_url: "https://example.com/t", grant_type: jwt_bearer, signing_key: k, additional_claims: {aud: x, n: 1}, include_jti_claim: true}}`,
		`credentials: {oauth2: {token_url: "https://example.com/t", client_id: i, client_assertion_path: /no/a}}`,
		`credentials: {gcp_metadata: {audience: a}}`,
		`credentials: {gcp_metadata: {scopes: [a, b], endpoint: "http://x", access_token_path: /y}}`,
		`credentials: {azure_managed_identity: {}}`,
		`credentials: {azure_managed_identity: {endpoint: "http://x", resource: r, object_id: o, client_id: c, mi_res_id: m, api_version: a, use_app_service_msi: true}}`,
		`tls: {ca_cert: "/no/{{ .tenant }}/ca.pem", system_ca_required: true}`,
		`response_header_timeout_seconds: 3`,
	} {
		text := `
keys: {k: {algorithm: HS256, private_key: secret}}
services: {s: {url: "https://example.com", ` + def + `}}
bundles: {b: {}}
`
		if _, notes, err := parse(t, text, control.Options{}); err != nil {
			t.Errorf("%s: %v", def, err)
		} else if n := len(notes); n != 0 && (n != 1 || strings.Contains(def, "signing_key")) {
			t.Errorf("%s: got notes %v", def, notes)
		}
	}
}

func TestCredentialsFaults(t *testing.T) {
	for _, name := range []string{"AWS_REGION", "AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE"} {
		t.Setenv(name, "")
	}
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, []byte("none"), 0o600); err != nil {
		t.Fatal(err)
	}
	for def, want := range map[string]string{
		`type: oci`:                           `services.s.type: not supported: "oci"`,
		`type: file`:                          `services.s.type: not supported: "file"`,
		`credentials: {plugin: mine}`:         `services.s.credentials.plugin: not supported`,
		`credentials: {basic: {}}`:            `services.s.credentials.basic: unknown or unsupported key`,
		`credentials: []`:                     `services.s.credentials: is not a mapping`,
		`credentials: {bearer: {}}`:           `services.s.credentials.bearer: token or token_path is needed`,
		`credentials: {bearer: {token: 1}}`:   `services.s.credentials.bearer.token: is not a string`,
		`credentials: {bearer: {tokn: s}}`:    `services.s.credentials.bearer.tokn: unknown`,
		`credentials: {s3_signing: {}}`:       `services.s.credentials.s3_signing: a AWS credential service must be specified`,
		`credentials: {s3_signing: [secret]}`: `services.s.credentials.s3_signing: is not a mapping`,
		`credentials: {s3_signing: {service: ecr, environment_credentials: {}}}`:                                       `services.s.credentials.s3_signing: aws service "ecr"`,
		`credentials: {s3_signing: {metadata_credentials: {}}}`:                                                        `services.s.credentials.s3_signing: at least aws_region`,
		`credentials: {s3_signing: {metadata_credentials: {aws_regoin: r}}}`:                                           `s3_signing.metadata_credentials.aws_regoin: unknown`,
		`credentials: {s3_signing: {web_identity_credentials: {}}}`:                                                    `s3_signing: no AWS_ROLE_ARN set in environment`,
		`credentials: {s3_signing: {assume_role_credentials: {}}}`:                                                     `s3_signing: a AWS signing plugin must be specified`,
		`credentials: {s3_signing: {assume_role_credentials: {aws_signing: {profile_credentials: {x: y}}}}}`:           `aws_signing.profile_credentials.x: unknown`,
		`credentials: {bearer: {token: secret}, gcp_metadata: {audience: a}}`:                                          `services.s.credentials: bearer and gcp_metadata exclude each other`,
		`credentials: {oauth2: {token_url: "http://x", client_id: i, client_secret: secret}}`:                          `services.s.credentials.oauth2: token_url required to use https`,
		`credentials: {oauth2: {token_url: "https://x", client_id: i, client_secret: secret, client_assertion: secr}}`: `services.s.credentials.oauth2: can only use one of`,
		`credentials: {oauth2: {token_url: "https://x", scopes: x}}`:                                                   `oauth2.scopes: is not a list`,
		`credentials: {oauth2: {token_url: "https://x", include_jti_claim: 1}}`:                                        `oauth2.include_jti_claim: is not true or false`,
		`credentials: {oauth2: {token_url: "https://x", grant_type: jwt_bearer, signing_key: k}}`:                      `oauth2.signing_key: no key "k" with a private_key`,
		`credentials: {gcp_metadata: {}}`:                                                                              `gcp_metadata: audience or scopes is required`,
		`credentials: {client_tls: {cert: /x}}`:                                                                        `services.s.credentials.client_tls: private key is needed`,
		`credentials: {client_tls: {cert: /x, private_key: /y, cert_reread_interval_seconds: x}}`:                      `cert_reread_interval_seconds: is not a whole number`,
		`tls: {ca_cert: "` + ca + `"}`:                                                                                 `services.s: unable to parse and append CA certificate`,
		`tls: {ca: x}`:                                                                                                 `services.s.tls.ca: unknown`,
		`allow_insecure_tls: "yes"`:                                                                                    `services.s.allow_insecure_tls: is not true or false`,
		`response_header_timeout_seconds: secret`:                                                                      `services.s.response_header_timeout_seconds: is not a number`,
	} {
		_, _, err := parse(t, `
services: {s: {url: "https://example.com", `+def+`}}
bundles: {b: {}}
`, control.Options{})
		var faults control.Faults
		if !errors.As(err, &faults) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", def, err, want)
		}
		if text := fmt.Sprint(err); strings.Contains(strings.ReplaceAll(text, "client_secret", ""), "secret") {
			t.Errorf("%s: got %v, with a secret in it", def, err)
		}
	}
}

// s3 is a small S3: it checks signatures of version 4 as Amazon documents them.
type s3 struct {
	*httptest.Server
	keys    sync.Map // :: access key → secret
	objects sync.Map // :: decoded path → archive
	now     func() time.Time
}

func newS3(t *testing.T) *s3 {
	s := &s3{now: time.Now}
	s.Server = httptest.NewServer(s)
	t.Cleanup(s.Close)
	return s
}

func (s *s3) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	fail := func(status int, code string) {
		w.WriteHeader(status)
		fmt.Fprintf(w, "<Error><Code>%s</Code></Error>", code)
	}
	if code := s.verify(r); code != "" {
		fail(http.StatusForbidden, code)
		return
	}
	if strings.HasPrefix(r.URL.Path, "/moved/") {
		http.Redirect(w, r, strings.TrimPrefix(r.URL.Path, "/moved"), http.StatusTemporaryRedirect)
		return
	}
	archive, ok := s.objects.Load(r.URL.Path)
	if !ok {
		fail(http.StatusForbidden, "AccessDenied") // who may not list is not told more
		return
	}
	etag := fmt.Sprintf(`"%x"`, sha256.Sum256(archive.([]byte)))
	w.Header().Set("ETag", etag)
	if r.Header.Get("If-None-Match") == etag {
		w.WriteHeader(http.StatusNotModified)
		return
	}
	w.Write(archive.([]byte))
}

// verify returns the code of what is wrong with a request's signature.
func (s *s3) verify(r *http.Request) string {
	rest, ok := strings.CutPrefix(r.Header.Get("Authorization"), "AWS4-HMAC-SHA256 ")
	if !ok || len(r.Header["Authorization"]) != 1 {
		return "AccessDenied"
	}
	fields := map[string]string{}
	for field := range strings.SplitSeq(rest, ",") {
		name, value, _ := strings.Cut(strings.TrimSpace(field), "=")
		fields[name] = value
	}
	scope := strings.SplitN(fields["Credential"], "/", 2)
	secret, ok := s.keys.Load(scope[0])
	if !ok || len(scope) != 2 {
		return "InvalidAccessKeyId"
	}
	at, err := time.Parse("20060102T150405Z", r.Header.Get("X-Amz-Date"))
	if err != nil || at.Sub(s.now()).Abs() > 15*time.Minute {
		return "RequestTimeTooSkewed"
	}
	escape := func(s string) string { return strings.ReplaceAll(url.QueryEscape(s), "+", "%20") }
	segments := strings.Split(r.URL.Path, "/")
	for i := range segments {
		segments[i] = escape(segments[i])
	}
	canonical := []string{r.Method, strings.Join(segments, "/"), strings.ReplaceAll(r.URL.Query().Encode(), "+", "%20")}
	for name := range strings.SplitSeq(fields["SignedHeaders"], ";") {
		value := strings.Join(r.Header.Values(name), ",")
		if name == "host" {
			value = r.Host
		}
		canonical = append(canonical, name+":"+strings.TrimSpace(value))
	}
	empty := sha256.Sum256(nil)
	if r.Header.Get("X-Amz-Content-Sha256") != hex.EncodeToString(empty[:]) {
		return "XAmzContentSHA256Mismatch"
	}
	canonical = append(canonical, "", fields["SignedHeaders"], hex.EncodeToString(empty[:]))
	sum := sha256.Sum256([]byte(strings.Join(canonical, "\n")))
	key := []byte("AWS4" + secret.(string))
	sign := func(text string) {
		mac := hmac.New(sha256.New, key)
		mac.Write([]byte(text))
		key = mac.Sum(nil)
	}
	for part := range strings.SplitSeq(scope[1], "/") {
		sign(part)
	}
	sign("AWS4-HMAC-SHA256\n" + r.Header.Get("X-Amz-Date") + "\n" + scope[1] + "\n" + hex.EncodeToString(sum[:]))
	if hex.EncodeToString(key) != fields["Signature"] {
		return "SignatureDoesNotMatch"
	}
	return ""
}

func fetch(ctx context.Context, tenant *control.Tenant, etag string) (*bundles.Bundle, error) {
	b := tenant.Bundles[0]
	return b.Source.Fetch(ctx, b.Resource, etag)
}

func TestS3(t *testing.T) {
	t.Setenv("AWS_REGION", "eu-central-1")
	t.Setenv("AWS_ACCESS_KEY_ID", "AKIA")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "s3cret")
	t.Setenv("AWS_SESSION_TOKEN", "session")
	s := newS3(t)
	s.keys.Store("AKIA", "s3cret")
	s.objects.Store("/bucket/orders.tar.gz", signedBundle(t, ""))
	s.objects.Store("/bucket/a+b=(c) @d.tar.gz", signedBundle(t, ""))
	config := func(resource string) string {
		return `
services: {s: {url: "` + s.URL + `", headers: {x-amz-request-payer: requester, x-two: "a b"}, credentials: {s3_signing: {environment_credentials: {}}}}}
bundles: {b: {resource: "` + resource + `"}}
`
	}
	orders := mustTenant(t, config("bucket/{{ .tenant }}.tar.gz"), "orders")
	b, err := fetch(t.Context(), orders, "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fetch(t.Context(), orders, b.ETag); err != bundles.ErrNotModified {
		t.Errorf("by ETag: got %v, want ErrNotModified", err)
	}
	for _, resource := range []string{
		"bucket/a+b=(c)%20@d.tar.gz", "moved/bucket/orders.tar.gz", "bucket/orders.tar.gz?versionId=a+b&x", "/moved/bucket/a+b=(c)%20@d.tar.gz",
	} {
		if _, err := fetch(t.Context(), mustTenant(t, config(resource), "orders"), `"0"`); err != nil {
			t.Errorf("%s: %v", resource, err)
		}
	}
	if _, err := fetch(t.Context(), mustTenant(t, config("bucket/{{ .tenant }}.tar.gz"), "invented"), ""); !errors.Is(err, bundles.ErrNotFound) {
		t.Errorf("a missing key: got %v, want ErrNotFound", err)
	}

	faulty := func(want string) {
		t.Helper()
		_, err := fetch(t.Context(), orders, "")
		if err == nil || errors.Is(err, bundles.ErrNotFound) || errors.Is(err, bundles.ErrRefused) || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	s.keys.Store("AKIA", "another")
	faulty("status 403 Forbidden (SignatureDoesNotMatch)")
	s.keys.Delete("AKIA")
	faulty("(InvalidAccessKeyId)")
	t.Setenv("AWS_ACCESS_KEY_ID", "")
	faulty("no AWS_ACCESS_KEY_ID set in environment")
}

// metadata is a credential service of ECS, which the environment names.
type metadata struct {
	*httptest.Server
	asked    atomic.Int32
	lifetime time.Duration
	hang     chan struct{} // closed: it answers
}

func newMetadata(t *testing.T) *metadata {
	m := &metadata{lifetime: time.Hour, hang: make(chan struct{})}
	close(m.hang)
	m.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-m.hang:
		case <-r.Context().Done():
			return
		}
		n := m.asked.Add(1)
		json.NewEncoder(w).Encode(map[string]any{
			"AccessKeyId": "ASIA", "SecretAccessKey": "s3cret", "Token": fmt.Sprint(n),
			"Expiration": time.Now().Add(m.lifetime),
		})
	}))
	t.Cleanup(m.Close)
	t.Setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", m.URL)
	t.Setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN", "x")
	return m
}

// Tenants with equal credentials share them, and others do not; whoever renews
// them does so for all, and without a race.
func TestCredentialsShared(t *testing.T) {
	for _, c := range []struct {
		name, path, headers, region string
		want                        int32 // requests for credentials by four tenants
	}{
		{"equal", "", "a", "r", 1},
		{"other paths and headers", "/{{ .tenant }}", "{{ .tenant }}", "r", 1},
		{"other credentials", "", "a", "r-{{ .tenant }}", 4},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, m := newS3(t), newMetadata(t)
			s.keys.Store("ASIA", "s3cret")
			template, _, err := parse(t, `
services:
  s:
    url: "`+s.URL+c.path+`"
    headers: {x-a: "`+c.headers+`"}
    credentials: {s3_signing: {metadata_credentials: {aws_region: "`+c.region+`"}}}
bundles: {b: {resource: "{{ .tenant }}.tar.gz"}}
`, control.Options{})
			if err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			for i := range 16 {
				tenant := must(template.Tenant(fmt.Sprint("tenant-", i%4)))
				wg.Go(func() {
					for range 3 {
						if _, err := fetch(t.Context(), tenant, ""); !errors.Is(err, bundles.ErrNotFound) {
							t.Errorf("got %v, want ErrNotFound", err)
						}
					}
				})
			}
			wg.Wait()
			if got := m.asked.Load(); got != c.want {
				t.Errorf("got %d requests for credentials, want %d", got, c.want)
			}
		})
	}
}

// Credentials that cannot be had keep nobody else waiting, and nobody for
// longer than they want to.
func TestCredentialsHang(t *testing.T) {
	s, m := newS3(t), newMetadata(t)
	m.hang = make(chan struct{})
	s.keys.Store("ASIA", "s3cret")
	config := `
services: {s: {url: "` + s.URL + `", credentials: {s3_signing: {metadata_credentials: {aws_region: "hang"}}}}, t: {url: "` + s.URL + `"}}
bundles: {b: {service: s}, c: {service: t}}
`
	tenant := mustTenant(t, config, "orders")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if _, err := fetch(ctx, tenant, ""); !errors.Is(err, context.Canceled) {
				t.Errorf("got %v, want context.Canceled", err)
			}
		})
	}
	other := tenant.Bundles[1]
	if _, err := other.Source.Fetch(t.Context(), other.Resource, ""); err == nil {
		t.Error("another service: got a bundle without credentials")
	}
	cancel()
	wg.Wait()
	close(m.hang)
	if _, err := fetch(t.Context(), tenant, ""); !errors.Is(err, bundles.ErrNotFound) {
		t.Errorf("once they are there: got %v, want ErrNotFound", err)
	}
}

var quiet = log.New(io.Discard, "", 0)

// authority makes certificates.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
	file        string
}

func newAuthority(t *testing.T) *authority {
	a := &authority{key: must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)), file: filepath.Join(t.TempDir(), "ca.pem")}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "CA"}, IsCA: true, BasicConstraintsValid: true,
		NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der := must(x509.CreateCertificate(rand.Reader, template, template, &a.key.PublicKey, a.key))
	a.certificate = must(x509.ParseCertificate(der))
	write(t, a.file, pemText("CERTIFICATE", der, nil))
	return a
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// issue returns a certificate and its key as PEM.
func (a *authority) issue(name string, hosts ...string) (certificate, key string) {
	k := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour),
		DNSNames: hosts, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der := must(x509.CreateCertificate(rand.Reader, template, a.certificate, &k.PublicKey, a.key))
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), private(k)
}

func (a *authority) serve(t *testing.T, handler http.HandlerFunc, hosts ...string) *httptest.Server {
	certificate, key := a.issue("server", hosts...)
	s := httptest.NewUnstartedServer(handler)
	pool := x509.NewCertPool()
	pool.AddCert(a.certificate)
	s.TLS = &tls.Config{
		Certificates: []tls.Certificate{must(tls.X509KeyPair([]byte(certificate), []byte(key)))},
		ClientCAs:    pool, ClientAuth: tls.VerifyClientCertIfGiven,
	}
	s.Config.ErrorLog = quiet
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

func TestTLS(t *testing.T) {
	ca, dir := newAuthority(t), t.TempDir()
	archive := signedBundle(t, "")
	var mu sync.Mutex
	var peer string
	server := ca.serve(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		peer = ""
		if len(r.TLS.PeerCertificates) > 0 {
			peer = r.TLS.PeerCertificates[0].Subject.CommonName
		}
		w.Header().Set("Connection", "close") // so that each request shakes hands
		w.Write(archive)
	})
	rotate := func(name string) {
		certificate, key := ca.issue(name)
		write(t, filepath.Join(dir, "cert.pem"), certificate)
		write(t, filepath.Join(dir, "key.pem"), key)
	}
	service := func(def string) *control.Tenant {
		return mustTenant(t, `
services: {s: {url: "`+server.URL+`", `+def+`}}
bundles: {b: {}}
`, "orders")
	}
	late := filepath.Join(dir, "late.pem")
	lateTenant := service(`tls: {ca_cert: "` + late + `"}`)
	clientTLS := `credentials: {client_tls: {cert: "` + dir + `/cert.pem", private_key: "` + dir + `/key.pem"}}, tls: {ca_cert: "` + ca.file + `"}`
	client := service(clientTLS)
	for _, c := range []struct {
		name   string
		do     func()
		tenant *control.Tenant
		want   string // of the error
		peer   string
	}{
		{"no CA", nil, service(`headers: {}`), "certificate signed by unknown authority", ""},
		{"insecure", nil, service(`allow_insecure_tls: true`), "", ""},
		{"a CA", nil, service(`tls: {ca_cert: "` + ca.file + `"}`), "", ""},
		{"a CA and the system's", nil, service(`tls: {ca_cert: "` + ca.file + `", system_ca_required: true}`), "", ""},
		{"a CA that is not there", nil, lateTenant, "no such file", ""},
		{"and now is", func() { write(t, late, string(must(os.ReadFile(ca.file)))) }, lateTenant, "", ""},
		{"no client certificate", nil, client, "failed to read client certificate", ""},
		{"a client certificate", func() { rotate("first") }, client, "", "first"},
		{"another", func() { rotate("second") }, client, "", "second"},
		{"of another tenant", nil, service(clientTLS), "", "second"},
		{"with a token", nil, service(`credentials: {bearer: {token: t}}, tls: {ca_cert: "` + ca.file + `"}`), "", ""},
	} {
		if c.do != nil {
			c.do()
		}
		_, err := fetch(t.Context(), c.tenant, "")
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %q", c.name, err, c.want)
		}
		mu.Lock()
		if err == nil && peer != c.peer {
			t.Errorf("%s: got peer %q, want %q", c.name, peer, c.peer)
		}
		mu.Unlock()
	}
}

func TestResponseHeaderTimeout(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	defer server.Close()
	tenant := mustTenant(t, `
services: {s: {url: "`+server.URL+`", response_header_timeout_seconds: 0.05}}
bundles: {b: {}}
`, "orders")
	if _, err := fetch(t.Context(), tenant, ""); err == nil || !strings.Contains(err.Error(), "timeout awaiting response headers") {
		t.Errorf("got %v, want a timeout awaiting response headers", err)
	}
}

func TestOAuth2(t *testing.T) {
	ca := newAuthority(t)
	var asked atomic.Int32
	status := http.StatusOK
	tokens := ca.serve(t, func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		w.WriteHeader(status)
		body := must(io.ReadAll(r.Body))
		user, password, _ := r.BasicAuth()
		if status != http.StatusOK {
			fmt.Fprintf(w, "no: %s %s %s", user, password, body)
			return
		}
		fmt.Fprintf(w, `{"access_token": "for-%s-%s", "token_type": "bearer", "expires_in": 3600}`, user, password)
	})
	var got atomic.Value
	archive := signedBundle(t, "")
	server := ca.serve(t, func(w http.ResponseWriter, r *http.Request) {
		got.Store(r.Header["Authorization"])
		w.Write(archive)
	})
	service := func(secret string) *control.Tenant {
		return mustTenant(t, `
services: {s: {url: "`+server.URL+`", tls: {ca_cert: "`+ca.file+`"}, credentials: {oauth2: {token_url: "`+tokens.URL+`", client_id: "{{ .tenant }}", client_secret: `+secret+`}}}}
bundles: {b: {}}
`, "orders")
	}
	for range 2 {
		if _, err := fetch(t.Context(), service("hush"), ""); err != nil {
			t.Fatal(err)
		}
		if text := fmt.Sprint(got.Load()); text != "[Bearer for-orders-hush]" {
			t.Errorf("got %s", text)
		}
	}
	status = http.StatusUnauthorized
	_, err := fetch(t.Context(), service("hush2"), "")
	if err == nil || strings.Contains(err.Error(), "hush") || !strings.Contains(err.Error(), "OAuth2 token endpoint") {
		t.Errorf("got %v, want the endpoint's refusal without what it says", err)
	}
}

// TestWebIdentity has the token of a Kubernetes service account, which is
// rotated in its file, exchanged at a fake STS for credentials that soon expire.
func TestWebIdentity(t *testing.T) {
	token := filepath.Join(t.TempDir(), "token")
	t.Setenv("AWS_ROLE_ARN", "arn:aws:iam::1:role/r")
	t.Setenv("AWS_WEB_IDENTITY_TOKEN_FILE", token)
	ca := newAuthority(t)
	var mu sync.Mutex
	var seen []string
	sts := ca.serve(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		seen = append(seen, r.FormValue("WebIdentityToken"))
		fmt.Fprintf(w, `<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>
<AccessKeyId>ASIA</AccessKeyId><SecretAccessKey>s3cret</SecretAccessKey><SessionToken>x</SessionToken><Expiration>%s</Expiration>
</Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>`, time.Now().Add(time.Minute).UTC().Format(time.RFC3339))
	}, "sts.r.sts.test")
	// OPA asks STS over the process's default transport.
	before := http.DefaultTransport
	defer func() { http.DefaultTransport = before }()
	own := before.(*http.Transport).Clone()
	own.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, sts.Listener.Addr().String())
	}
	own.TLSClientConfig = &tls.Config{RootCAs: x509.NewCertPool()}
	own.TLSClientConfig.RootCAs.AddCert(ca.certificate)
	http.DefaultTransport = own

	s := newS3(t)
	s.keys.Store("ASIA", "s3cret")
	config := `
services: {s: {url: "` + s.URL + `", credentials: {s3_signing: {web_identity_credentials: {aws_region: r, aws_domain: sts.test}}}}}
bundles: {b: {resource: "{{ .tenant }}"}}
`
	orders := mustTenant(t, config, "orders")
	if _, err := fetch(t.Context(), orders, ""); err == nil || !strings.Contains(err.Error(), "unable to read web token") {
		t.Errorf("without a token: got %v", err)
	}
	write(t, token, "first")
	var wg sync.WaitGroup
	for i := range 8 {
		tenant := mustTenant(t, config, fmt.Sprint("tenant-", i%2))
		wg.Go(func() {
			if _, err := fetch(t.Context(), tenant, ""); !errors.Is(err, bundles.ErrNotFound) {
				t.Errorf("got %v, want ErrNotFound", err)
			}
		})
	}
	wg.Wait()
	write(t, token, "second")
	if _, err := fetch(t.Context(), orders, ""); !errors.Is(err, bundles.ErrNotFound) {
		t.Errorf("got %v, want ErrNotFound", err)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(seen) == 0 || seen[0] != "first" || seen[len(seen)-1] != "second" {
		t.Errorf("got tokens %q, want first and then second", seen)
	}
}

// Identities have nothing of a secret in them, and differ where it does.
func TestCredentialsIdentity(t *testing.T) {
	seen := map[string]string{}
	for _, def := range []string{
		``,
		`credentials: {oauth2: {token_url: "https://x", client_id: i, client_secret: hush}}`,
		`credentials: {oauth2: {token_url: "https://x", client_id: i, client_secret: hush2}}`,
		`credentials: {oauth2: {token_url: "https://x", client_id: i, signing_key: k}}`,
		`credentials: {oauth2: {token_url: "https://x", client_id: i, signing_key: l}}`,
		`credentials: {client_tls: {cert: /a, private_key: /b}}`,
		`credentials: {client_tls: {cert: /a, private_key: /b, private_key_passphrase: hush}}`,
		`credentials: {client_tls: {cert: /a, private_key: /c}}`,
		`credentials: {s3_signing: {environment_credentials: {}}}`,
		`credentials: {s3_signing: {profile_credentials: {aws_region: r, profile: a}}}`,
		`credentials: {s3_signing: {profile_credentials: {aws_region: r, profile: b}}}`,
		`allow_insecure_tls: true`,
		`tls: {ca_cert: /no/a}`,
		`tls: {ca_cert: /no/b}`,
		`response_header_timeout_seconds: 1`,
	} {
		id := mustTenant(t, `
keys: {k: {algorithm: HS256, private_key: hush}, l: {algorithm: HS256, private_key: hush2}}
services: {s: {url: "https://example.com", `+def+`}}
bundles: {b: {}}
`, "orders").Bundles[0].Service
		if other, ok := seen[id]; ok {
			t.Errorf("%s and %s: got one identity", def, other)
		}
		if seen[id] = def; len(id) != 64 || strings.Contains(id, "hush") {
			t.Errorf("got identity %q", id)
		}
	}
}
