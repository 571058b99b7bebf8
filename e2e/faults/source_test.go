package faults

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

// bulk is what makes a bundle too large for an ill network: files that do not
// compress.
func bulk(bytes int) map[string]string {
	random := make([]byte, bytes/2)
	_, _ = rand.Read(random)
	return map[string]string{"bulk/data.json": `{"text": "` + hex.EncodeToString(random) + `"}`}
}

// An ill network between gatehouse and the service of its bundles: what is loaded
// decides on, tenants whose bundles come another way do not notice, and when the
// network is well again the newest revision decides.
func TestNetwork(t *testing.T) {
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
	config := strings.Replace(from("http://"+link.Addr), "services: {", fmt.Sprintf("services: {direct: {url: %q}, ", s.URL), 1)
	// More tenants are behind the network than are fetched at a time.
	var ill []string
	for i := range 40 {
		ill = append(ill, fmt.Sprintf("ill-%d", i))
		s.publish(ill[i], 1)
	}
	s.publish("calm", 1)
	g := serve(t, config+`
overrides:
  calm: {opa: {bundles: {policy: {service: direct}}}}
`)
	c := dial(t, g.GRPC)
	for _, tenant := range append(ill, "calm") {
		c.becomes(t, tenant, 1, 10*time.Second)
	}

	n, calm := 1, 1 // revisions
	for _, fault := range []struct {
		name  string
		begin func() error
		end   func() error
	}{
		{"slow", toxin(link, "bandwidth", map[string]any{"rate": 1}), cure(link, "bandwidth")},
		{"stalled", toxin(link, "timeout", map[string]any{"timeout": 0}), cure(link, "timeout")},
		{"cut", toxin(link, "limit_data", map[string]any{"bytes": 4000}), cure(link, "limit_data")},
		{"reset", toxin(link, "reset_peer", map[string]any{"timeout": 0}), cure(link, "reset_peer")},
		{"late", toxin(link, "latency", map[string]any{"latency": 1000, "jitter": 500}), cure(link, "latency")},
		{"down", link.Down, link.Up},
	} {
		t.Run(fault.name, func(t *testing.T) {
			stop := asks(t, s.judge, 300, append(ill, "calm"), c.ask)
			if err := fault.begin(); err != nil {
				t.Fatal(err)
			}
			ended := false
			defer func() {
				if !ended {
					_ = fault.end()
				}
			}()
			n++
			for _, tenant := range ill {
				s.publishWith(tenant, n, bulk(64<<10))
			}
			time.Sleep(500 * time.Millisecond) // polls meet the fault
			fresh := fmt.Sprintf("fresh-%s", fault.name)
			s.publishWith(fresh, 1, bulk(64<<10))
			asked := time.Now()
			a := c.ask(fresh, 0)
			waited := time.Since(asked)
			if a.allowed || a.status == 403 || waited > time.Second {
				t.Errorf("a tenant that cannot be loaded: got %+v after %s, want a denial that is no 403 within 1 s", a, waited)
			}
			var updates time.Duration
			for range 2 {
				calm++
				s.publish("calm", calm)
				updates = max(updates, c.becomes(t, "calm", calm, pollDelay+2*time.Second))
				time.Sleep(500 * time.Millisecond)
			}
			r := stop(t)
			ended = true
			if err := fault.end(); err != nil {
				t.Fatal(err)
			}
			begun := time.Now()
			for _, tenant := range append(ill, fresh) {
				want := n
				if tenant == fresh {
					want = 1
				}
				c.becomes(t, tenant, want, 45*time.Second)
			}
			if r.failed > 0 {
				t.Errorf("faults: got %v, want none of tenants that were loaded", r.faults)
			}
			t.Logf("PASS %s: %s; a new tenant was refused after %s; others were updated after at most %s; all of 41 are current %s after the end",
				fault.name, r, waited.Round(time.Millisecond), updates, time.Since(begun).Round(10*time.Millisecond))
		})
	}
}

func toxin(l *stage.Link, kind string, attributes map[string]any) func() error {
	return func() error { return l.Toxin(kind, attributes) }
}

func cure(l *stage.Link, kind string) func() error { return func() error { return l.Cure(kind) } }

