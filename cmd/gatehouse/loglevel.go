package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"sync"
	"time"
)

// maxLevelFor bounds for how long a level that was asked for holds, before the
// one that is configured does again.
const maxLevelFor = 24 * time.Hour

// logLevel is the level from which on the server logs: one that is configured, and
// one that an operator has asked for, which holds before it.
type logLevel struct {
	slog.LevelVar

	mu         sync.Mutex
	fixed      bool        // the command line or the environment says it, whatever the file does
	configured slog.Level  // guarded by mu
	asked      bool        // guarded by mu
	until      time.Time   // when that ends; zero: it does not; guarded by mu
	back       *time.Timer // ends it; guarded by mu
}

// parseLevel reads a level.
func parseLevel(text string) (slog.Level, error) {
	switch text {
	case "debug":
		return slog.LevelDebug, nil
	case "info":
		return slog.LevelInfo, nil
	case "warn":
		return slog.LevelWarn, nil
	case "error":
		return slog.LevelError, nil
	}
	return 0, fmt.Errorf("log level %q is not debug, info, warn or error", text)
}

// levelName is what parseLevel reads.
func levelName(l slog.Level) string {
	switch l {
	case slog.LevelDebug:
		return "debug"
	case slog.LevelWarn:
		return "warn"
	case slog.LevelError:
		return "error"
	}
	return "info"
}

// configure sets the level that the file says, unless the command line or the
// environment says another. One that was asked for holds on.
func (l *logLevel) configure(level slog.Level) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fixed {
		return
	}
	l.configured = level
	if !l.asked {
		l.Set(level)
	}
}

// ask sets a level: for a while, or, where that is zero, until another is asked
// for or the process ends.
func (l *logLevel) ask(level slog.Level, while time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.end()
	l.asked = true
	l.Set(level)
	if while > 0 {
		until := time.Now().Add(while)
		l.until = until
		l.back = time.AfterFunc(while, func() {
			l.mu.Lock()
			defer l.mu.Unlock()
			if l.until.Equal(until) { // and no other was asked for meanwhile
				l.end()
			}
		})
	}
}

// stop ends what was asked for.
func (l *logLevel) stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.end()
}

// end ends what was asked for. l.mu is held.
func (l *logLevel) end() {
	if l.back != nil {
		l.back.Stop()
	}
	l.back, l.until, l.asked = nil, time.Time{}, false
	l.Set(l.configured)
}

// levelStatus is what GET /log says.
type levelStatus struct {
	Level      string     `json:"level"`      // in force
	Configured string     `json:"configured"` // what holds when none is asked for
	Until      *time.Time `json:"until,omitempty"`
}

func (l *logLevel) status() levelStatus {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := levelStatus{Level: levelName(l.Level()), Configured: levelName(l.configured)}
	if !l.until.IsZero() {
		until := l.until.UTC()
		s.Until = &until
	}
	return s
}

// handle serves
//
//	GET /log                           from which level on the server logs
//	PUT /log?level=debug[&for=10m]     another level; with for, for so long
//	DELETE /log                        the one that is configured
func (l *logLevel) handle(mux *http.ServeMux, log *slog.Logger) {
	mux.HandleFunc("GET /log", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, http.StatusOK, l.status()) })
	mux.HandleFunc("DELETE /log", func(w http.ResponseWriter, _ *http.Request) {
		l.stop()
		writeJSON(w, http.StatusOK, l.status())
	})
	mux.HandleFunc("PUT /log", func(w http.ResponseWriter, r *http.Request) {
		level, while, err := levelAsked(r)
		if err != nil {
			writeFault(w, http.StatusBadRequest, err)
			return
		}
		l.ask(level, while)
		// Whatever the level, this is said.
		log.Log(context.Background(), max(level, slog.LevelInfo), "log level changed", "level", levelName(level), "for", while.String())
		writeJSON(w, http.StatusOK, l.status())
	})
}

// levelAsked reads what PUT /log asks for.
func levelAsked(r *http.Request) (level slog.Level, while time.Duration, err error) {
	values := r.URL.Query()
	for name := range values {
		if name != "level" && name != "for" {
			return 0, 0, fmt.Errorf("parameter %q is not level or for", name)
		}
	}
	if level, err = parseLevel(values.Get("level")); err != nil {
		return 0, 0, err
	}
	if text := values.Get("for"); text != "" {
		if while, err = time.ParseDuration(text); err != nil || while <= 0 || while > maxLevelFor {
			return 0, 0, fmt.Errorf("for %q is not a time like 10m, of at most %s", text, maxLevelFor)
		}
	}
	return level, while, nil
}

// newLogger returns a logger of this format, json or text.
func newLogger(w io.Writer, format string, level slog.Leveler) (*slog.Logger, error) {
	switch options := (&slog.HandlerOptions{Level: level}); format {
	case "json":
		return slog.New(slog.NewJSONHandler(w, options)), nil
	case "text":
		return slog.New(slog.NewTextHandler(w, options)), nil
	}
	return nil, errors.New("is not json or text")
}
