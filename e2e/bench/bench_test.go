package main

import (
	"bytes"
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func found() *results {
	t := table{Part: "check", Title: "checks", Columns: columns("server, policy, CPU µs/check:1, " + ratioColumn + ":2, allocations:0")}
	t.Rows = []row{{"always-allow", "trivial", 50.0, 1.0, 172.0}, {"peer", "trivial", 150.0, 3.0, math.NaN()}}
	return &results{Machine: machine{CPU: "a CPU"}, Tables: []table{t}}
}

func TestMarkdown(t *testing.T) {
	var b bytes.Buffer
	if err := found().Tables[0].print(&b, true); err != nil {
		t.Fatal(err)
	}
	want := "\nChecks (`-only check`):\n\n" +
		"| server | policy | CPU µs/check | × always-allow | allocations |\n" +
		"|---|---|---:|---:|---:|\n" +
		"| always-allow | trivial | 50.0 | 1.00 | 172 |\n" +
		"| peer | trivial | 150.0 | 3.00 | n/a |\n"
	if b.String() != want {
		t.Errorf("got %s, want %s", b.String(), want)
	}
}

// What a run wrote, a later one is compared with, figure by figure.
func TestCompare(t *testing.T) {
	file := filepath.Join(t.TempDir(), "was.json")
	if err := found().save(file); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(file); err != nil || !json.Valid(text) {
		t.Fatalf("got %s, %v", text, err)
	}
	now := found()
	now.Tables[0].Rows[1][3], now.Tables[0].Rows[1][4] = 1.5, 300.0
	var b bytes.Buffer
	if err := now.compare(file, &b, true); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"| check: peer, trivial | × always-allow | 3.00 | 1.50 | 0.50 |",
		"| check: always-allow, trivial | allocations | 172.00 | 172.00 | 1.00 |",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("got %s, want %s", b.String(), want)
		}
	}
	if strings.Contains(b.String(), "peer, trivial | allocations") {
		t.Errorf("got %s, and the peer did not tell its allocations before", b.String())
	}
}

// A page has each part between its marks, however often it is written.
func TestInto(t *testing.T) {
	file := filepath.Join(t.TempDir(), "page.md")
	write := func(text string) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("before\n<!-- bench: check -->\nold\n<!-- end: check -->\nafter\n")
	for range 2 {
		if err := found().into(file); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	page := string(text)
	if strings.Contains(page, "old") || strings.Count(page, "| peer |") != 1 || !strings.HasPrefix(page, "before\n") || !strings.HasSuffix(page, "-->\nafter\n") {
		t.Errorf("got %s", page)
	}
	write("no marks")
	if err := found().into(file); err == nil {
		t.Error("a page without marks: got no error")
	}
}

func TestChoose(t *testing.T) {
	names := func(only string) (list []string) {
		chosen, err := choose(only)
		if err != nil {
			return []string{err.Error()}
		}
		for _, p := range chosen {
			list = append(list, p.name)
		}
		return list
	}
	for only, want := range map[string]string{
		"": "check rate tenants body large batch list envoy", "pgo,batch": "batch pgo", "nothing": `there is no part "nothing"`,
	} {
		if got := strings.Join(names(only), " "); got != want {
			t.Errorf("%q: got %q, want %q", only, got, want)
		}
	}
}

// The plot is as wide as its loads, and has a line for each quota in each panel.
func TestPlot(t *testing.T) {
	var cells []quotaCell
	for _, load := range []string{"checks", "batch of 10"} {
		for _, quota := range []float64{0.5, 1} {
			for procs := range quotaProcs + 1 {
				cells = append(cells, quotaCell{quota: quota, procs: procs, load: load, p99: 20, throttled: 0.5})
			}
		}
	}
	svg := drawQuotas(cells)
	if got := strings.Count(svg, "<polyline"); got != 8 {
		t.Errorf("got %d lines, want one for each load, quota and kind", got)
	}
	if got := strings.Count(svg, "<circle"); got != 8*quotaProcs {
		t.Errorf("got %d points, want those with GOMAXPROCS set", got)
	}
}
