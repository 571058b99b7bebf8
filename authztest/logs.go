package authztest

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/gatehouse-authz/gatehouse/control"
	"github.com/gatehouse-authz/gatehouse/decisionlog"
	"github.com/gatehouse-authz/gatehouse/schedule"
)

// Console is a console on which decisions are logged.
type Console struct {
	mu    sync.Mutex
	lines [][]byte // guarded by mu
}

// Logs runs decision logs until the test ends; the logs of those tenants whose
// settings have Logged are on the console.
func Logs(t testing.TB) (*decisionlog.Logs, *Console) {
	t.Helper()
	return LogsWith(t, decisionlog.Config{})
}

// LogsWith is Logs with what a Config says beside.
func LogsWith(t testing.TB, cfg decisionlog.Config) (*decisionlog.Logs, *Console) {
	t.Helper()
	c := new(Console)
	work := schedule.New(1)
	cfg.Schedule, cfg.Console, cfg.Logger = work, c, slog.New(slog.DiscardHandler)
	logs := decisionlog.New(cfg)
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { work.Run(ctx) })
	running.Go(func() { logs.Run(ctx) })
	t.Cleanup(func() { stop(); running.Wait() })
	return logs, c
}

// Logged is the decision log of a tenant that logs to the console.
func Logged() *control.Log {
	return &control.Log{
		Settings: decisionlog.Settings{Sinks: []decisionlog.Sink{decisionlog.Console{}}},
		Drop:     "system/log/drop", Mask: "system/log/mask",
	}
}

// Write takes whole lines.
func (c *Console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for line := range bytes.Lines(p) {
		c.lines = append(c.lines, bytes.Clone(line))
	}
	return len(p), nil
}

// Lines returns the events, each as its JSON, once there are n, or what there is
// after 10 s.
func (c *Console) Lines(n int) [][]byte {
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		c.mu.Lock()
		lines := slices.Clone(c.lines)
		c.mu.Unlock()
		if len(lines) >= n || time.Now().After(end) {
			return lines
		}
	}
}

// Events is Lines, read.
func (c *Console) Events(n int) []map[string]any {
	var events []map[string]any
	for _, line := range c.Lines(n) {
		var event map[string]any
		must(json.Unmarshal(line, &event))
		events = append(events, event)
	}
	return events
}
