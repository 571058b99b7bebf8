package decisionlog_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/decisionlog"
)

// document is a Document that counts what it is asked.
type document struct {
	value  ast.Value
	err    error
	write  func(decisionlog.Writer) bool // nil: it cannot
	values atomic.Int64
	writes atomic.Int64
}

func (d *document) Value() (ast.Value, error) {
	d.values.Add(1)
	return d.value, d.err
}

func (d *document) Write(w decisionlog.Writer) bool {
	d.writes.Add(1)
	return d.write != nil && d.write(w)
}

// documented is an event with a document for its input.
func documented(id string, d decisionlog.Document) *decisionlog.Event {
	e := event(id)
	e.Input, e.Document = nil, d
	return e
}

// inputs are the inputs that a service has got, by decision.
func inputs(t testing.TB, rec *recorder) map[string]any {
	t.Helper()
	rec.mu.Lock()
	defer rec.mu.Unlock()
	all := map[string]any{}
	for dec := json.NewDecoder(bytes.NewReader(rec.raw)); dec.More(); {
		var events []map[string]any
		if err := dec.Decode(&events); err != nil {
			t.Fatalf("%v: %s", err, rec.raw)
		}
		for _, e := range events {
			all[e["decision_id"].(string)] = e["input"]
		}
	}
	return all
}

// A document is written, where it can be, and else its value is; the rules of a
// policy see the value. What is no document drops its event, and no other.
func TestDocument(t *testing.T) {
	t.Parallel()
	rec := newRecorder(t)
	console := new(lockedBuffer)
	h := newHouse(t, decisionlog.Config{Redact: true, Console: console})
	log := h.Open(never(rec.service(), decisionlog.Console{}))

	object := ast.MustParseTerm(`{"a": 1, "headers": {"cookie": "CANARY"}}`).Value
	writes := func(w decisionlog.Writer) bool {
		w.Object()
		w.Key("a")
		w.Int(1)
		w.Key("headers")
		w.Object()
		w.Key("cookie")
		w.Array()
		w.String("CANARY")
		w.EndArray()
		w.EndObject()
		w.EndObject()
		return true
	}
	want := map[string]any{"a": 1., "headers": map[string]any{"cookie": decisionlog.Redacted}}
	mask := &filter{mask: func(_ context.Context, event ast.Value) (ast.Value, error) {
		if _, err := event.Find(ast.MustParseRef("x.input.headers.cookie")[1:]); err != nil {
			return nil, err
		}
		return ast.NewArray(ast.StringTerm("/input/a")), nil
	}}
	for _, c := range []struct {
		id             string
		document       *document
		filter         decisionlog.Filter
		want           any // nil: it is dropped
		values, writes int64
	}{
		{"written", &document{write: writes}, nil, want, 0, 2},
		{"as a value", &document{value: object}, nil, want, 2, 2},
		{"taken back", &document{value: object, write: func(w decisionlog.Writer) bool {
			w.Object()
			w.Key("cookie")
			w.Object()
			w.Key("x")
			w.Number("no number")
			return false
		}}, nil, want, 2, 2},
		{"masked", &document{value: object, write: writes}, mask, map[string]any{"headers": want["headers"]}, 1, 0},
		{"no value", &document{err: errors.New("no value")}, nil, nil, 2, 2},
		{"no value to mask", &document{err: errors.New("no value"), write: writes}, mask, nil, 1, 0},
		{"panics", &document{write: func(w decisionlog.Writer) bool { w.Object(); panic("CANARY") }}, nil, nil, 0, 1},
		{"not ended", &document{write: func(w decisionlog.Writer) bool { w.Array(); return true }}, nil, nil, 0, 2},
		{"empty", &document{write: func(decisionlog.Writer) bool { return true }}, nil, nil, 0, 2},
		{"out of order", &document{write: func(w decisionlog.Writer) bool {
			w.Object()
			w.Key("value")
			w.String("CANARY")
			w.Key("key")
			w.String("cookie")
			w.EndObject()
			return true
		}}, nil, nil, 0, 2},
		{"twice", &document{write: func(w decisionlog.Writer) bool {
			w.Object()
			w.Key("a")
			w.Null()
			w.Key("a")
			w.Bool(true)
			w.EndObject()
			return true
		}}, nil, nil, 0, 2},
		{"after all", &document{write: writes}, nil, want, 0, 2},
	} {
		e := documented(c.id, c.document)
		e.Filter = c.filter
		before := h.settled()
		if err := log.Record(time.Time{}, e.Copy()); err != nil {
			t.Fatal(err)
		}
		log.Flush()
		b := h.settled()
		if dropped := b.Dropped["encoding"] > before.Dropped["encoding"]; dropped != (c.want == nil) {
			t.Errorf("%s: dropped %t", c.id, dropped)
		}
		if values, writes := c.document.values.Load(), c.document.writes.Load(); values != c.values || writes != c.writes {
			t.Errorf("%s: asked for %d values and %d writes, want %d and %d", c.id, values, writes, c.values, c.writes)
		}
		if got := inputs(t, rec)[c.id]; !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: got %v, want %v", c.id, got, c.want)
		}
	}
	if strings.Contains(string(rec.raw)+console.String(), "CANARY") {
		t.Error("a secret was delivered")
	}
}
