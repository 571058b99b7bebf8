package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
	"github.com/gatehouse-authz/gatehouse/e2e/traffic"
)

// densityOptions say of how many tenants, and with how much data.
type densityOptions struct {
	tenants, data numbers
}

// numbers is a flag: numbers with commas.
type numbers []int

func (n *numbers) String() string { return strings.Trim(fmt.Sprint([]int(*n)), "[]") }

// Set reads the flag.
func (n *numbers) Set(text string) error {
	*n = nil
	for _, part := range strings.Split(text, ",") {
		i, err := strconv.Atoi(part)
		if err != nil || i < 0 {
			return fmt.Errorf("%q is no number of something", part)
		}
		*n = append(*n, i)
	}
	return nil
}

// densityConfig is that of tenants which have all that a tenant can have: a
// bundle that is polled and kept on disk, status and a decision log.
const densityConfig = `
tenants: {capacity: 20000, required: [%s]}
persist: {directory: %q}
opa:
  services: {control: {url: "%s"}}
  labels: {app: "{{ .tenant }}"}
  bundles: {policy: {service: control, resource: "%s"}}
  status: {service: control}
  decision_logs: {service: control}
`

const densityPolicy = `package envoy.authz

default allow := false

allow if input.attributes.request.http.method in {"GET", "HEAD"}

allow if {
	some role in data.users[input.attributes.request.http.headers["x-user"]]
	role == "writer"
}
`

// Bounds of a run.
const (
	// densityReady bounds how long tenants may take to be warm.
	densityReady = 10 * time.Minute

	// settleTime is how long a server may take to give memory back that loading
	// took.
	settleTime = 20 * time.Second

	// A run is made only if what it is expected to take, twice over for what the
	// collector leaves, is less than the memory that is available. Expected is what
	// a tenant took in the run with fewer tenants and as much data; of the first,
	// densityFactor times its data as JSON, and densityFixed.
	densityFactor = 24
	densityFixed  = 100e3 // bytes
)

// idle measures what idle tenants take: memory beside that of a server without
// any, goroutines, and the time until all are warm, from HTTP and, in a second
// start while the service is ill, from disk.
func (b *bench) idle(ctx context.Context) ([]table, error) {
	o := b.density
	if o.tenants == nil {
		o.tenants = numbers{1000, 10_000}
	}
	if o.data == nil {
		o.data = numbers{0, 10, 100}
	}
	t := table{Part: "density", Title: fmt.Sprintf("idle tenants, each with a bundle over HTTP, status and a decision log, required at start; memory is that of the process beside one without tenants, "+
		"the least within %s; n/a: it would take more than half of the available memory", settleTime),
		Columns: columns("bundles, tenants:0, KB of data:0, warm from HTTP s:1, warm from disk s:1, RSS MiB:0, KB/tenant:1, KB of heap/tenant:1, goroutines:0")}
	none, err := b.dense(ctx, population{bundles: "none"})
	if err != nil {
		return nil, err
	}
	t.Rows = append(t.Rows, row{"none", 0.0, 0.0, none.http, unknown, none.rss / (1 << 20), unknown, unknown, none.goroutines})
	for _, bundles := range []string{"own", "shared"} {
		for _, kb := range o.data {
			each := densityFixed + densityFactor*1e3*float64(kb) // bytes
			if bundles == "shared" {
				each = densityFixed
			}
			for _, n := range o.tenants {
				r := row{bundles, float64(n), float64(kb)}
				if available := available(); 2*each*float64(n) > available {
					b.say("density: %d tenants with %d KB of data are expected to take %.0f GiB, and %.0f are available", n, kb, 2*each*float64(n)/(1<<30), available/(1<<30))
					t.Rows = append(t.Rows, append(r, unknown, unknown, unknown, unknown, unknown, unknown))
					continue
				}
				is, err := b.dense(ctx, population{bundles, n, kb})
				if err != nil {
					return nil, fmt.Errorf("%d tenants, %s bundles, %d KB: %w", n, bundles, kb, err)
				}
				each = (is.rss - none.rss) / float64(n)
				t.Rows = append(t.Rows, append(r, is.http, is.disk, is.rss/(1<<20), each/1e3, (is.heap-none.heap)/float64(n)/1e3, is.goroutines))
				b.say("density: %s, %d tenants, %d KB: %.1f KB each", bundles, n, kb, each/1e3)
			}
		}
	}
	return []table{t}, nil
}

