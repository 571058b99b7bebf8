package faults

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

// logBuffer bounds the buffer of each tenant: so little that a sink that is away
// for seconds fills it.
const logBuffer = 256 << 10

// managed is a gatehouse whose bundles are on a shelf, and whose tenants send
// their events and status messages to a recorder behind a network that can be
// made ill.
type managed struct {
	*shelf
	recorder *stage.Recorder
	link     *stage.Link
	tenants  []string
	g        *stage.Gatehouse
	c        *client

	mu       sync.Mutex
	answered map[string]bool // :: decision ID → a policy decided; guarded by mu
}

func newManaged(t *testing.T) *managed {
	t.Helper()
	m := &managed{shelf: newShelf(t), tenants: []string{"orders", "payments", "storefront"}, answered: map[string]bool{}}
	var err error
	if m.recorder, err = stage.StartRecorder(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.recorder.Close)
	toxiproxy, err := stage.StartToxiproxy(tool(t, "toxiproxy"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(toxiproxy.Kill)
	if m.link, err = toxiproxy.Link("control", m.recorder.Addr()); err != nil {
		t.Fatal(err)
	}
	for _, tenant := range m.tenants {
		m.publish(tenant, 1)
	}
	return m
}

// decisionLogs is that part of an OPA configuration, with buffers of so many
// bytes.
func decisionLogs(buffer int) object {
	return object{
		"service": "control",
		"reporting": object{
			"min_delay_seconds": 1, "max_delay_seconds": 1,
			"buffer_size_limit_bytes": buffer, "upload_size_limit_bytes": logBuffer / 2,
		},
	}
}

func policyFrom(resource string) object {
	return object{"policy": object{
		"service": "bundles", "resource": resource,
		"polling": object{"min_delay_seconds": 1, "max_delay_seconds": 1},
	}}
}

// config returns a configuration with an OPA configuration that has the services
// bundles and control.
func (m *managed) config(t *testing.T, opa object, controlURL, drainTimeout string) string {
	t.Helper()
	opa = maps.Clone(opa)
	opa["services"] = object{
		"bundles": object{"url": m.URL},
		"control": object{"url": controlURL, "response_header_timeout_seconds": 1},
	}
	text, err := json.Marshal(opa)
	if err != nil {
		t.Fatal(err)
	}
	listen := strings.Replace(stage.Listen, "delay: 0s", "delay: 0s, timeout: "+drainTimeout, 1)
	return listen + "opa: " + string(text) + "\n"
}

// start starts the gatehouse, and waits until all tenants decide.
func (m *managed) start(t *testing.T, config string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "gatehouse.yaml")
	write(t, file, config)
	m.g = serveFileIn(t, []string{"GOGC=100"}, file) // so that its memory is what it keeps
	m.c = dial(t, m.g.GRPC)
	for _, tenant := range m.tenants {
		eventually(t, tenant+" decides", func() bool { return m.ask(tenant, 0).revision != "" })
	}
}

// ask asks, and keeps the ID of the decision.
func (m *managed) ask(tenant string, q int) answer {
	ctx, cancel := context.WithTimeout(context.Background(), checkTime)
	defer cancel()
	resp, err := m.c.Check(ctx, questions[q].check(tenant))
	a := answerOf(resp, err)
	if id := resp.GetDynamicMetadata().GetFields()["decision_id"].GetStringValue(); id != "" {
		m.mu.Lock()
		m.answered[id] = a.revision != ""
		m.mu.Unlock()
	}
	return a
}

// told returns how many answers there were with the ID of a decision, and how
// many of them a policy gave.
func (m *managed) told() (all, decided int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, d := range m.answered {
		if d {
			decided++
		}
	}
	return len(m.answered), decided
}

// arrived returns the IDs of the events that the recorder accepted, and how often
// it accepted them. Each must be that of a decision that a client was told.
func (m *managed) arrived(t *testing.T) map[string]int {
	t.Helper()
	events, err := m.recorder.Events("/logs")
	if err != nil {
		t.Fatal(err)
	}
	ids := map[string]int{}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, text := range events {
		var e struct {
			ID     string `json:"decision_id"`
			Labels struct{ Tenant string }
		}
		if err := json.Unmarshal(text, &e); err != nil {
			t.Fatal(err)
		}
		ids[e.ID]++
		if _, ok := m.answered[e.ID]; !ok || !slices.Contains(m.tenants, e.Labels.Tenant) {
			t.Errorf("an event of tenant %q has ID %q, which no client was told", e.Labels.Tenant, e.ID)
		}
	}
	return ids
}

// books are the metrics of decision logs, of all tenants and reasons.
type books struct {
	recorded, delivered, dropped, buffered float64
	bytes                                  float64 // that are buffered, where that is told
}

func (b books) balance() float64 { return b.recorded - b.delivered - b.dropped - b.buffered }

func (b books) String() string {
	return fmt.Sprintf("recorded %v, delivered %v, dropped %v, buffered %v (%v bytes)", b.recorded, b.delivered, b.dropped, b.buffered, b.bytes)
}

// booksOf reads the books from one scrape.
func booksOf(g *stage.Gatehouse) (b books, err error) {
	text, err := g.Get("/metrics")
	if err != nil {
		return b, err
	}
	for line := range strings.Lines(text) {
		series, number, ok := strings.Cut(strings.TrimSpace(line), " ")
		if !ok {
			continue
		}
		name, labels, _ := strings.Cut(series, "{")
		var to *float64
		switch {
		case name == "gatehouse_decision_log_buffered_events":
			to = &b.buffered
		case name == "gatehouse_decision_log_buffered_bytes":
			to = &b.bytes
		case name != "gatehouse_decision_log_events_total":
		case strings.Contains(labels, `state="recorded"`):
			to = &b.recorded
		case strings.Contains(labels, `state="delivered"`):
			to = &b.delivered
		case strings.Contains(labels, `state="dropped"`):
			to = &b.dropped
		}
		if to == nil {
			continue
		}
		value, err := strconv.ParseFloat(number, 64)
		if err != nil {
			return b, fmt.Errorf("%s: %w", series, err)
		}
		*to += value
	}
	return b, nil
}

// watchBooks scrapes until the returned function is called, which fails the test
// if the books did not balance in each scrape or more was buffered than may be,
// and returns how many scrapes there were.
func (m *managed) watchBooks(t *testing.T) (end func(t *testing.T) (scrapes int)) {
	t.Helper()
	done := make(chan struct{})
	var wrong []string
	scrapes := 0
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			b, err := booksOf(m.g)
			if err != nil {
				wrong = append(wrong, err.Error())
			} else if b.balance() != 0 || b.bytes > float64(len(m.tenants)*logBuffer) {
				wrong = append(wrong, b.String())
			}
			scrapes++
			select {
			case <-done:
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	})
	var once sync.Once
	stop := func() { once.Do(func() { close(done); wg.Wait() }) }
	t.Cleanup(stop)
	return func(t *testing.T) int {
		t.Helper()
		stop()
		if len(wrong) > 0 {
			t.Errorf("%d of %d scrapes do not balance or tell of too much; the first: %s", len(wrong), scrapes, strings.Join(wrong[:min(3, len(wrong))], "; "))
		}
		return scrapes
	}
}

