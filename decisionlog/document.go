package decisionlog

import (
	"errors"
	"fmt"

	"github.com/open-policy-agent/opa/v1/ast"
)

// Document is the input of an event that is made only when a worker of the log
// needs it, and only as what it needs. Its methods may be called again and again,
// by any number of goroutines, for as long as the event is kept, and give the same
// each time. A panic of one drops the event.
type Document interface {
	// Value returns the whole document. An error drops the event.
	Value() (ast.Value, error)

	// Write writes the whole document, as Value has it, to w. It reports false
	// where it cannot: whatever it has written is taken back, and Value is asked.
	Write(w Writer) bool
}

// Writer takes a document in its parts, in the order in which they stand in JSON.
// The members of an object must come in the order of their keys, each key once:
// what is secret is hidden by what stands before it. Where they do not, the event
// is dropped.
type Writer struct{ e *encoder }

// Object begins an object, and EndObject ends it.
func (w Writer) Object() { w.e.open('{') }

// EndObject ends the object that was begun last.
func (w Writer) EndObject() { w.e.shut('}') }

// Array begins an array, and EndArray ends it.
func (w Writer) Array() { w.e.open('[') }

// EndArray ends the array that was begun last.
func (w Writer) EndArray() { w.e.shut(']') }

// Key begins a member of the object that is open. Its value comes next.
func (w Writer) Key(key string) {
	e := w.e
	if e.hide && e.skip == 0 {
		if f := &e.frames[len(e.frames)-1]; e.buf[len(e.buf)-1] != '{' && key <= f.key {
			e.fail(errDisorder)
		}
	}
	e.key(key)
}

// String writes a string. Bytes that are not UTF-8 become U+FFFD.
func (w Writer) String(s string) { w.e.str(s) }

// Int writes a whole number.
func (w Writer) Int(n int64) { w.e.int(n) }

// Number writes a number of JSON by its text.
func (w Writer) Number(text string) { w.e.number(text) }

// Bool writes true or false.
func (w Writer) Bool(b bool) { w.e.boolean(b) }

// Null writes null.
func (w Writer) Null() { w.e.null() }

// Value writes a value.
func (w Writer) Value(v ast.Value) { w.e.value(v) }

var (
	errDisorder = errors.New("members of a document are not in order")
	errOpen     = errors.New("document is not ended")
)

// document writes an input that has not been made.
func (e *encoder) document(d Document) {
	at, masked, err := len(e.buf), len(e.masked), e.err
	e.beginPart("input")
	begun := len(e.buf)
	if d.Write(Writer{e}) {
		if e.skip > 0 || e.hide && len(e.frames) != 1 || len(e.buf) == begun {
			e.fail(errOpen)
		}
		e.endPart()
		return
	}
	e.buf, e.masked, e.err = e.buf[:at], e.masked[:masked], err
	e.frames, e.guard, e.skip = e.frames[:0], openly, 0
	v, err := d.Value()
	if err != nil {
		e.fail(fmt.Errorf("input: %w", err))
		return
	}
	e.part("input", v)
}

// InputValue returns the whole input, which may have to be made first. It is nil
// where the event has none.
func (ev *Event) InputValue() (ast.Value, error) {
	if ev.Document == nil {
		return ev.Input, nil
	}
	return ev.Document.Value()
}