// What a source gives that is no good bundle is not taken: the last good one
// decides, an operator reads why, and the next good one is taken.
func TestContent(t *testing.T) {
	s := newShelf(t)
	s.publish("orders", 1)
	s.publish("calm", 1)
	g := serve(t, from(s.URL)+"tenants: {limits: {bundle_bytes: 1MiB, bundle_expanded_bytes: 8MiB}}\n")
	c := dial(t, g.GRPC)
	c.becomes(t, "orders", 1, 5*time.Second)
	c.becomes(t, "calm", 1, 5*time.Second)

	bytesOf := func(data []byte) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Etag", `"bad"`)
			_, _ = w.Write(data)
		}
	}
	good := stage.Bundle(bundleOf("orders", 900, bulk(64<<10))) // it would allow, were it taken
	flipped := bytes.Clone(good)
	flipped[len(flipped)/2] ^= 0xff
	files := func(more map[string]string) []byte { return stage.Bundle(bundleOf("orders", 900, more)) }
	endless := func(w http.ResponseWriter, r *http.Request) {
		zip := gzip.NewWriter(w)
		_ = tar.NewWriter(zip).WriteHeader(&tar.Header{Name: "data.json", Mode: 0o644, Size: 1 << 40})
		block := make([]byte, 64<<10)
		_, _ = rand.Read(block)
		for r.Context().Err() == nil {
			if _, err := zip.Write(block); err != nil {
				return
			}
		}
	}
	n := 1
	for i, fault := range []struct {
		name  string
		serve http.HandlerFunc
		says  string // a part of the error; "" for any
	}{
		{"corrupt gzip", bytesOf(flipped), ""},
		{"truncated tar", bytesOf(gzipped(unzipped(t, good)[:3000])), ""},
		{"truncated archive", bytesOf(good[:len(good)/2]), ""},
		{"empty", bytesOf(nil), ""},
		{"HTML with status 200", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/html")
			fmt.Fprint(w, "<!doctype html><title>Log in</title>")
		}, ""},
		{"304 to who has nothing", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNotModified) }, ""},
		{"500", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) }, "500"},
		{"redirects without end", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, r.URL.Path, http.StatusFound) }, ""},
		{"oversized", bytesOf(files(bulk(4 << 20))), "larger"},
		{"endless", endless, "larger"},
		{"gzip bomb", bytesOf(bomb(12)), "larger"},
		{"bad Rego", bytesOf(files(map[string]string{"bad.rego": "package bad\n\nallow if {"})), "rego"},
		{"undefined function", bytesOf(files(map[string]string{"bad.rego": "package bad\n\nallow if nothing.like.this(1)"})), "undefined"},
		{"unsafe builtin", bytesOf(files(map[string]string{"bad.rego": `package bad

allow if http.send({"method": "GET", "url": "http://127.0.0.1/"}).status_code == 200`})), "http.send"},
		{"rules that conflict", bytesOf(files(map[string]string{"bad.rego": "package settings\n\ntenant := \"other\""})), ""},
	} {
		t.Run(fault.name, func(t *testing.T) {
			stop := asks(t, s.judge, 200, []string{"orders", "calm"}, c.ask)
			memory := watchMemory(t, g.Pid())
			fresh := fmt.Sprintf("fresh-%d", i)
			s.Answer("orders", fault.serve)
			s.Answer(fresh, fault.serve)
			begun := time.Now()
			if a := c.ask(fresh, 0); a.allowed || a.revision != "" || a.status == 403 {
				t.Errorf("a tenant that has nothing else: got %+v, want a denial that is no 403", a)
			}
			if fault.name == "304 to who has nothing" {
				// To who asked with an ETag this is a good answer.
				time.Sleep(2 * pollDelay)
			} else {
				eventually(t, "the status says what is wrong", func() bool { return statusOf(t, g, "orders").Error != "" })
				if got := statusOf(t, g, "orders").Error; !strings.Contains(got, fault.says) {
					t.Errorf("error: got %q, want one with %q", got, fault.says)
				}
			}
			noticed := time.Since(begun)
			if got := c.revisionOf("orders"); got != fmt.Sprintf("v%d", n) {
				t.Errorf("revision that decides: got %s, want v%d", got, n)
			}
			n++
			s.publish("orders", n)
			s.publish(fresh, 1)
			recovered := c.becomes(t, "orders", n, 10*time.Second)
			c.becomes(t, fresh, 1, 30*time.Second)
			before, peak := memory()
			if rise := peak - before; rise > 256<<20 {
				t.Errorf("memory rose by %s", mib(rise))
			}
			r := stop(t)
			if r.failed > 0 {
				t.Errorf("faults: got %v, want none", r.faults)
			}
			t.Logf("PASS %s: %s; told of after %s; the next good one decides after %s; memory rose by %s",
				fault.name, r, noticed.Round(10*time.Millisecond), recovered, mib(peak-before))
		})
	}
}