// emptied waits until nothing is buffered, and checks that what was delivered is
// what arrived. Where the sink may have accepted what its answer did not tell,
// more may have arrived.
func (m *managed) emptied(t *testing.T, moreArrived bool) (b books, took time.Duration) {
	t.Helper()
	took = eventually(t, "nothing is buffered", func() bool {
		var err error
		b, err = booksOf(m.g)
		return err == nil && b.buffered == 0
	})
	if b.balance() != 0 {
		t.Errorf("at the end: %s", b)
	}
	// An answer that a tenant is not ready may be an event, or not.
	if all, decided := m.told(); b.recorded < float64(decided) || b.recorded > float64(all) {
		t.Errorf("recorded: got %v events, want %d, as many as there were decisions, or up to %d with other answers", b.recorded, decided, all)
	}
	ids := m.arrived(t)
	switch got := float64(len(ids)); {
	case got < b.delivered, got > b.delivered && !moreArrived:
		t.Errorf("delivered: got %v events, but %v arrived", b.delivered, got)
	}
	if !moreArrived {
		for id, n := range ids {
			if n != 1 {
				t.Errorf("event %s was accepted %d times, want once", id, n)
				break
			}
		}
	}
	return b, took
}

// The control plane is away under load: what was discovered goes on deciding,
// memory stays, and when it is back all is well again.
func TestControlPlaneDead(t *testing.T) {
	m := newManaged(t)
	for _, tenant := range m.tenants {
		discovered, err := json.Marshal(object{"discovery": object{
			"bundles":       policyFrom(tenant + ".tar.gz"),
			"decision_logs": decisionLogs(logBuffer),
			"status":        object{"service": "control"},
		}})
		if err != nil {
			t.Fatal(err)
		}
		m.recorder.Put("/discovery/"+tenant+".tar.gz", stage.Bundle(map[string]string{"data.json": string(discovered)}))
	}
	m.start(t, m.config(t, object{
		"discovery": object{
			"service": "control", "resource": "discovery/{{ .tenant }}.tar.gz", "decision": "discovery",
			"polling": object{"min_delay_seconds": 1, "max_delay_seconds": 1},
		},
		"status": object{"service": "control"},
	}, "http://"+m.link.Addr, "10s"))

	stop := asks(t, m.judge, 500, m.tenants, m.ask)
	time.Sleep(3 * time.Second)
	steady := stop(t)

	memory := watchMemory(t, m.g.Pid())
	balanced := m.watchBooks(t)
	stop = asks(t, m.judge, 500, m.tenants, m.ask)
	if err := m.link.Down(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(6 * time.Second)
	m.publish("orders", 2) // bundles are not of the control plane
	updated := m.c.becomes(t, "orders", 2, 5*time.Second)
	time.Sleep(4 * time.Second)
	before, peak := memory()
	m.recorder.Forget()
	if err := m.link.Up(); err != nil {
		t.Fatal(err)
	}
	back := eventually(t, "status messages and events come again", func() bool {
		return len(m.recorder.Requests("/status")) > 0 && len(m.recorder.Requests("/logs")) > 0
	})
	r := stop(t)
	scrapes := balanced(t)
	if r.failed+steady.failed > 0 {
		t.Errorf("faults: got %v, want none", r.faults)
	}
	if limit := before + before/10 + int64(len(m.tenants))*4*logBuffer + 8<<20; peak > limit {
		t.Errorf("memory rose from %s to %s", mib(before), mib(peak))
	}
	b, err := booksOf(m.g)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("PASS: %s; p99 before %s; an update meanwhile after %s; back after %s; %s, balanced in %d scrapes; memory %s, at most %s",
		r, steady.p99, updated, back, b, scrapes, mib(before), mib(peak))
}

// However ill the sink of decision logs is, no answer changes, what waits is
// bounded, and no event goes missing without being counted.
func TestLogSink(t *testing.T) {
	for _, fault := range []struct {
		name        string
		ill         stage.Fault
		down        bool // of the network
		moreArrived bool // the sink may accept what its answer does not tell
	}{
		{name: "refused", down: true},
		{name: "reset", ill: stage.Fault{Reset: true}},
		{name: "503", ill: stage.Fault{Status: 503}},
		{name: "429 with Retry-After", ill: stage.Fault{Status: 429, RetryAfter: "2"}},
		{name: "413", ill: stage.Fault{MaxBytes: 2000}},
		{name: "accepts, then hangs", ill: stage.Fault{Hang: true}},
		{name: "10 KB a second", ill: stage.Fault{BytesPerSecond: 10_000}, moreArrived: true},
		{name: "breaks off", ill: stage.Fault{Partial: true}},
	} {
		t.Run(fault.name, func(t *testing.T) {
			m := newManaged(t)
			m.start(t, m.config(t, object{"bundles": policyFrom("{{ .tenant }}.tar.gz"), "decision_logs": decisionLogs(logBuffer)}, "http://"+m.link.Addr, "10s"))
			m.emptied(t, false)

			memory := watchMemory(t, m.g.Pid())
			balanced := m.watchBooks(t)
			if fault.down {
				if err := m.link.Down(); err != nil {
					t.Fatal(err)
				}
			} else {
				m.recorder.Ail("/logs", fault.ill)
			}
			tried := m.recorder.Count("/logs")
			stop := asks(t, m.judge, 300, m.tenants, m.ask)
			time.Sleep(5 * time.Second)
			r := stop(t)
			tried = m.recorder.Count("/logs") - tried
			ill, err := booksOf(m.g)
			if err != nil {
				t.Fatal(err)
			}
			before, peak := memory()

			if fault.down {
				if err := m.link.Up(); err != nil {
					t.Fatal(err)
				}
			}
			m.recorder.Heal("/logs")
			b, took := m.emptied(t, fault.moreArrived)
			scrapes := balanced(t)
			if r.failed > 0 {
				t.Errorf("faults: got %v, want none", r.faults)
			}
			if limit := before + int64(len(m.tenants))*4*logBuffer + 32<<20; peak > limit {
				t.Errorf("memory rose from %s to %s", mib(before), mib(peak))
			}
			if fault.ill.RetryAfter != "" && tried > 3*2*len(m.tenants) {
				t.Errorf("%d uploads were tried in 5 s by %d tenants, who were told to wait 2 s", tried, len(m.tenants))
			}
			if b.delivered == 0 {
				t.Error("nothing was delivered")
			}
			t.Logf("PASS %s: %s; while ill: %s, %d uploads tried; empty %s after it is well: %s, balanced in %d scrapes; memory %s, at most %s",
				fault.name, r, ill, tried, took, b, scrapes, mib(before), mib(peak))
		})
	}
}

// The name of the log service does not resolve: events wait within their bounds,
// and are delivered when it does again.
func TestLogNames(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can give gatehouse a resolver of its own")
	}
	const resolver = "127.0.0.78"
	names := startNameServer(t, resolver+":53")
	m := newManaged(t)
	_, port, err := net.SplitHostPort(m.link.Addr)
	if err != nil {
		t.Fatal(err)
	}
	withResolver(t, resolver)
	m.start(t, m.config(t, object{
		"bundles": policyFrom("{{ .tenant }}.tar.gz"), "decision_logs": decisionLogs(logBuffer), "status": object{"service": "control"},
	}, "http://control.stage.test:"+port, "10s"))
	m.emptied(t, false)

	for _, mode := range []string{"unknown", "failing", "silent"} {
		t.Run(mode, func(t *testing.T) {
			begun, err := booksOf(m.g)
			if err != nil {
				t.Fatal(err)
			}
			balanced := m.watchBooks(t)
			stop := asks(t, m.judge, 200, m.tenants, m.ask)
			for range 2 { // it flaps
				names.mode.Store(mode)
				if err := errors.Join(m.link.Down(), m.link.Up()); err != nil { // so that a new connection is needed
					t.Fatal(err)
				}
				time.Sleep(1500 * time.Millisecond)
				names.mode.Store("well")
				time.Sleep(500 * time.Millisecond)
			}
			r := stop(t)
			b, took := m.emptied(t, true) // what was being answered when the network broke
			scrapes := balanced(t)
			if r.failed > 0 {
				t.Errorf("faults: got %v, want none", r.faults)
			}
			if b.delivered == begun.delivered {
				t.Error("nothing was delivered")
			}
			t.Logf("PASS %s: %s; empty %s after the name is back: %s, balanced in %d scrapes", mode, r, took, b, scrapes)
		})
	}
}

