package decisionlog_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/decisionlog"
	"github.com/gatehouse-authz/gatehouse/schedule"
)

func remembering(each int, bytes int64) *decisionlog.Logs {
	return decisionlog.New(decisionlog.Config{Schedule: schedule.New(1), Redact: true, Recent: each, RecentBytes: bytes})
}

func memory(tenant, id string, input ast.Value) *decisionlog.Memory {
	return &decisionlog.Memory{
		Tenant: tenant,
		Event:  decisionlog.Event{DecisionID: id, Outcome: "denied", Timestamp: time.Unix(1_700_000_000, 0), Input: input, Result: ast.Boolean(false)},
	}
}

func recalled(logs *decisionlog.Logs, tenant string) string {
	found, of := logs.Recall(tenant, func(*decisionlog.Memory) bool { return true })
	var ids []string
	for _, m := range found {
		ids = append(ids, m.DecisionID)
	}
	return fmt.Sprintf("%s of %d", strings.Join(ids, " "), of)
}

// So many of each tenant are remembered, the newest first, and of all as many as
// the memory has room for: the oldest of all are forgotten, whoever has them.
func TestRecentBounds(t *testing.T) {
	logs := remembering(3, 64<<10)
	for i := range 5 {
		logs.Remember(memory("a", fmt.Sprint(i), nil))
	}
	if got := recalled(logs, "a"); got != "4 3 2 of 3" {
		t.Errorf("got %s", got)
	}
	for i := range 1000 {
		logs.Remember(memory(fmt.Sprint("t", i), "x", nil))
	}
	if got := recalled(logs, "a"); got != " of 0" {
		t.Errorf("the oldest of all: got %s, want none", got)
	}
	kept := 0
	for i := range 1000 {
		if recalled(logs, fmt.Sprint("t", i)) == "x of 1" {
			kept++
		}
	}
	if recalled(logs, "t999") != "x of 1" || kept < 20 || kept > 64<<10/512 {
		t.Errorf("got %d of 1000 tenants with a decision, and %q of the last", kept, recalled(logs, "t999"))
	}

	large := ast.String(strings.Repeat("x", 8<<10))
	logs.Remember(memory("large", "l", large))
	found, _ := logs.Recall("large", func(*decisionlog.Memory) bool { return true })
	if len(found) != 1 || !found[0].Bare || found[0].Input != nil {
		t.Errorf("one that would take an eighth of the memory: got %+v", found)
	}
	off := remembering(0, 0)
	off.Remember(memory("a", "1", nil))
	if got := recalled(off, "a"); off.Remembers() || got != " of 0" {
		t.Errorf("turned off: got %s", got)
	}
}

// rules are a Filter of which each answer is given.
type rules struct {
	drop bool
	mask ast.Value
	err  error
}

func (r *rules) Drop(context.Context, ast.Value) (bool, error)      { return r.drop, r.err }
func (r *rules) Mask(context.Context, ast.Value) (ast.Value, error) { return r.mask, nil }

// What is shown is masked by the rules that decided, while they are in use; then
// by those of now, and if there are none nothing that they could mask is shown.
func TestRecentShow(t *testing.T) {
	logs := remembering(10, 0)
	input := ast.MustParseTerm(`{"a": 1, "b": 2, "headers": {"cookie": "c00kie"}}`).Value
	mask := func(path string) ast.Value { return ast.NewArray(ast.StringTerm(path)) }
	then := decisionlog.NewRules(&rules{mask: mask("/input/a")})
	show := func(r *decisionlog.Rules, now decisionlog.Filter) (text string, err error) {
		m := memory("t", "1", input)
		m.Rules, m.Labels = r, map[string]string{"tenant": "t"}
		if e := logs.Show(context.Background(), []*decisionlog.Memory{m}, now, time.Second, func(s decisionlog.Shown, failed error) bool {
			text, err = string(s.JSON), failed
			return true
		}); e != nil {
			t.Fatal(e)
		}
		return text, err
	}
	const head, tail = `{"labels":{"tenant":"t"},"decision_id":"1",`, `"timestamp":"`
	for _, c := range []struct {
		name  string
		rules *decisionlog.Rules
		now   decisionlog.Filter
		want  string
	}{
		{"no rules", nil, &rules{mask: mask("/input/b")}, `"input":{"a":1,"b":2,"headers":{"cookie":"**REDACTED**"}},"result":false,"masked":["/input/headers/cookie"],`},
		{"of then", then, &rules{mask: mask("/input/b")}, `"input":{"b":2,"headers":{"cookie":"**REDACTED**"}},"result":false,"erased":["/input/a"],"masked":["/input/headers/cookie"],`},
	} {
		if got, err := show(c.rules, c.now); err != nil || !strings.HasPrefix(got, head+c.want+tail) {
			t.Errorf("%s: got %s, %v, want %s", c.name, got, err, head+c.want)
		}
	}
	then.Forget()
	if got, err := show(then, &rules{mask: mask("/input/b")}); err != nil || !strings.Contains(got, `"erased":["/input/b"]`) {
		t.Errorf("by the rules of now: got %s, %v", got, err)
	}
	if got, err := show(then, nil); err != nil || !strings.HasPrefix(got, head+`"erased":["/input","/result"],`+tail) {
		t.Errorf("without rules: got %s, %v", got, err)
	}
	if _, err := show(decisionlog.NewRules(&rules{drop: true}), nil); !errors.Is(err, decisionlog.ErrWithheld) {
		t.Errorf("dropped: got %v", err)
	}
	if _, err := show(decisionlog.NewRules(&rules{err: errors.New("failed")}), nil); !errors.Is(err, decisionlog.ErrWithheld) {
		t.Errorf("failed: got %v", err)
	}
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	if err := logs.Show(ended, []*decisionlog.Memory{memory("t", "1", input)}, nil, time.Second, func(decisionlog.Shown, error) bool { return true }); !errors.Is(err, context.Canceled) {
		t.Errorf("caller is gone: got %v", err)
	}
}

// Any number of goroutines may have decisions remembered and look at them.
func TestRecentConcurrent(t *testing.T) {
	logs := remembering(5, 32<<10)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 500 {
				logs.Remember(memory(fmt.Sprint("t", (g+i)%40), fmt.Sprint(i), ast.String("input")))
				if i%50 == 0 {
					list, _ := logs.Recall("t1", func(*decisionlog.Memory) bool { return true })
					if err := logs.Show(context.Background(), list, nil, time.Second, func(s decisionlog.Shown, err error) bool {
						if err != nil || !strings.Contains(string(s.JSON), `"input":"input"`) {
							t.Errorf("got %s, %v", s.JSON, err)
						}
						return true
					}); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	for i := range 40 {
		if found, of := logs.Recall(fmt.Sprint("t", i), func(*decisionlog.Memory) bool { return true }); len(found) != of || of > 5 {
			t.Errorf("tenant %d: got %d of %d, limit 5", i, len(found), of)
		}
	}
}
