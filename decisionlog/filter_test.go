package decisionlog_test

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/decisionlog"
)

// filter is a Filter made of two functions; nil: undefined.
type filter struct {
	drop func(context.Context, ast.Value) (bool, error)
	mask func(context.Context, ast.Value) (ast.Value, error)
	asks atomic.Int64
}

func (f *filter) Drop(ctx context.Context, event ast.Value) (bool, error) {
	f.asks.Add(1)
	if f.drop == nil {
		return false, nil
	}
	return f.drop(ctx, event)
}

func (f *filter) Mask(ctx context.Context, event ast.Value) (ast.Value, error) {
	if f.mask == nil {
		return nil, nil
	}
	return f.mask(ctx, event)
}

func filtered(f decisionlog.Filter, id string) *decisionlog.Event {
	e := event(id)
	e.Filter = f
	return e
}

func TestFilter(t *testing.T) {
	t.Parallel()
	rec := newRecorder(t)
	h := newHouse(t, decisionlog.Config{})
	log := h.Open(soon(rec.service()))
	f := &filter{
		drop: func(_ context.Context, event ast.Value) (bool, error) {
			id, err := event.Find(ast.Ref{ast.StringTerm("decision_id")})
			return err == nil && id.Compare(ast.String("dropped")) == 0, err
		},
		mask: func(_ context.Context, event ast.Value) (ast.Value, error) {
			return ast.MustParseTerm(`{"/input/attributes/request/http/headers/authorization", {"op": "upsert", "path": "/result/allowed", "value": "hidden"}}`).Value, nil
		},
	}
	log.Record(time.Time{}, filtered(f, "dropped"))
	log.Record(time.Time{}, filtered(f, "kept"))
	if b := h.settled(); b.Delivered != 1 || b.Dropped["policy"] != 1 {
		t.Errorf("got %+v", b)
	}
	got := string(rec.raw)
	for _, want := range []string{
		`"erased":["/input/attributes/request/http/headers/authorization"]`, `"masked":["/result/allowed"]`, `"allowed":"hidden"`, `"cookie":"session=CANARY"`,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("%s is missing in %s", want, got)
		}
	}
	if strings.Contains(got, "Bearer") {
		t.Error("what was erased is there")
	}
}

// Filters that fail, in each way: the event is not logged.
func TestFilterFails(t *testing.T) {
	t.Parallel()
	rec := newRecorder(t)
	h := newHouse(t, decisionlog.Config{})
	set := soon(rec.service())
	set.FilterTime = 10 * time.Millisecond
	for name, f := range map[string]*filter{
		"drop":    {drop: func(context.Context, ast.Value) (bool, error) { return false, errors.New("bad") }},
		"mask":    {mask: func(context.Context, ast.Value) (ast.Value, error) { return nil, errors.New("bad") }},
		"no mask": {mask: func(context.Context, ast.Value) (ast.Value, error) { return ast.String("x"), nil }},
		"panic":   {drop: func(context.Context, ast.Value) (bool, error) { panic("bad") }},
		"late":    {drop: func(ctx context.Context, _ ast.Value) (bool, error) { <-ctx.Done(); return false, ctx.Err() }},
	} {
		log := h.Open(set)
		log.Record(time.Time{}, filtered(f, "bad"))
		record(t, log, name, 3)
		await(t, "nothing is buffered", func() bool { return log.Status().Buffered == 0 })
		if s := log.Status(); s.Dropped["filter_error"] != 1 || s.Delivered != 3 {
			t.Errorf("%s: got %+v", name, s)
		}
	}
}

// A filter that does not even end when it is told to holds up nobody else, and is
// asked once.
func TestStuckFilter(t *testing.T) {
	t.Parallel()
	rec := newRecorder(t)
	h := newHouse(t, decisionlog.Config{Workers: 1})
	set := soon(rec.service())
	set.FilterTime = 10 * time.Millisecond
	hang := make(chan struct{})
	stuck := &filter{drop: func(context.Context, ast.Value) (bool, error) { <-hang; return false, nil }}
	evil, fine := h.Open(set), h.Open(set)
	for range 100 {
		evil.Record(time.Time{}, filtered(stuck, "evil"))
	}
	good := &filter{}
	for range 100 {
		fine.Record(time.Time{}, filtered(good, "fine"))
	}
	if b := h.settled(); b.Delivered != 100 || b.Dropped["filter_error"] != 100 {
		t.Errorf("got %+v", b)
	}
	if got := stuck.asks.Load(); got != 1 {
		t.Errorf("was asked %d times, want once", got)
	}
	close(hang)
	await(t, "it is asked again", func() bool {
		evil.Record(time.Time{}, filtered(stuck, "again"))
		return evil.Status().Delivered > 0
	})
}

// A filter that always fails is asked less and less; another one is asked at once.
func TestFailingFilter(t *testing.T) {
	t.Parallel()
	rec := newRecorder(t)
	h := newHouse(t, decisionlog.Config{Workers: 1})
	set := soon(rec.service())
	set.FilterTime = 5 * time.Millisecond
	bad := &filter{drop: func(ctx context.Context, _ ast.Value) (bool, error) { <-ctx.Done(); return false, ctx.Err() }}
	log := h.Open(set)
	begun := time.Now()
	for range 300 {
		log.Record(time.Time{}, filtered(bad, "bad"))
	}
	log.Record(time.Time{}, filtered(&filter{}, "good"))
	b := h.settled()
	if took := time.Since(begun); took > 3*time.Second {
		t.Errorf("took %v", took)
	}
	if b.Delivered != 1 || b.Dropped["filter_error"] != 300 || bad.asks.Load() > 100 {
		t.Errorf("asked %d times, got %+v", bad.asks.Load(), b)
	}
}
