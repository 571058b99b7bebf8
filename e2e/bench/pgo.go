package main

import (
	"bytes"
	"cmp"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"syscall"
	"time"

	"github.com/google/pprof/profile"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
	"github.com/gatehouse-authz/gatehouse/e2e/traffic"
)

// profiler is added to the gatehouse that is recorded: the one that is shipped has
// no profiler.
//
//go:embed profiler.go.txt
var profiler []byte

// maxProfile bounds the file: it lies in the repository, and every build reads it.
const maxProfile = 300_000 // bytes

// leftOut are functions whose stacks are not in the profile: where the compiler
// inlines what they call, verifying a token makes 25 allocations more, and takes
// longer than without a profile.
var leftOut = regexp.MustCompile(`^github\.com/open-policy-agent/opa/v1/topdown\.builtinJWT`)

// record records CPU profiles of the load that the other parts make, one for each
// evaluator with the log off and on, and merges them.
func (b *bench) record(ctx context.Context) ([]table, error) {
	if b.profile == "" {
		return nil, errors.New("-profile names no file")
	}
	dir, err := b.folder("pgo")
	if err != nil {
		return nil, err
	}
	binary, err := buildProfiled(ctx, dir)
	if err != nil {
		return nil, err
	}
	t := table{Part: "pgo", Title: "CPU profiles that were recorded", Columns: columns("evaluator, log, requests:0, CPU s:1")}
	var recorded []*profile.Profile
	for _, logs := range []string{"", b.sink()} {
		for _, evaluator := range b.evaluators {
			file := filepath.Join(dir, fmt.Sprintf("%s-%s.pprof", evaluator, onOff(logs != "")))
			p, checks, err := b.recordOne(ctx, binary, evaluator, logs, file)
			if err != nil {
				return nil, err
			}
			recorded = append(recorded, p)
			t.Rows = append(t.Rows, row{evaluator, onOff(logs != ""), float64(checks), cpuOf(p).Seconds()})
			b.say("pgo: %s, log %s", evaluator, onOff(logs != ""))
		}
	}
	merged, err := profile.Merge(recorded)
	if err != nil {
		return nil, err
	}
	text, dropped, err := small(merged, maxProfile)
	if err != nil {
		return nil, err
	}
	b.say("pgo: %d bytes; %.1f %% of the samples are in stacks too rare to be kept", len(text), dropped*100)
	return []table{t}, os.WriteFile(b.profile, text, 0o644)
}

// buildProfiled builds a gatehouse with the profiler, and without the profile that
// is there: what a build makes of it would be recorded again.
func buildProfiled(ctx context.Context, dir string) (binary string, err error) {
	module, err := stage.Module()
	if err != nil {
		return "", err
	}
	root := filepath.Dir(module)
	source, overlay := filepath.Join(dir, "profiler.go"), filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(source, profiler, 0o600); err != nil {
		return "", err
	}
	text := toJSON(map[string]any{"Replace": map[string]string{filepath.Join(root, "cmd/gatehouse/profiler.go"): source}})
	if err := os.WriteFile(overlay, []byte(text), 0o600); err != nil {
		return "", err
	}
	binary = filepath.Join(dir, "gatehouse")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-pgo=off", "-overlay", overlay, "-o", binary, "./cmd/gatehouse")
	cmd.Dir, cmd.Env = root, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building gatehouse with a profiler: %w\n%s", err, out)
	}
	return binary, nil
}

// recordOne records one process under load.
func (b *bench) recordOne(ctx context.Context, binary, evaluator, logs, file string) (p *profile.Profile, requests int, err error) {
	s := httpSetting(binary, evaluator)
	s.logged, s.env = logs, []string{"GATEHOUSE_CPU_PROFILE=" + file}
	policies := []policyCase{trivial(), roles(users), jwt()}
	if logs == "" { // bodies would come faster than they are delivered
		policies = append(policies, readBody())
	}
	for i, c := range policies {
		s.tenants[tenantOf(i)] = c.files
		c.ask(tenantOf(i))
	}
	g, err := b.gatehouse(s)
	if err != nil {
		return nil, 0, err
	}
	var contenders []*contender
	for _, c := range policies {
		for range 2 { // checks are the most of what it does
			entry, err := b.enter(g, c, 0, "gatehouse", c.name)
			if err != nil {
				return nil, 0, err
			}
			contenders = append(contenders, entry)
		}
	}
	for _, kind := range []httpKind{batches, lists} {
		cases, err := httpCases("http://"+g.http+"/t/", b.httpClient(), kind)
		if err != nil {
			return nil, 0, err
		}
		for _, c := range cases {
			load := traffic.Load{Concurrency: httpConcurrency, Duration: b.roundTime / 2}
			contenders = append(contenders, &contender{names: []string{c.name}, server: g, load: func(ctx context.Context) *traffic.Report { return c.drive(ctx, load) }})
		}
	}
	if err := g.Signal(syscall.SIGUSR1); err != nil {
		return nil, 0, err
	}
	for _, c := range contenders {
		if err := c.round(ctx); err != nil {
			return nil, 0, err
		}
		requests += c.report.Checks
	}
	if err := g.Signal(syscall.SIGUSR2); err != nil {
		return nil, 0, err
	}
	p, err = awaitProfile(file)
	g.Stop()
	return p, requests, err
}

// awaitProfile reads a profile once it is whole.
func awaitProfile(file string) (p *profile.Profile, err error) {
	for begun := time.Now(); time.Since(begun) < 10*time.Second; time.Sleep(50 * time.Millisecond) {
		var text []byte
		if text, err = os.ReadFile(file); err != nil {
			continue
		}
		if p, err = profile.ParseData(text); err == nil {
			return p, nil
		}
	}
	return nil, fmt.Errorf("the profile: %w", err)
}

func cpuOf(p *profile.Profile) (sum time.Duration) {
	for _, s := range p.Sample {
		sum += time.Duration(s.Value[len(s.Value)-1])
	}
	return sum
}

// small returns a profile as a file of at most limit bytes: of functions and
// lines, which is what the compiler looks at, and without the rarest stacks, whose
// share of the samples is returned.
func small(p *profile.Profile, limit int) (text []byte, dropped float64, err error) {
	if err := p.Aggregate(true, true, true, true, false, false); err != nil {
		return nil, 0, err
	}
	p.FilterSamplesByName(nil, leftOut, nil, nil)
	for _, m := range p.Mapping {
		m.File, m.BuildID = "", ""
	}
	p.TimeNanos, p.Comments = 0, nil
	if p, err = profile.Merge([]*profile.Profile{p}); err != nil { // of equal stacks one
		return nil, 0, err
	}
	whole := cpuOf(p)
	slices.SortStableFunc(p.Sample, func(a, b *profile.Sample) int { return cmp.Compare(b.Value[0], a.Value[0]) })
	for {
		var out bytes.Buffer
		if err := p.Compact().Write(&out); err != nil {
			return nil, 0, err
		}
		if out.Len() <= limit {
			return out.Bytes(), 1 - float64(cpuOf(p))/float64(whole), nil
		}
		p.Sample = p.Sample[:len(p.Sample)*9/10]
	}
}
