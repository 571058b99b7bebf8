package decisionlog

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"
)

// Exporter sends decisions as log records of OpenTelemetry.
type Exporter interface {
	// Export sends records, once. rejected is how many of them were refused for
	// good although the others were taken. It returns soon after ctx ends. The
	// error, after which all may be sent again, may wrap a *StatusError.
	Export(ctx context.Context, records []Record) (rejected int, err error)
}

// Record is one decision as a log record. Fields that are empty are absent.
type Record struct {
	Time            time.Time
	DecisionID      string
	BatchDecisionID string
	TraceID, SpanID string // in hexadecimal
	Tenant          string
	Outcome         string
	Path            string
	Bundles         []Bundle // by name
	Body            []byte   // the event, as a Service has it
}

// Records sends each event to Config.Exporter.
type Records struct{}

var _ Sink = Records{}

// Identity implements Sink.
func (Records) Identity() string { return identity(kindRecords) }

func (Records) kind() kind { return kindRecords }

func (Records) lane() string { return "decisionlog otlp" }

// rejectedError says that a sink has taken a chunk but for some of its events,
// which it will never take.
type rejectedError struct{ events int }

func (e *rejectedError) Error() string {
	return fmt.Sprintf("the collector refused %d of the events", e.events)
}

func (Records) deliver(ctx context.Context, s *shared, c *chunk) error {
	if s.exporter == nil {
		return errors.New("there is no collector")
	}
	text, err := expand(kindRecords, c.body)
	if err != nil {
		return err
	}
	records := make([]Record, len(c.lens))
	for i, n := range c.lens {
		if records[i], err = recordOf(text[:n-1]); err != nil {
			return fmt.Errorf("reading a chunk again: %w", err)
		}
		text = text[n:]
	}
	rejected, err := s.exporter.Export(ctx, records)
	if err == nil && rejected > 0 {
		return &rejectedError{min(rejected, len(records))}
	}
	return err
}

// appendRecord appends what gathers for Records: the outcome, which an event has
// not, a space and the event.
func appendRecord(buf []byte, outcome string, event []byte) []byte {
	return append(append(append(buf, outcome...), ' '), event...)
}

// recordOf reads what appendRecord has appended.
func recordOf(text []byte) (Record, error) {
	outcome, body, _ := bytes.Cut(text, []byte{' '})
	var event struct {
		DecisionID      string    `json:"decision_id"`
		BatchDecisionID string    `json:"batch_decision_id"`
		TraceID         string    `json:"trace_id"`
		SpanID          string    `json:"span_id"`
		Path            string    `json:"path"`
		Timestamp       time.Time `json:"timestamp"`
		Labels          struct {
			Tenant string `json:"tenant"`
		} `json:"labels"`
		Bundles bundlesInOrder `json:"bundles"`
	}
	if err := json.Unmarshal(body, &event); err != nil {
		return Record{}, err
	}
	return Record{
		Time: event.Timestamp, DecisionID: event.DecisionID, BatchDecisionID: event.BatchDecisionID,
		TraceID: event.TraceID, SpanID: event.SpanID, Tenant: event.Labels.Tenant, Outcome: string(outcome),
		Path: event.Path, Bundles: event.Bundles, Body: body,
	}, nil
}

// bundlesInOrder are the bundles of an event, by name.
type bundlesInOrder []Bundle

// UnmarshalJSON reads what constants.of has written.
func (b *bundlesInOrder) UnmarshalJSON(text []byte) error {
	var byName map[string]struct {
		Revision string `json:"revision"`
	}
	if err := json.Unmarshal(text, &byName); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		*b = append(*b, Bundle{name, byName[name].Revision})
	}
	return nil
}
