package decisionlog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
)

// Console writes each event as a line of JSON to Config.Console, as OPA's console
// logger does: the event's members, with the error as a string, among level, msg,
// time and type. Lines are whole, and those of all tenants do not mix.
type Console struct{}

var _ Sink = Console{}

// Identity implements Sink.
func (Console) Identity() string { return identity(kindConsole) }

func (Console) kind() kind { return kindConsole }

func (Console) lane() string { return "decisionlog console" }

func (Console) deliver(ctx context.Context, s *shared, c *chunk) error {
	if s.console == nil {
		return errors.New("there is no console")
	}
	unlock, err := s.lock(ctx, "")
	if err != nil {
		return err
	}
	defer unlock()
	rest := c.body[c.done:]
	if s.torn {
		rest = append([]byte{'\n'}, rest...)
	}
	n, err := s.console.Write(rest)
	if s.torn && n > 0 {
		s.torn, n = false, n-1
	}
	end := c.done + n
	whole := c.done + bytes.LastIndexByte(c.body[c.done:end], '\n') + 1
	s.torn = s.torn || whole < end
	if whole < end && c.body[end] == '\n' {
		whole = end + 1 // only the line's end is missing, which is written before what comes next
	}
	c.done = whole
	if err != nil {
		return fmt.Errorf("writing to the console: %w", err)
	}
	return nil
}