// available is the memory that the machine has to give, in bytes.
func available() float64 {
	var kib float64
	if _, err := fmt.Sscan(field("/proc/meminfo", "MemAvailable"), &kib); err != nil {
		return 0
	}
	return kib * 1024
}

// population is some tenants.
type population struct {
	bundles     string // none, own or shared
	tenants, kb int
}

// density is what they take.
type density struct {
	http, disk            float64 // seconds until they are warm
	rss, heap, goroutines float64 // bytes, bytes in use after a collection
}

// dense measures one population.
func (b *bench) dense(ctx context.Context, p population) (d density, err error) {
	recorder, err := stage.StartRecorder()
	if err != nil {
		return d, err
	}
	defer recorder.Close()
	names, resource := make([]string, p.tenants), "shared.tar.gz"
	for i := range names {
		names[i] = fmt.Sprintf("app-%05d", i)
		if p.bundles == "own" {
			recorder.Put("/own/"+names[i]+".tar.gz", stage.Bundle(densityFiles(names[i], p.kb)))
		}
	}
	if p.bundles == "own" {
		resource = "own/{{ .tenant }}.tar.gz"
	} else {
		recorder.Put("/shared.tar.gz", stage.Bundle(densityFiles("shared", p.kb)))
	}
	dir, err := b.folder("density")
	if err != nil {
		return d, err
	}
	defer os.RemoveAll(dir)
	config := filepath.Join(dir, "gatehouse.yaml")
	text := stage.Listen + fmt.Sprintf(densityConfig, strings.Join(names, ", "), filepath.Join(dir, "saved"), recorder.URL, resource)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return d, err
	}
	warm := func() (*stage.Gatehouse, float64, error) {
		begun := time.Now()
		g, err := stage.StartUnready(b.binary, "-c", config)
		if err != nil {
			return nil, 0, err
		}
		if err := ready(ctx, g); err != nil {
			g.Kill()
			return nil, 0, err
		}
		return g, time.Since(begun).Seconds(), nil
	}
	g, seconds, err := warm()
	if err != nil {
		return d, err
	}
	d.http = seconds
	err = d.settle(ctx, g)
	g.Stop()
	if err != nil || p.tenants == 0 {
		return d, err
	}
	recorder.Ail("/", stage.Fault{Status: http.StatusServiceUnavailable})
	if g, d.disk, err = warm(); err != nil {
		return d, fmt.Errorf("from disk: %w", err)
	}
	g.Stop()
	return d, nil
}

// ready returns once all tenants are warm.
func ready(ctx context.Context, g *stage.Gatehouse) error {
	timeout := time.After(densityReady)
	for {
		resp, err := http.Get("http://" + g.Admin + "/readyz")
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-g.Done():
			return fmt.Errorf("it ended: %s", g.Output())
		case <-timeout:
			return fmt.Errorf("its tenants are not warm after %s", densityReady)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// settle notes the least that the server takes within the settleTime.
func (d *density) settle(ctx context.Context, g *stage.Gatehouse) error {
	for begun := time.Now(); time.Since(begun) < settleTime && ctx.Err() == nil; time.Sleep(time.Second) {
		rss, err := traffic.RSS(g.Pid())
		if err != nil {
			return err
		}
		heap, err := g.Metric("go_memstats_heap_alloc_bytes")
		if err != nil {
			return err
		}
		if d.rss == 0 || float64(rss) < d.rss {
			d.rss = float64(rss)
		}
		if d.heap == 0 || heap < d.heap {
			d.heap = heap
		}
	}
	var err error
	d.goroutines, err = g.Metric("go_goroutines")
	return err
}

// densityFiles are those of a bundle with so much data of its own.
func densityFiles(name string, kb int) map[string]string {
	var data strings.Builder
	fmt.Fprintf(&data, `{"users": {"alice": ["reader"], "bob": ["writer"], %q: ["reader", "writer"]`, name)
	for i := 0; data.Len() < kb*1000; i++ {
		fmt.Fprintf(&data, `, "%s-user-%06d": ["reader", "role-%03d"]`, name, i, i*7%500)
	}
	data.WriteString("}}")
	return map[string]string{
		"policy.rego": densityPolicy,
		"data.json":   data.String(),
		".manifest":   `{"revision": "1", "roots": ["envoy/authz", "users"]}`,
	}
}
