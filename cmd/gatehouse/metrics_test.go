package main

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

var update = flag.Bool("update", false, "write the generated parts of docs anew")

// metric is one row of docs/metrics.md.
type metric struct{ name, kind, labels, help string }

var description = regexp.MustCompile(`^Desc\{fqName: "([^"]+)", help: "(.*?)", (?:unit: ".*", )?constLabels: \{(.*)\}, variableLabels: \{(.*)\}\}$`)

// metricsOf are all metrics that a server with every listener can export.
func metricsOf(t *testing.T) []metric {
	t.Helper()
	dir := t.TempDir()
	cfg, err := load("", dir, false)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Telemetry.OTLP.Endpoint = "127.0.0.1:4317" // nobody is asked
	s, err := newGatehouse(&options{log: slog.New(slog.NewTextHandler(io.Discard, nil))}, dir, cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ended, cancel := context.WithCancel(context.Background())
		cancel()
		_ = s.telemetry.Shutdown(ended)
	})
	problems, err := testutil.GatherAndLint(s.registry)
	if err != nil {
		t.Error(err)
	}
	for _, p := range problems {
		if strings.HasPrefix(p.Metric, "gatehouse_") {
			t.Errorf("lint: %s: %s", p.Metric, p.Text)
		}
	}
	kinds := map[string]string{"gatehouse_decision_log_delivery_seconds": "histogram"} // and of those that have a value from the start
	families, err := s.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		kinds[f.GetName()] = strings.ToLower(f.GetType().String())
	}
	descs := make(chan *prometheus.Desc)
	go func() { s.registry.Describe(descs); close(descs) }()
	var all []metric
	for d := range descs {
		m := description.FindStringSubmatch(d.String())
		if m == nil {
			t.Fatalf("cannot read %s", d)
		}
		kind := "gauge"
		if strings.HasSuffix(m[1], "_total") {
			kind = "counter"
		}
		help := strings.ReplaceAll(m[2], "|", `\|`)
		labels := strings.FieldsFunc(m[4], func(r rune) bool { return r == ',' })
		for _, l := range strings.FieldsFunc(m[3], func(r rune) bool { return r == ',' }) {
			name, _, _ := strings.Cut(l, "=")
			labels = append(labels, name)
		}
		all = append(all, metric{m[1], cmp.Or(kinds[m[1]], kind), strings.Join(labels, ", "), help})
	}
	slices.SortFunc(all, func(a, b metric) int { return cmp.Compare(a.name, b.name) })
	return slices.Compact(all)
}

// toolchain is the Go release whose runtime the table of its metrics is of.
const toolchain = "go1.26"

// docs/metrics.md has each metric that is exported, as it is: with its type, its
// labels and what it means; and none that is not. After a change:
//
//	go test ./cmd/gatehouse -run TestMetrics -update
func TestMetrics(t *testing.T) {
	const path = "../../docs/metrics.md"
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	text := string(data)
	all := metricsOf(t)
	for _, table := range []struct {
		name string
		of   func(metric) bool
	}{
		{"own", func(m metric) bool { return strings.HasPrefix(m.name, "gatehouse_") }},
		{"process", func(m metric) bool { return !strings.HasPrefix(m.name, "gatehouse_") }},
	} {
		if table.name == "process" && !strings.HasPrefix(runtime.Version(), toolchain+".") && runtime.Version() != toolchain {
			continue // another release of Go has others, which are not ours
		}
		var rows strings.Builder
		rows.WriteString("| metric | type | labels | what it is |\n|---|---|---|---|\n")
		for _, m := range all {
			if table.of(m) {
				fmt.Fprintf(&rows, "| `%s` | %s | %s | %s |\n", m.name, m.kind, m.labels, m.help)
			}
		}
		begin, end := fmt.Sprintf("<!-- %s: written by TestMetrics -->\n", table.name), fmt.Sprintf("<!-- end of %s -->", table.name)
		before, rest, ok := strings.Cut(text, begin)
		old, after, ok2 := strings.Cut(rest, end)
		if !ok || !ok2 {
			t.Fatalf("docs/metrics.md has no place for the table %q", table.name)
		}
		if old != rows.String() && !*update {
			t.Errorf("docs/metrics.md is not of this build: see TestMetrics\ngot\n%s\nwant\n%s", old, rows.String())
		}
		text = before + begin + rows.String() + end + after
	}
	if *update {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	// What the text names is exported, too: metrics, and those that begin with "x_*".
	for _, name := range regexp.MustCompile(`gatehouse_[a-z_]+`).FindAllString(text, -1) {
		if !slices.ContainsFunc(all, func(m metric) bool {
			return m.name == name || strings.HasSuffix(name, "_") && strings.HasPrefix(m.name, name) ||
				m.kind == "histogram" && slices.Contains([]string{m.name + "_bucket", m.name + "_sum", m.name + "_count"}, name)
		}) {
			t.Errorf("docs/metrics.md names %s, which nothing exports", name)
		}
	}
}
