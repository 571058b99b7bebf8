package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

// version is the bundle of a policy that tells its revision.
func version(v string) map[string]string {
	return map[string]string{
		".manifest":   `{"revision": "` + v + `"}`,
		"policy.rego": "package envoy.authz\n\n" + `allow := {"allowed": true, "headers": {"x-version": "` + v + `"}}`,
	}
}

var broken = map[string]string{"policy.rego": "package envoy.authz\n\nallow := undefined_function(1)"}

// A new bundle decides as soon as it is seen. A broken one does not: the old one
// goes on, and the tenant's status says why.
func TestUpdate(t *testing.T) {
	t.Run("archive", func(t *testing.T) {
		g, dir := startGatehouse(t, "", tenants{"orders": version("v1")})
		testUpdate(t, g, func(files map[string]string) { writeTenant(t, dir, "orders", files) })
	})
	t.Run("folder", func(t *testing.T) {
		g, dir := startGatehouse(t, "", nil)
		put := func(files map[string]string) {
			next := filepath.Join(dir, ".next")
			if err := os.MkdirAll(next, 0o700); err != nil {
				t.Fatal(err)
			}
			for name, text := range files {
				if err := os.WriteFile(filepath.Join(next, name), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.RemoveAll(filepath.Join(dir, ".last")); err != nil {
				t.Fatal(err)
			}
			_ = os.Rename(filepath.Join(dir, "orders"), filepath.Join(dir, ".last")) // the first time there is none
			if err := os.Rename(next, filepath.Join(dir, "orders")); err != nil {
				t.Fatal(err)
			}
		}
		put(version("v1"))
		testUpdate(t, g, put)
	})
	t.Run("HTTP", func(t *testing.T) {
		bundles, err := stage.StartBundleServer()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(bundles.Close)
		put := func(files map[string]string) { bundles.Put("orders", stage.Bundle(files)) }
		put(version("v1"))
		g := serve(t, bundleConfig(bundles))
		testUpdate(t, g, put)

		unchanged := bundles.Answers("orders", 304)
		eventually(t, "a poll is answered with 304", func() bool { return bundles.Answers("orders", 304) > unchanged })
		if loads := bundles.Answers("orders", 200); loads > 8 {
			t.Errorf("the bundle was sent %d times; it changed three times", loads)
		}

		bundles.Fail("orders", 503)
		eventually(t, "the status tells of the service", func() bool {
			return strings.Contains(statusOf(t, g, "orders").Error, "503")
		})
		equal(t, "revision", statusOf(t, g, "orders").Revision, "v2")
	})
}

// bundleConfig has tenants fetch their bundles from a service.
func bundleConfig(s *stage.BundleServer) string {
	return `
opa:
  services: {bundles: {url: "` + s.URL + `"}}
  bundles:
    policy:
      service: bundles
      resource: "{{ .tenant }}.tar.gz"
      polling: {min_delay_seconds: 0.1, max_delay_seconds: 0.2}
`
}

func testUpdate(t *testing.T, g *stage.Gatehouse, put func(files map[string]string)) {
	t.Helper()
	eachEnvoy(t, func(t *testing.T, envoy string) {
		n := startEnvoy(t, envoy, g.GRPC, options{}, listener{
			Name: "main", Timeout: slack, Routes: byTenant(tenants{"orders": nil}),
		})
		current := func() string {
			t.Helper()
			return n.allowed(t, n.get(t, "main", "/orders/a")).Headers["x-version"][0]
		}
		put(version("v1"))
		eventually(t, "v1 decides", func() bool { return current() == "v1" })

		put(broken)
		eventually(t, "the status tells of the broken bundle", func() bool {
			return strings.Contains(statusOf(t, g, "orders").Error, "undefined_function")
		})
		equal(t, "version that decides", current(), "v1")
		equal(t, "revision", statusOf(t, g, "orders").Revision, "v1")

		put(version("v2"))
		eventually(t, "v2 decides", func() bool { return current() == "v2" })
		equal(t, "status", statusOf(t, g, "orders"), tenantStatus{State: "warm", Revision: "v2"})
	})
}
