package telemetry

import (
	"log/slog"
	"strings"
	"sync"
	"time"

	"go.opentelemetry.io/otel"
)

// errorLog logs errors of the SDK, few of them: a collector that is away gives one
// for each batch.
type errorLog struct {
	log     *slog.Logger
	secrets *strings.Replacer

	mu     sync.Mutex
	next   time.Time // not before then; guarded by mu
	hidden int       // errors since the last that was logged; guarded by mu
}

var _ otel.ErrorHandler = (*errorLog)(nil)

const (
	errorInterval = 10 * time.Second
	maxErrorText  = 300 // bytes
)

func newErrorLog(log *slog.Logger, secrets []string) *errorLog {
	var pairs []string
	for _, s := range secrets {
		pairs = append(pairs, s, "***")
	}
	return &errorLog{log: log, secrets: strings.NewReplacer(pairs...)}
}

// Handle implements otel.ErrorHandler.
func (e *errorLog) Handle(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := time.Now()
	if now.Before(e.next) {
		e.hidden++
		return
	}
	e.next = now.Add(errorInterval)
	text := e.secrets.Replace(err.Error()) // a collector may quote what it was sent
	e.log.Warn("telemetry not sent", "error", strings.ToValidUTF8(text[:min(len(text), maxErrorText)], ""), "more", e.hidden)
	e.hidden = 0
}
