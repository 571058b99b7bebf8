package decisionlog

import (
	"errors"
	"strconv"
)

// Status is how a log is doing. Code, Message and HTTPCode are those of the
// decision log's status of OPA.
type Status struct {
	Books
	BufferedBytes int64 // by estimate

	// Code is decision_log_error while a sink does not take what it is sent,
	// Message the last error, HTTPCode the status that it was, if it was one.
	// They are empty once the sink has taken something.
	Code     string
	Message  string
	HTTPCode string
}

// Status returns how the log is doing.
func (l *Log) Status() Status {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := Status{Books: l.books.export(), BufferedBytes: l.bytes}
	for _, o := range l.outlets {
		if o.err == nil {
			continue
		}
		s.Code, s.Message = "decision_log_error", o.err.Error()
		if status, ok := errors.AsType[*StatusError](o.err); ok {
			s.HTTPCode = strconv.Itoa(status.Code)
		}
		break
	}
	return s
}
