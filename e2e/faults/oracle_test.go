package faults

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
	"github.com/gatehouse-authz/gatehouse/e2e/traffic"
)

// rules is the policy of all tenants; what differs is their data. Its answers
// say whose they are, and of which revision.
const rules = `package envoy.authz

http := input.attributes.request.http

default allowed := false

allowed if {
	http.method == "GET"
	some prefix in data.settings.open
	startswith(http.path, prefix)
}

allowed if http.method in data.settings.methods[data.settings.roles[http.headers["x-user"]]]

allow := {"allowed": allowed, "headers": {"x-tenant": data.settings.tenant, "x-revision": data.settings.revision}}
`

// variants are what data says: of them, revision n has variant n modulo their
// number, so that each revision differs from the one before it.
var variants = []map[string]any{
	{"open": []string{"/open/"}, "roles": map[string]any{"alice": "manager", "bob": "clerk"}},
	{"open": []string{}, "roles": map[string]any{"alice": "clerk", "bob": "manager"}},
	{"open": []string{"/open/"}, "roles": map[string]any{"bob": "clerk"}},
	{"open": []string{}, "roles": map[string]any{"alice": "clerk"}},
}

// bundleOf returns the files of revision n of a tenant. More files may be given.
func bundleOf(tenant string, n int, more map[string]string) map[string]string {
	settings := map[string]any{
		"tenant": tenant, "revision": "v" + strconv.Itoa(n),
		"methods": map[string]any{"clerk": []string{"GET"}, "manager": []string{"GET", "POST", "DELETE"}},
	}
	for k, v := range variants[n%len(variants)] {
		settings[k] = v
	}
	data, err := json.Marshal(map[string]any{"settings": settings})
	if err != nil {
		panic(err)
	}
	files := map[string]string{
		"policy.rego": rules, "data.json": string(data),
		".manifest": fmt.Sprintf(`{"revision": "v%d"}`, n),
	}
	for name, text := range more {
		files[name] = text
	}
	return files
}

// question is one of the requests that are asked all the time.
type question struct{ method, path, user string }

var questions = func() (all []question) {
	for _, method := range []string{"GET", "POST", "DELETE"} {
		for _, path := range []string{"/open/a", "/closed/a"} {
			for _, user := range []string{"", "alice", "bob", "mallory"} {
				all = append(all, question{method, path, user})
			}
		}
	}
	return all
}()

// check returns a question as Envoy asks it.
func (q question) check(tenant string) *authv3.CheckRequest {
	headers := map[string]string{}
	if q.user != "" {
		headers["x-user"] = q.user
	}
	req := traffic.Get(q.path, headers)
	req.Attributes.Request.Http.Method = q.method
	traffic.Name(req, tenant)
	return req
}

// verdicts are what "opa eval" says of each variant and question. It is asked
// once, with the very bundles.
var verdicts = sync.OnceValues(func() (says [][]bool, err error) {
	opa, err := stage.Tool("opa")
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "gatehouse-oracle-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	var inputs []json.RawMessage
	for _, q := range questions {
		text, err := protojson.Marshal(q.check("any"))
		if err != nil {
			return nil, err
		}
		inputs = append(inputs, text)
	}
	text, err := json.Marshal(inputs)
	if err != nil {
		return nil, err
	}
	inputFile := filepath.Join(dir, "input.json")
	if err := os.WriteFile(inputFile, text, 0o600); err != nil {
		return nil, err
	}
	for n := range variants {
		bundle := filepath.Join(dir, fmt.Sprintf("v%d.tar.gz", n))
		if err := os.WriteFile(bundle, stage.Bundle(bundleOf("any", n, nil)), 0o600); err != nil {
			return nil, err
		}
		cmd := exec.Command(opa, "eval", "--format=json", "--bundle", bundle, "--input", inputFile,
			`[answer | some question in input; answer := data.envoy.authz.allow with input as question]`)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			return nil, fmt.Errorf("opa eval: %w\n%s%s", err, out, stderr.String())
		}
		var result struct {
			Result []struct {
				Expressions []struct {
					Value []struct {
						Allowed bool
						Headers map[string]string
					}
				}
			}
		}
		if err := json.Unmarshal(out, &result); err != nil {
			return nil, fmt.Errorf("opa eval: %w", err)
		}
		if len(result.Result) != 1 || len(result.Result[0].Expressions[0].Value) != len(questions) {
			return nil, fmt.Errorf("opa eval: got %s, want an answer to each of %d questions", out, len(questions))
		}
		var row []bool
		for _, a := range result.Result[0].Expressions[0].Value {
			row = append(row, a.Allowed)
		}
		says = append(says, row)
	}
	return says, nil
})

