package httpserve

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/version"

	"github.com/gatehouse-authz/gatehouse/decisionlog"
)

// output is a JSON text that is being written.
type output struct{ buf []byte }

func newOutput() *output { return &output{make([]byte, 0, 512)} }

// begin opens an object or array, end closes it.
func (o *output) begin(c byte) { o.buf = append(o.buf, c) }
func (o *output) end(c byte)   { o.buf = append(o.buf, c) }

// name writes the name of the next member.
func (o *output) name(name string) {
	o.next()
	o.buf = append(appendString(o.buf, name), ':')
}

// next separates what follows from what is before it.
func (o *output) next() {
	if n := len(o.buf); n > 0 && o.buf[n-1] != '{' && o.buf[n-1] != '[' && o.buf[n-1] != '\n' {
		o.buf = append(o.buf, ',')
	}
}

func (o *output) string(name, value string) {
	o.name(name)
	o.buf = appendString(o.buf, value)
}

func (o *output) int(name string, value int64) {
	o.name(name)
	o.buf = strconv.AppendInt(o.buf, value, 10)
}

func (o *output) value(name string, v ast.Value) error {
	o.name(name)
	var err error
	o.buf, err = appendValue(o.buf, v)
	return err
}

// warning says that the API was not used as it is meant to be.
func (o *output) warning(message string) {
	o.name("warning")
	o.begin('{')
	o.string("code", "api_usage_warning")
	o.string("message", message)
	o.end('}')
}

// metrics writes how long things took: names and times in turn.
func (o *output) metrics(pairs ...any) {
	o.name("metrics")
	o.begin('{')
	for i := 0; i < len(pairs); i += 2 {
		o.int(pairs[i].(string), int64(pairs[i+1].(time.Duration)))
	}
	o.end('}')
}

// provenance says which OPA and which bundles have answered.
func (o *output) provenance(bundles []decisionlog.Bundle) {
	o.name("provenance")
	o.begin('{')
	o.string("version", version.Version)
	o.string("build_commit", version.Vcs)
	if version.Timestamp != "" { // clients read it as a time
		o.string("build_timestamp", version.Timestamp)
	}
	o.string("build_hostname", version.Hostname)
	o.name("bundles")
	o.begin('{')
	for _, b := range bundles {
		o.name(b.Name)
		o.begin('{')
		o.string("revision", b.Revision)
		o.end('}')
	}
	o.end('}')
	o.end('}')
}

// minGzip is the size from which on an answer is worth compressing, in bytes.
const minGzip = 1 << 10

// send sends the text as the answer.
func (o *output) send(w http.ResponseWriter, r *request, status int, pretty bool) error {
	if pretty {
		var b bytes.Buffer
		if err := json.Indent(&b, o.buf, "", "  "); err != nil {
			return err
		}
		o.buf = b.Bytes()
	}
	o.buf = append(o.buf, '\n')
	h := w.Header()
	h.Set("Content-Type", "application/json")
	if h.Get("Cache-Control") == "" {
		h.Set("Cache-Control", "no-store")
	}
	h.Add("Vary", "Accept-Encoding")
	if len(o.buf) >= minGzip && acceptsGzip(r.Request) {
		var b bytes.Buffer
		zw, _ := gzip.NewWriterLevel(&b, gzip.BestSpeed) // a level that there is
		if _, err := zw.Write(o.buf); err != nil {
			return err
		}
		if err := zw.Close(); err != nil {
			return err
		}
		o.buf = b.Bytes()
		h.Set("Content-Encoding", "gzip")
	}
	h.Set("Content-Length", strconv.Itoa(len(o.buf)))
	w.WriteHeader(status)
	_, _ = w.Write(o.buf) // the client is gone
	return nil
}

// acceptsGzip reports whether the client takes an answer in gzip.
func acceptsGzip(r *http.Request) bool {
	return accepts(r.Header.Values("Accept-Encoding"), "gzip")
}

// accepts reports whether one of the lists of what a client takes names it, and
// does not say that it has no weight (RFC 9110 section 12.4.2).
func accepts(lists []string, what string) bool {
	for _, list := range lists {
		for one := range strings.SplitSeq(list, ",") {
			name, params, _ := strings.Cut(one, ";")
			if !strings.EqualFold(strings.TrimSpace(name), what) {
				continue
			}
			q, ok := strings.CutPrefix(strings.ToLower(strings.ReplaceAll(params, " ", "")), "q=")
			if !ok {
				return true
			}
			weight, err := strconv.ParseFloat(q, 64)
			return err == nil && weight > 0
		}
	}
	return false
}