func unzipped(t *testing.T, data []byte) []byte {
	t.Helper()
	r, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	plain, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return plain
}

func gzipped(data []byte) []byte {
	var b bytes.Buffer
	zip := gzip.NewWriter(&b)
	_, _ = zip.Write(data) // to memory
	_ = zip.Close()
	return b.Bytes()
}

// bomb is a small archive of one large file of zeros. A block of them is
// compressed once, and then repeated: gzip may have many members.
func bomb(blocks int) []byte {
	const block = 64 << 20
	var header bytes.Buffer
	if err := tar.NewWriter(&header).WriteHeader(&tar.Header{Name: "data.json", Mode: 0o644, Size: int64(blocks) * block}); err != nil {
		panic(err)
	}
	return append(gzipped(header.Bytes()), bytes.Repeat(gzipped(make([]byte, block)), blocks)...)
}

// A thousand tenants get a new revision in the same second.
func TestUpdateOfAll(t *testing.T) {
	const count = 1000
	s := newShelf(t)
	all := make([]string, count)
	for i := range all {
		all[i] = fmt.Sprintf("tenant-%d", i)
		s.publish(all[i], 1)
	}
	// A thousand tenants that are polled all the time would be the load themselves.
	g := serve(t, strings.Replace(from(s.URL), "min_delay_seconds: 0.2, max_delay_seconds: 0.4", "min_delay_seconds: 1, max_delay_seconds: 2", 1))
	c := dial(t, g.GRPC)
	begun := time.Now()
	load(t, all, func(tenant string) { c.becomes(t, tenant, 1, 30*time.Second) })
	loaded := time.Since(begun)

	stop := asks(t, s.judge, 300, all, c.ask)
	time.Sleep(2 * time.Second)
	steady := stop(t)

	stop = asks(t, s.judge, 300, all, c.ask)
	memory := watchMemory(t, g.Pid())
	next := make([][]byte, count)
	for i, tenant := range all {
		next[i] = stage.Bundle(bundleOf(tenant, 2, nil))
	}
	begun = time.Now()
	for i, tenant := range all {
		s.judge.publish(tenant, 2)
		s.Put(tenant, next[i])
	}
	published := time.Since(begun)
	load(t, all, func(tenant string) { c.becomes(t, tenant, 2, 30*time.Second) })
	updated := time.Since(begun)
	r := stop(t)
	before, peak := memory()
	if r.failed > 0 {
		t.Errorf("faults: got %v, want none", r.faults)
	}
	if r.max > time.Second {
		t.Errorf("the slowest answer took %s, want at most 1 s", r.max)
	}
	if peak > 2*before+128<<20 {
		t.Errorf("memory rose from %s to %s", mib(before), mib(peak))
	}
	t.Logf("PASS: %d tenants loaded in %s; changed within %s, all current after %s; %s; p99 before %s; memory %s, at most %s",
		count, loaded.Round(10*time.Millisecond), published.Round(time.Millisecond), updated.Round(10*time.Millisecond), r, steady.p99, mib(before), mib(peak))
}

// load does something for each tenant, some at a time.
func load(t *testing.T, tenants []string, do func(tenant string)) {
	t.Helper()
	work := make(chan string)
	done := make(chan struct{})
	for range 16 {
		go func() {
			defer func() { done <- struct{}{} }()
			for tenant := range work {
				if !t.Failed() {
					do(tenant)
				}
			}
		}()
	}
	for _, tenant := range tenants {
		work <- tenant
	}
	close(work)
	for range 16 {
		<-done
	}
}
