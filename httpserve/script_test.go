package httpserve_test

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
	"golang.org/x/tools/txtar"

	"github.com/gatehouse-authz/gatehouse/authztest"
	"github.com/gatehouse-authz/gatehouse/bundles"
	"github.com/gatehouse-authz/gatehouse/control"
	"github.com/gatehouse-authz/gatehouse/extauthz"
	"github.com/gatehouse-authz/gatehouse/httpserve"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// offers reads plugins.gatehouse_http.
func offers(t testing.TB, text string) *control.HTTP {
	t.Helper()
	var block map[string]any
	if err := yaml.Unmarshal([]byte(text), &block); err != nil {
		t.Fatal(err)
	}
	template, _, err := control.Parse(map[string]any{"plugins": map[string]any{"gatehouse_http": block}},
		control.Options{Dir: new(bundles.Dir)})
	if err != nil {
		t.Fatal(err)
	}
	tenant, err := template.Tenant("orders")
	if err != nil {
		t.Fatal(err)
	}
	return tenant.HTTP
}

// pool runs a pool with one tenant, orders, and what it offers.
func pool(t testing.TB, bundle, config string, change func(*tenants.Settings)) (*tenants.Pool, *authztest.Memory) {
	t.Helper()
	return poolOf(t, tenants.Config{}, bundle, config, change)
}

func poolOf(t testing.TB, cfg tenants.Config, bundle, config string, change func(*tenants.Settings)) (*tenants.Pool, *authztest.Memory) {
	t.Helper()
	source := new(authztest.Memory)
	source.Set("orders", bundle)
	h := offers(t, config)
	cfg.Settings = authztest.Settings(source, func(_ tenants.ID, s *tenants.Settings) {
		s.HTTP = h
		if change != nil {
			change(s)
		}
	})
	return authztest.Pool(t, cfg), source
}

func server(t testing.TB, cfg httpserve.Config) *httpserve.Server {
	t.Helper()
	s, err := httpserve.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// realInputs makes input documents as those of checks.
func realInputs(t testing.TB) httpserve.Inputs {
	t.Helper()
	checks, err := extauthz.New(extauthz.Config{})
	if err != nil {
		t.Fatal(err)
	}
	return func(r *httpserve.CheckedRequest, decisionID string) tenants.Input {
		return checks.Input((*extauthz.Request)(r), decisionID)
	}
}

// TestScripts runs the scripts of testdata; its README says how they are written.
func TestScripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			t.Parallel()
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			runScript(t, text)
		})
	}
}

func runScript(t *testing.T, text []byte) {
	archive := txtar.Parse(text)
	config, script := "", ""
	bundle := &txtar.Archive{}
	for _, f := range archive.Files {
		switch f.Name {
		case "config.yaml":
			config = string(f.Data)
		case "script":
			script = string(f.Data)
		default:
			bundle.Files = append(bundle.Files, f)
		}
	}
	p, _ := pool(t, string(txtar.Format(bundle)), config, nil)
	web := httptest.NewServer(server(t, httpserve.Config{
		Pool: p, Inputs: realInputs(t), Local: true, URL: "https://authz.example.com", TrustedPeers: []string{"127.0.0.1"},
	}))
	t.Cleanup(web.Close)

	for n, block := range regexp.MustCompile(`\n\n+`).Split(strings.TrimSpace(script), -1) {
		lines := strings.Split(block, "\n")
		for strings.HasPrefix(lines[0], "#") {
			lines = lines[1:]
		}
		if len(lines) == 0 {
			continue
		}
		runBlock(t, web, n, lines)
	}
}

func runBlock(t *testing.T, web *httptest.Server, n int, lines []string) {
	t.Helper()
	method, target, _ := strings.Cut(lines[0], " ")
	req, err := http.NewRequestWithContext(t.Context(), method, web.URL+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	path, query, _ := strings.Cut(target, "?")
	req.URL.Opaque, req.URL.RawQuery = path, query // as it stands, uncleaned
	if strings.HasPrefix(path, "//") {
		req.URL.Opaque = "//" + req.URL.Host + path // or it would be a host
	}
	var body []byte
	var resp *http.Response
	var got []byte
	for _, line := range lines[1:] {
		word, rest, _ := strings.Cut(line, " ")
		switch {
		case word == ">":
			body = append(body, rest...)
			continue
		case strings.HasSuffix(word, ":"):
			name := strings.TrimSuffix(word, ":")
			if name == "host" {
				req.Host = rest
			}
			req.Header.Add(name, rest)
			continue
		case resp == nil:
			if body != nil {
				req.Body, req.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
			}
			if resp, err = web.Client().Transport.RoundTrip(req); err != nil {
				t.Fatalf("%s: %v", lines[0], err)
			}
			if got, err = io.ReadAll(resp.Body); err != nil {
				t.Fatalf("%s: %v", lines[0], err)
			}
			resp.Body.Close()
		}
		if text := expect(resp, got, word, rest); text != "" {
			t.Errorf("block %d, %s\n%s: %s\nstatus %d, body %s", n, lines[0], line, text, resp.StatusCode, got)
		}
	}
	if resp == nil {
		t.Fatalf("block %d, %s: nothing is expected", n, lines[0])
	}
}

var (
	anyID   = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}`)
	anyTime = regexp.MustCompile(`(_ns":)\d+`)
)

// expect says what is other than expected; "": nothing.
func expect(resp *http.Response, body []byte, what, rest string) string {
	switch what {
	case "status":
		if rest != http.StatusText(resp.StatusCode) && rest != resp.Status[:3] {
			return "got " + resp.Status
		}
	case "header":
		name, want, ok := strings.Cut(rest, " == ")
		if !ok {
			name, _, _ = strings.Cut(rest, " ")
			if len(resp.Header.Values(name)) > 0 {
				return "got " + strings.Join(resp.Header.Values(name), " | ")
			}
			return ""
		}
		if got := strings.Join(resp.Header.Values(name), " | "); got != want {
			return "got " + got
		}
	case "body":
		body = anyTime.ReplaceAll(anyID.ReplaceAll(body, []byte("ID")), []byte("${1}0"))
		how, want, _ := strings.Cut(rest, " ")
		switch how {
		case "contains":
			if !bytes.Contains(body, []byte(want)) {
				return "it does not"
			}
		case "lacks":
			if bytes.Contains(body, []byte(want)) {
				return "it does not"
			}
		case "==":
			var a, b any
			if json.Unmarshal(body, &a) != nil || json.Unmarshal([]byte(want), &b) != nil || !reflect.DeepEqual(a, b) {
				return "got " + string(body)
			}
		case "is":
			if strings.TrimSuffix(string(body), "\n") != want {
				return "got " + string(body)
			}
		default:
			return "no such expectation"
		}
	default:
		return "no such expectation"
	}
	return ""
}
