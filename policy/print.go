package policy

import (
	"strings"
	"time"

	"github.com/open-policy-agent/opa/v1/topdown/print"
)

// Printed is a line that an evaluation printed.
type Printed struct {
	Print
	At time.Time
}

// Bounds of what an evaluation that is observed prints: what is over them is not
// kept.
const (
	maxPrinted      = 32       // lines
	maxPrintedBytes = 16 << 10 // of their texts, together
)

// printer keeps what an evaluation prints.
type printer struct {
	lines []Printed
	bytes int
}

// Print implements print.Hook.
func (p *printer) Print(c print.Context, text string) error {
	if left := maxPrintedBytes - p.bytes; len(text) > left {
		text = text[:left]
	}
	if text == "" || len(p.lines) == maxPrinted {
		return nil
	}
	p.bytes += len(text)
	line := Printed{Print{Text: strings.ToValidUTF8(text, "\ufffd")}, time.Now()}
	if c.Location != nil {
		line.File, line.Line = fileOf(c.Location), c.Location.Row
	}
	p.lines = append(p.lines, line)
	return nil
}
