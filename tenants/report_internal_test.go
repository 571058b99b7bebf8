package tenants

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/download"
	opametrics "github.com/open-policy-agent/opa/v1/metrics"
	"github.com/open-policy-agent/opa/v1/plugins"
	"github.com/open-policy-agent/opa/v1/plugins/bundle"
	logstatus "github.com/open-policy-agent/opa/v1/plugins/logs/status"
	opastatus "github.com/open-policy-agent/opa/v1/plugins/status"

	"github.com/gatehouse-authz/gatehouse/bundles"
	"github.com/gatehouse-authz/gatehouse/decisionlog"
)

// A message has the shape of OPA's, whatever is in it.
func TestMessageShape(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	_, compile := ast.CompileModules(map[string]string{"policy.rego": "package a\nallow if x"})
	_, parse := ast.ParseModule("policy.rego", "package a\nallow if {")
	if compile == nil || parse == nil {
		t.Fatal("a module has no error")
	}
	fetch := &bundles.StatusError{Code: 503}
	lost := &decisionlog.StatusError{Code: 413}
	for name, c := range map[string]struct {
		ours message
		opas opastatus.UpdateRequestV1
	}{
		"nothing": {message{Labels: map[string]string{}}, opastatus.UpdateRequestV1{Labels: map[string]string{}}},
		"well": {
			message{
				Labels: map[string]string{"app": "shop"},
				Bundles: map[string]*bundleReport{"main": {
					Name: "main", ActiveRevision: "r", LastSuccessfulActivation: at, Type: "snapshot", Size: 7,
					LastSuccessfulDownload: at, LastSuccessfulRequest: at, LastRequest: at, Metrics: object{"timer_bundle_request_ns": 9},
				}},
				Discovery: &bundleReport{Name: "discovery", Message: "overridden"},
				Logs:      logReportOf(decisionlog.Status{}),
				Plugins:   map[string]pluginReport{"bundle": {State: pluginOK}, "discovery": {State: pluginNotReady, Message: "why"}},
			},
			opastatus.UpdateRequestV1{
				Labels: map[string]string{"app": "shop"},
				Bundles: map[string]*bundle.Status{"main": {
					Name: "main", ActiveRevision: "r", LastSuccessfulActivation: at, Type: "snapshot", Size: 7,
					LastSuccessfulDownload: at, LastSuccessfulRequest: at, LastRequest: at, Metrics: measured{"timer_bundle_request_ns": 9},
				}},
				Discovery:    &bundle.Status{Name: "discovery", Message: "overridden"},
				DecisionLogs: &logstatus.Status{},
				Plugins:      map[string]*plugins.Status{"bundle": {State: plugins.StateOK}, "discovery": {State: plugins.StateNotReady, Message: "why"}},
			},
		},
		"compile error": {failsOurs(fmt.Errorf("bundle %q: %w", "main", compile)), failsOPA(compile)},
		"parse error":   {failsOurs(fmt.Errorf("bundle %q: %w", "main", parse)), failsOPA(parse)},
		"HTTP error":    {failsOurs(fmt.Errorf("fetching: %w", fetch)), failsOPA(download.HTTPError{StatusCode: 503})},
		"any error":     {failsOurs(errors.New("any")), failsOPA(errors.New("any"))},
		"log error": {
			message{Logs: logReportOf(decisionlog.Status{Code: "decision_log_error", Message: lost.Error(), HTTPCode: "413"})},
			opastatus.UpdateRequestV1{DecisionLogs: logError(logstatus.HTTPError{StatusCode: 413})},
		},
	} {
		got, err := json.Marshal(&c.ours)
		if err != nil {
			t.Fatal(err)
		}
		want, err := json.Marshal(&c.opas)
		if err != nil {
			t.Fatal(err)
		}
		if canonical(t, got) != canonical(t, want) {
			t.Errorf("%s:\ngot  %s\nwant %s", name, got, want)
		}
		if name == "parse error" && !strings.Contains(string(got), `"details"`) {
			t.Errorf("the place is missing: %s", got)
		}
	}
}

func failsOurs(err error) message {
	b := &bundleReport{Name: "main"}
	b.fail(err)
	return message{Bundles: map[string]*bundleReport{"main": b}}
}

func failsOPA(err error) opastatus.UpdateRequestV1 {
	b := &bundle.Status{Name: "main"}
	b.SetError(err)
	return opastatus.UpdateRequestV1{Bundles: map[string]*bundle.Status{"main": b}}
}

func logError(err error) *logstatus.Status {
	s := new(logstatus.Status)
	s.SetError(err)
	return s
}

// measured are metrics with these values.
type measured map[string]any

func (m measured) All() map[string]any                 { return m }
func (m measured) MarshalJSON() ([]byte, error)        { return json.Marshal(map[string]any(m)) }
func (measured) Info() opametrics.Info                 { return opametrics.Info{} }
func (measured) Timer(string) opametrics.Timer         { return nil }
func (measured) Histogram(string) opametrics.Histogram { return nil }
func (measured) Counter(string) opametrics.Counter     { return nil }
func (measured) Clear()                                {}

// canonical is a JSON text without what formatting makes of it.
func canonical(t *testing.T, text []byte) string {
	t.Helper()
	var v any
	if err := json.Unmarshal(text, &v); err != nil {
		t.Fatal(err)
	}
	out, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}
