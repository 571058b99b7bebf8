package decisionlog_test

import (
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/gatehouse-authz/gatehouse/decisionlog"
	"github.com/gatehouse-authz/gatehouse/schedule"
)

// BenchmarkRecord is what a decision log costs on the request path, the event that
// it is given included.
func BenchmarkRecord(b *testing.B) {
	for _, bench := range []struct {
		name string
		size int64
	}{{"size=given", 9000}, {"size=walked", 0}} {
		b.Run(bench.name, func(b *testing.B) {
			logs := decisionlog.New(decisionlog.Config{Schedule: schedule.New(0)})
			set := never(decisionlog.Console{})
			set.Reporting.BufferBytes = 1 << 30
			set.Reporting.BufferEvents = 1000 // the oldest goes, as none is taken
			log := logs.Open(set)
			now := time.Now()
			b.ReportAllocs()
			for b.Loop() {
				e := &decisionlog.Event{
					DecisionID: "3b1a2f0c-1f8c-4c5c-9d2d-7f1c1f9e2a11", Path: "envoy/authz/allow", Timestamp: now, Bundles: bundles,
					Input: input, Result: result, ServerHandler: 1000, QueryEval: 500, Size: bench.size,
				}
				if err := log.Record(time.Time{}, e); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkDeliver is the whole way of an event, to a service that takes
// everything: CPU of all goroutines counts.
func BenchmarkDeliver(b *testing.B) {
	client := &http.Client{Transport: taker{}}
	sink := decisionlog.NewService(decisionlog.ServiceConfig{HTTP: decisionlog.HTTPConfig{URL: "http://taker", Client: client}})
	h := newHouse(b, decisionlog.Config{Redact: true, Workers: 1})
	set := soon(sink)
	set.OnFull, set.MaxWait = decisionlog.Wait, time.Minute
	set.Reporting.BufferBytes = 64 << 20
	log := h.Open(set)
	b.ReportAllocs()
	for b.Loop() {
		if err := log.Record(time.Time{}, event("3b1a2f0c-1f8c-4c5c-9d2d-7f1c1f9e2a11")); err != nil {
			b.Fatal(err)
		}
	}
	log.Flush()
	h.settled()
}

// taker is a service without a network.
type taker struct{}

func (taker) RoundTrip(r *http.Request) (*http.Response, error) {
	io.Copy(io.Discard, r.Body)
	return &http.Response{StatusCode: http.StatusOK, Body: http.NoBody, Request: r}, nil
}
