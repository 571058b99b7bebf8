package e2e

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

const (
	bucket  = "bundles"
	polling = 2 * time.Second // the longer of the delays that s3Config sets
)

// s3Reader may get the objects of orders and payments and do nothing else. To
// those who may not list a bucket, S3 says 403 with AccessDenied of a key that is
// missing; versitygw says it of the keys of others.
var s3Reader = stage.S3User{Access: "the-reader", Secret: "the-secret-of-the-reader"}

// startS3 starts an S3 server with a bucket.
func startS3(t *testing.T) *stage.S3 {
	t.Helper()
	binary, err := stage.Tool("versitygw")
	if err != nil {
		t.Fatal(err)
	}
	s3, err := stage.StartS3(binary, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s3.Stop()
		if t.Failed() {
			t.Logf("output of the S3 server:\n%s", tail(s3.Output(), 4<<10))
		}
	})
	if err := s3.MakeBucket(bucket); err != nil {
		t.Fatal(err)
	}
	if err := s3.AddReader(bucket, s3Reader, "orders/*", "payments/*"); err != nil {
		t.Fatal(err)
	}
	return s3
}

// s3Config has tenants fetch their bundles from the bucket, and keep them in a
// directory.
func s3Config(s3 *stage.S3, persist string) string {
	return fmt.Sprintf(`
persist: {directory: %q}
opa:
  services:
    s3:
      url: %s/%s
      credentials: {s3_signing: {environment_credentials: {}}}
  bundles:
    policy:
      service: s3
      resource: "{{ .tenant }}/bundle.tar.gz"
      polling: {min_delay_seconds: 1, max_delay_seconds: %d}
`, persist, s3.URL, bucket, int(polling.Seconds()))
}

// as starts gatehouse with the credentials of a user.
func as(t *testing.T, user stage.S3User, config string) *stage.Gatehouse {
	t.Helper()
	return start(t, func(binary string, args ...string) (*stage.Gatehouse, error) {
		return stage.StartGatehouseIn(user.Environment(), binary, args...)
	}, config)
}

func upload(t *testing.T, s3 *stage.S3, tenant string, content any) {
	t.Helper()
	if err := s3.Put(bucket, tenant+"/bundle.tar.gz", stage.Bundle(files(content))); err != nil {
		t.Fatal(err)
	}
}

// s3Envoy is an Envoy before a gatehouse, and what it tells of tenants.
func s3Envoy(t *testing.T, g *stage.Gatehouse, tenants ...string) *network {
	t.Helper()
	names := map[string]bool{}
	for _, name := range tenants {
		names[name] = true
	}
	return startEnvoy(t, envoyBinary(t, "1.40"), g.GRPC, options{}, listener{Name: "main", Timeout: slack, Routes: byTenant(names)})
}

// decides checks that a version decides for a tenant.
func (n *network) decides(t *testing.T, tenant, version string) {
	t.Helper()
	equal(t, "version of tenant "+tenant, n.allowed(t, n.get(t, "main", "/"+tenant+"/a")).Headers["x-version"], []string{version})
}

// becomes waits until a version decides, which must be soon.
func (n *network) becomes(t *testing.T, tenant, version string) {
	t.Helper()
	begun := time.Now()
	eventually(t, version+" decides", func() bool {
		seen := n.allowed(t, n.get(t, "main", "/"+tenant+"/a"))
		return seen.Headers["x-version"][0] == version
	})
	took := time.Since(begun)
	t.Logf("%s decides after %s", version, took.Round(10*time.Millisecond))
	if limit := polling + 2*time.Second; took > limit {
		t.Errorf("%s decides after %s, want at most %s", version, took, limit)
	}
}