// answer is what came of a question.
type answer struct {
	allowed          bool
	status           int    // of HTTP; 0: there was no answer
	tenant, revision string // as it says; "" of a denial that no policy made
	err              error  // where there was none
}

// answerOf reads a response of gRPC.
func answerOf(resp *authv3.CheckResponse, err error) answer {
	if err != nil {
		return answer{err: err}
	}
	var a answer
	headers := resp.GetOkResponse().GetHeaders()
	if resp.GetStatus().GetCode() == 0 {
		a.allowed, a.status = true, 200
	} else {
		headers = resp.GetDeniedResponse().GetHeaders()
		a.status = int(resp.GetDeniedResponse().GetStatus().GetCode())
		if a.status == 0 {
			a.status = 403
		}
	}
	for _, h := range headers {
		switch h.GetHeader().GetKey() {
		case "x-tenant":
			a.tenant = h.GetHeader().GetValue()
		case "x-revision":
			a.revision = h.GetHeader().GetValue()
		}
	}
	return a
}

// judge compares answers with what they should be. It is safe for concurrent
// use.
type judge struct {
	says [][]bool

	mu        sync.Mutex
	published map[string]int // :: tenant → its newest revision; guarded by mu
	answers   int            // guarded by mu, as is all that follows
	allowed   int
	faults    map[string]int // :: status or code of gRPC → denials that no policy made, and errors
	wrong     []string
	allows    int // of wrong
	latency   traffic.Histogram
}

func newJudge(t *testing.T) *judge {
	t.Helper()
	says, err := verdicts()
	if err != nil {
		t.Fatal(err)
	}
	return &judge{says: says, published: map[string]int{}, faults: map[string]int{}}
}

// publish notes that a revision of a tenant may be seen from now on.
func (j *judge) publish(tenant string, n int) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.published[tenant] = max(n, j.published[tenant])
}

// hear notes an answer to a question.
func (j *judge) hear(tenant string, q int, a answer, took time.Duration) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.answers++
	j.latency.Record(took)
	if a.allowed {
		j.allowed++
	}
	if !a.allowed && a.revision == "" {
		name := strconv.Itoa(a.status)
		if a.err != nil {
			name = "error"
			if s, ok := status.FromError(a.err); ok {
				name = s.Code().String()
			} else if errors.Is(a.err, context.DeadlineExceeded) {
				name = "timeout"
			}
		}
		j.faults[name]++
		return
	}
	n, err := strconv.Atoi(strings.TrimPrefix(a.revision, "v"))
	newest, known := j.published[tenant]
	switch {
	case err != nil || a.tenant != tenant || !known || n > newest || n < 1:
	case a.allowed != j.says[n%len(variants)][q]:
	default:
		return
	}
	if a.allowed {
		j.allows++
	}
	if len(j.wrong) < 5 {
		j.wrong = append(j.wrong, fmt.Sprintf("tenant %s, question %+v, newest revision v%d: %+v", tenant, questions[q], newest, a))
	} else {
		j.wrong = append(j.wrong, "")
	}
}

// sentence fails the test for each wrong answer, and returns what there was.
func (j *judge) sentence(t *testing.T) (r report) {
	t.Helper()
	j.mu.Lock()
	defer j.mu.Unlock()
	if len(j.wrong) > 0 {
		t.Errorf("%d of %d answers are wrong, %d of them allow; the first: %s", len(j.wrong), j.answers, j.allows, strings.Join(j.wrong[:min(5, len(j.wrong))], "\n"))
	}
	if j.answers > 100 && j.allowed == 0 && len(j.published) > 0 {
		t.Errorf("none of %d answers allows: they prove nothing", j.answers)
	}
	r = report{answers: j.answers, faults: map[string]int{}, p50: j.latency.Quantile(.5), p99: j.latency.Quantile(.99), max: j.latency.Max()}
	for k, n := range j.faults {
		r.faults[k] = n
		r.failed += n
	}
	return r
}

// report is what a judge has heard.
type report struct {
	answers, failed int
	faults          map[string]int
	p50, p99, max   time.Duration
}

func (r report) String() string {
	return fmt.Sprintf("%d answers compared with opa eval, wrong 0, faults %v, p50 %s, p99 %s, longest %s",
		r.answers, r.faults, r.p50.Round(10*time.Microsecond), r.p99.Round(10*time.Microsecond), r.max.Round(100*time.Microsecond))
}
