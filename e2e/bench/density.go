package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
	"github.com/gatehouse-authz/gatehouse/e2e/traffic"
)

// densityConfig is that of tenants which have all that a tenant can have: a
// bundle that is polled, status and a decision log.
const densityConfig = `
tenants: {capacity: 20000, required: [%s]}
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

// density prints what idle tenants take: memory beside that of a server without
// any, goroutines, and the time until all are warm.
func (b *bench) density(binary string, n int, stdout io.Writer) error {
	recorder, err := stage.StartRecorder()
	if err != nil {
		return err
	}
	defer recorder.Close()
	files := func(name string) map[string]string {
		return map[string]string{
			"policy.rego": densityPolicy,
			"data.json":   fmt.Sprintf(`{"users": {"alice": ["reader"], "bob": ["writer"], "%s": ["reader", "writer"]}}`, name),
			".manifest":   `{"revision": "1", "roots": ["envoy/authz", "users"]}`,
		}
	}
	names := make([]string, n)
	for i := range names {
		names[i] = fmt.Sprintf("app-%05d", i)
		recorder.Put("/own/"+names[i]+".tar.gz", stage.Bundle(files(names[i])))
	}
	recorder.Put("/shared.tar.gz", stage.Bundle(files("carol")))

	w := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "tenants\tbundles\twarm after s\tRSS MiB\tKB per tenant\tgoroutines\t")
	var base int64
	for _, c := range []struct {
		bundles, resource string
		names             []string
	}{
		{"none", "none", nil},
		{"own", "own/{{ .tenant }}.tar.gz", names},
		{"shared", "shared.tar.gz", names},
	} {
		config := filepath.Join(b.dir, c.bundles+".yaml")
		text := stage.Listen + fmt.Sprintf(densityConfig, strings.Join(c.names, ", "), recorder.URL, c.resource)
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			return err
		}
		begun := time.Now()
		g, err := stage.StartGatehouse(binary, "-c", config)
		if err != nil {
			return err
		}
		warm := time.Since(begun)
		rss, goroutines, err := settled(g)
		g.Stop()
		if err != nil {
			return err
		}
		if len(c.names) == 0 {
			base = rss
		}
		fmt.Fprintf(w, "%d\t%s\t%.1f\t%.0f\t%.0f\t%.0f\t\n", len(c.names), c.bundles, warm.Seconds(),
			float64(rss)/(1<<20), float64(rss-base)/1e3/float64(max(len(c.names), 1)), goroutines)
	}
	return w.Flush()
}

// settleTime is how long a server may take to give memory back that loading took.
const settleTime = 20 * time.Second

// settled returns the least that a server takes within the settleTime, and its
// goroutines then.
func settled(g *stage.Gatehouse) (rss int64, goroutines float64, err error) {
	for begun := time.Now(); time.Since(begun) < settleTime; time.Sleep(time.Second) {
		now, err := traffic.RSS(g.Pid())
		if err != nil {
			return 0, 0, err
		}
		if rss == 0 || now < rss {
			rss = now
		}
	}
	goroutines, err = g.Metric("go_goroutines")
	return rss, goroutines, err
}