// Tenants are loaded from a real S3 server, live through what happens to it, and
// come back from disk.
func TestS3(t *testing.T) {
	s3 := startS3(t)
	persist := filepath.Join(t.TempDir(), "bundles")
	config := s3Config(s3, persist)
	g := as(t, s3Reader, config)
	n := s3Envoy(t, g, "orders", "payments", "missing")

	t.Run("a tenant is loaded when it is asked", func(t *testing.T) {
		upload(t, s3, "orders", version("v1"))
		if keys, err := s3.List(bucket); err != nil || len(keys) != 1 {
			t.Fatalf("list of the bucket: got %q, %v, want one key", keys, err)
		}
		equal(t, "state before it is asked", statusOf(t, g, "orders").State, "")
		n.decides(t, "orders", "v1")
		equal(t, "status", statusOf(t, g, "orders"), tenantStatus{State: "warm", Revision: "v1"})
	})
	t.Run("a new object decides", func(t *testing.T) {
		upload(t, s3, "orders", version("v2"))
		n.becomes(t, "orders", "v2")
	})
	t.Run("an object that stays is not loaded again", func(t *testing.T) {
		before := activated(t, g, "orders")
		time.Sleep(2*polling + time.Second)
		equal(t, "time of activation", activated(t, g, "orders"), before)
	})
	t.Run("a key that never was is an unknown tenant", func(t *testing.T) {
		for _, user := range []stage.S3User{s3Reader, s3.Root} {
			want := map[bool]int{true: http.StatusNotFound, false: http.StatusForbidden}[user == s3.Root]
			if status, body, err := s3.Get(user, bucket, "missing/bundle.tar.gz"); err != nil || status != want {
				t.Fatalf("key that never was: got %d, %v, want %d; %s", status, err, want, body)
			}
		}
		n.denied(t, n.get(t, "main", "/missing/a"), http.StatusForbidden)

		// Who may list is told 404.
		n := s3Envoy(t, as(t, s3.Root, config), "missing", "orders")
		n.denied(t, n.get(t, "main", "/missing/a"), http.StatusForbidden)
		n.decides(t, "orders", "v2")
	})
	t.Run("wrong credentials are no unknown tenant", func(t *testing.T) {
		for code, user := range map[string]stage.S3User{
			"SignatureDoesNotMatch": {Access: s3Reader.Access, Secret: "another-secret"},
			"InvalidAccessKeyId":    {Access: "nobody", Secret: "another-secret"},
		} {
			g := as(t, user, s3Config(s3, ""))
			n := s3Envoy(t, g, "orders", "missing")
			for _, tenant := range []string{"orders", "missing"} {
				n.denied(t, n.get(t, "main", "/"+tenant+"/a"), http.StatusServiceUnavailable)
				if got := statusOf(t, g, tenant).Error; !strings.Contains(got, code) {
					t.Errorf("error of tenant %s: got %q, want one with %s", tenant, got, code)
				}
			}
			if strings.Contains(g.Output(), "another-secret") {
				t.Error("the log has the secret")
			}
		}
	})
	t.Run("without its object the last good bundle decides", func(t *testing.T) {
		if err := s3.Delete(bucket, "orders/bundle.tar.gz"); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the status tells of the missing object", func() bool { return statusOf(t, g, "orders").Error != "" })
		n.decides(t, "orders", "v2")
		upload(t, s3, "orders", version("v3"))
		n.becomes(t, "orders", "v3")
	})
	t.Run("the server stops and comes back", func(t *testing.T) {
		s3.Stop()
		eventually(t, "the status says since when it is stale", func() bool { return statusOf(t, g, "orders").StaleSince != nil })
		n.decides(t, "orders", "v3")
		n.denied(t, n.get(t, "main", "/payments/a"), http.StatusServiceUnavailable) // not known before
		if err := s3.Start(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "it is no more stale", func() bool { return statusOf(t, g, "orders").StaleSince == nil })
		upload(t, s3, "orders", version("v4"))
		n.becomes(t, "orders", "v4")
		upload(t, s3, "payments", version("p1"))
		eventually(t, "the other tenant is loaded", func() bool {
			return n.get(t, "main", "/payments/a").Status == http.StatusOK
		})
	})
	t.Run("restart with everything away", func(t *testing.T) {
		g.Stop()
		s3.Stop()
		g = as(t, s3Reader, config)
		n = s3Envoy(t, g, "orders", "payments", "missing")
		begun := time.Now()
		n.decides(t, "orders", "v4")
		n.decides(t, "payments", "p1")
		t.Logf("both tenants decide from disk after %s", time.Since(begun).Round(time.Millisecond))
		status := statusOf(t, g, "orders")
		if status.StaleSince == nil || status.Error == "" || status.State != "warm" {
			t.Errorf("status from disk: got %+v, want warm, stale since a time, with an error", status)
		}
		n.denied(t, n.get(t, "main", "/missing/a"), http.StatusServiceUnavailable) // nobody knows
		if err := s3.Start(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "it is no more stale", func() bool { return statusOf(t, g, "orders").StaleSince == nil })
		upload(t, s3, "orders", version("v5"))
		n.becomes(t, "orders", "v5")
	})
	t.Run("max_stale", func(t *testing.T) {
		s3.Stop()
		// What is on disk was confirmed just now, so it decides for some seconds more.
		g := as(t, s3Reader, strings.Replace(config, "persist: {", "persist: {max_stale: 1s, ", 1))
		n := s3Envoy(t, g, "payments")
		eventually(t, "a tenant that is too stale is refused", func() bool {
			return n.get(t, "main", "/payments/a").Status == http.StatusServiceUnavailable
		})
		n.denied(t, n.get(t, "main", "/payments/a"), http.StatusServiceUnavailable)
		if err := s3.Start(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "it decides again", func() bool { return n.get(t, "main", "/payments/a").Status == http.StatusOK })
	})
	t.Run("corrupt files on disk", func(t *testing.T) {
		g.Stop()
		names, err := filepath.Glob(filepath.Join(persist, "*"))
		if err != nil || len(names) != 2 {
			t.Fatalf("files on disk: got %q, %v, want two", names, err)
		}
		for i, name := range names {
			data, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			if i == 0 {
				data[len(data)/2] ^= 1 // one bit
			} else {
				data = data[:len(data)/2] // half of it
			}
			if err := os.WriteFile(name, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		s3.Stop()
		g = as(t, s3Reader, config)
		n = s3Envoy(t, g, "orders", "payments")
		for _, tenant := range []string{"orders", "payments"} {
			n.denied(t, n.get(t, "main", "/"+tenant+"/a"), http.StatusServiceUnavailable)
		}
		if got := metric(t, g, `gatehouse_bundle_failures_total{reason="saved"}`); got < 2 {
			t.Errorf("files that cannot be used: got %v, want at least 2", got)
		}
		if err := s3.Start(); err != nil {
			t.Fatal(err)
		}
		for _, tenant := range []string{"orders", "payments"} {
			eventually(t, tenant+" is loaded from its source", func() bool {
				return n.get(t, "main", "/"+tenant+"/a").Status == http.StatusOK
			})
		}
		// The good copy has taken the place of the bad one.
		g.Stop()
		s3.Stop()
		g = as(t, s3Reader, config)
		n = s3Envoy(t, g, "orders", "payments")
		n.decides(t, "orders", "v5")
		n.decides(t, "payments", "p1")
		if err := s3.Start(); err != nil {
			t.Fatal(err)
		}
	})
}

// A disk that takes no more is told of; the tenants live on.
func TestS3DiskFull(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can make a small disk")
	}
	s3 := startS3(t)
	disk := t.TempDir()
	mount(t, "-t", "tmpfs", "-o", "size=32k", "none", disk)
	t.Cleanup(func() { _ = exec.Command("umount", disk).Run() })
	g := as(t, s3Reader, s3Config(s3, disk))
	n := s3Envoy(t, g, "orders", "payments")
	failures := func() float64 { return metric(t, g, `gatehouse_bundle_failures_total{reason="save"}`) }

	upload(t, s3, "orders", version("v1"))
	n.decides(t, "orders", "v1")
	equal(t, "failures to save", failures(), 0)

	if err := os.WriteFile(filepath.Join(disk, "filler"), make([]byte, 64<<10), 0o600); err == nil {
		t.Fatal("the disk is not full")
	}
	upload(t, s3, "orders", version("v2"))
	n.becomes(t, "orders", "v2")
	eventually(t, "a metric tells of the full disk", func() bool { return failures() > 0 })
	if left, _ := filepath.Glob(filepath.Join(disk, "*.tmp")); len(left) > 0 {
		t.Errorf("the full disk has leftovers: %q", left)
	}

	mount(t, "-o", "remount,ro", disk)
	full := failures()
	upload(t, s3, "orders", version("v3"))
	n.becomes(t, "orders", "v3")
	eventually(t, "a metric tells of the disk that is read-only", func() bool { return failures() > full })

	// The old copy is whole: it decides after a restart.
	g.Stop()
	s3.Stop()
	g = as(t, s3Reader, s3Config(s3, disk))
	n = s3Envoy(t, g, "orders")
	n.decides(t, "orders", "v1")
	if err := s3.Start(); err != nil {
		t.Fatal(err)
	}
	n.becomes(t, "orders", "v3")
}

func mount(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("mount", args...).CombinedOutput(); err != nil {
		t.Fatalf("mount %q: %v\n%s", args, err, out)
	}
}
