// Package authztest sets the stage for tests: bundles from text, a source of
// bundles in memory, and a pool that runs.
package authztest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/tools/txtar"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/bundles"
	"github.com/gatehouse-authz/gatehouse/control"
	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// Files returns the files of a txtar archive by name. Text before the first
// file marker is a policy, "policy.rego".
func Files(text string) map[string]string {
	a := txtar.Parse([]byte(text))
	files := map[string]string{}
	if c := bytes.TrimSpace(a.Comment); len(c) > 0 {
		files["policy.rego"] = string(a.Comment)
	}
	for _, f := range a.Files {
		files[f.Name] = string(f.Data)
	}
	return files
}

// Tarball packs files as a bundle.
func Tarball(files map[string]string) []byte {
	var b bytes.Buffer
	zw := gzip.NewWriter(&b)
	tw := tar.NewWriter(zw)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		must(tw.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(files[name]))}))
		_, err := tw.Write([]byte(files[name]))
		must(err)
	}
	must(tw.Close())
	must(zw.Close())
	return b.Bytes()
}

// Bundle reads the bundle that text is, as Files does.
func Bundle(text string) (*bundles.Bundle, error) {
	archive := Tarball(Files(text))
	b, err := readArchive(bytes.NewReader(archive))
	if err != nil {
		return nil, err
	}
	b.Archive = archive
	return b, nil
}

func readArchive(r io.Reader) (*bundles.Bundle, error) {
	return bundles.Read(r, "test", bundles.Limits{})
}

// Policy compiles the bundle that text is, for envoy/authz/allow and entries.
func Policy(t testing.TB, text string, entries ...string) *policy.Policy {
	t.Helper()
	b, err := Bundle(text)
	if err != nil {
		t.Fatal(err)
	}
	part, err := policy.Prepare(b.Bundle)
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.Compile([]policy.Named{{Name: "policy", Part: part}},
		policy.Options{Entries: append([]string{"envoy/authz/allow"}, entries...)})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// Memory is a Source of bundles in memory. The zero Memory has none.
type Memory struct {
	mu      sync.Mutex
	bundles map[string]*bundles.Bundle // :: name → bundle
	errs    map[string]error           // :: name → what Fetch returns instead
	gates   map[string]chan struct{}   // :: name → what Fetch waits for
	fetches map[string]int             // :: name → calls of Fetch
	version int
}

// Set makes text the bundle of that name, and ends its failing.
func (m *Memory) Set(name, text string) {
	b, err := Bundle(text)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.init()
	m.version++
	m.errs[name] = err
	if err == nil {
		b.Name, b.ETag = name, fmt.Sprint(m.version)
		m.bundles[name] = b
	}
}

// Fail makes Fetch of that name return err; nil ends that.
func (m *Memory) Fail(name string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.init()
	m.errs[name] = err
}

// Hold makes Fetch of that name wait until release is called, or its context
// ends.
func (m *Memory) Hold(name string) (release func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.init()
	gate := make(chan struct{})
	m.gates[name] = gate
	return sync.OnceFunc(func() { close(gate) })
}

// Fetches returns how often that name was fetched, or asked for changes.
func (m *Memory) Fetches(name string) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.fetches[name]
}

func (m *Memory) init() {
	if m.bundles == nil {
		m.bundles = map[string]*bundles.Bundle{}
		m.errs = map[string]error{}
		m.gates = map[string]chan struct{}{}
		m.fetches = map[string]int{}
	}
}

// Fetch implements bundles.Source.
func (m *Memory) Fetch(ctx context.Context, name, etag string) (*bundles.Bundle, error) {
	m.mu.Lock()
	m.init()
	m.fetches[name]++
	gate := m.gates[name]
	m.mu.Unlock()
	if gate != nil {
		select {
		case <-gate:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch b := m.bundles[name]; {
	case m.errs[name] != nil:
		return nil, m.errs[name]
	case b == nil:
		return nil, bundles.ErrNotFound
	case b.ETag == etag:
		return nil, bundles.ErrNotModified
	default:
		return b, nil
	}
}

// Settings returns settings by which each tenant has the one bundle of its own
// name at source, polled every second. Change, if not nil, changes them.
func Settings(source bundles.Source, change func(tenants.ID, *tenants.Settings)) func(tenants.ID) (*tenants.Settings, error) {
	return func(id tenants.ID) (*tenants.Settings, error) {
		s := &tenants.Settings{Tenant: &control.Tenant{
			Labels: map[string]string{"app": string(id)},
			Bundles: []control.Bundle{{
				Name: "policy", Resource: string(id), Source: source, Service: "memory", Read: readArchive,
				MinDelay: time.Second, MaxDelay: time.Second,
			}},
			Entry: "envoy/authz/allow",
		}}
		if change != nil {
			change(id, s)
		}
		return s, nil
	}
}

// Pool runs a pool until the test ends. What it leaves running fails the test.
func Pool(t testing.TB, cfg tenants.Config) *tenants.Pool {
	t.Helper()
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	p := tenants.New(cfg)
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Errorf("pool: %v", err)
		}
	})
	return p
}

// Input is a tenants.Input that is a JSON text, or else an error. It is recorded as
// it is, as the inputs of checks are.
type Input string

var _ tenants.Recorded = Input("")

// Input returns the value of the text.
func (i Input) Input(tenants.Needs) (ast.Value, error) {
	if i == "" {
		i = "{}"
	}
	v, err := ast.ValueFromReader(bytes.NewReader([]byte(i)))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", tenants.ErrInvalid, err)
	}
	return v, nil
}

// Weight is that of the text.
func (i Input) Weight() int64 { return int64(len(i)) }

// WriteInput writes the value of the text.
func (i Input) WriteInput(w tenants.Writer, needs tenants.Needs) bool {
	v, err := i.Input(needs)
	if err != nil {
		return false
	}
	w.Value(v)
	return true
}

// Ask asks a tenant one question about the JSON text input.
func Ask(ctx context.Context, p *tenants.Pool, id tenants.ID, input string) tenants.Answer {
	var answer tenants.Answer
	q := []tenants.Question{{DecisionID: "test", Input: Input(input)}}
	if err := p.Decide(ctx, id, q, func(_ int, a tenants.Answer) { answer = a }); err != nil {
		return tenants.Answer{Err: err}
	}
	return answer
}

func must(err error) {
	if err != nil {
		panic(err) // writing to memory does not fail
	}
}