// withResolver has gatehouses that are started from now on in this test ask a
// resolver of their own: a mount namespace has another /etc/resolv.conf.
func withResolver(t *testing.T, addr string) {
	t.Helper()
	if built.err != nil {
		t.Fatal(built.err)
	}
	dir := t.TempDir()
	write(t, filepath.Join(dir, "resolv.conf"), "nameserver "+addr+"\noptions timeout:2 attempts:2\n")
	script := filepath.Join(dir, "gatehouse")
	write(t, script, fmt.Sprintf(`#!/bin/sh
export GODEBUG=netdns=go
exec unshare --mount sh -c 'mount --bind "$0" /etc/resolv.conf && exec "$@"' %s %s "$@"
`, filepath.Join(dir, "resolv.conf"), built.path))
	if err := os.Chmod(script, 0o700); err != nil {
		t.Fatal(err)
	}
	saved := built.path
	built.path = script
	t.Cleanup(func() { built.path = saved })
}

// SIGTERM under load: what is buffered is delivered before the deadline, and what
// cannot be is counted.
func TestStopWithLogs(t *testing.T) {
	const drain = 3 * time.Second
	for _, sink := range []struct {
		name string
		ill  stage.Fault
	}{
		{name: "well"},
		{name: "slow to answer", ill: stage.Fault{BytesPerSecond: 10_000}},
		{name: "hangs", ill: stage.Fault{Hang: true}},
	} {
		t.Run(sink.name, func(t *testing.T) {
			m := newManaged(t)
			m.start(t, m.config(t, object{"bundles": policyFrom("{{ .tenant }}.tar.gz"), "decision_logs": decisionLogs(8 << 20)}, "http://"+m.link.Addr, drain.String()))
			m.emptied(t, false)
			if sink.ill != (stage.Fault{}) {
				m.recorder.Ail("/logs", sink.ill)
			}
			stop := asks(t, m.judge, 200, m.tenants, m.ask)
			time.Sleep(1500 * time.Millisecond)
			last, err := booksOf(m.g)
			if err != nil {
				t.Fatal(err)
			}
			begun := time.Now()
			if err := m.g.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			code, err := m.g.Wait(drain + 2*time.Second)
			took := time.Since(begun).Round(10 * time.Millisecond)
			if err != nil || code != 0 {
				t.Errorf("exit: got %d, %v, want 0", code, err)
			}
			stop(t)
			_, told := m.told()
			arrived := len(m.arrived(t))
			lost := told - arrived
			if last.dropped > 0 {
				t.Errorf("dropped before the end: got %v, want none", last.dropped)
			}
			if sink.ill == (stage.Fault{}) && lost != 0 {
				t.Errorf("lost: got %d of %d events, want none", lost, told)
			}
			// A slow sink may have accepted what nobody heard of any more.
			if lost > 0 && sink.ill.Hang && !counted(m.g.Output(), lost) {
				t.Errorf("%d of %d events were lost, and the log does not say how many", lost, told)
			}
			t.Logf("PASS %s: ended %s after SIGTERM; %d decisions, %d events arrived, %d lost; before: %s", sink.name, took, told, arrived, max(0, lost), last)
		})
	}
}

// counted reports whether a line of a log after SIGTERM has a number that tells
// of lost events. The answers to some of them may not have reached a client.
func counted(log string, lost int) bool {
	const inFlight = 32
	for line := range strings.Lines(log) {
		var entry map[string]any
		if json.Unmarshal([]byte(line), &entry) != nil {
			continue
		}
		for name, value := range entry {
			n, ok := value.(float64)
			if ok && name != "time" && int(n) >= lost && int(n) <= lost+inFlight {
				return true
			}
		}
	}
	return false
}
