package httpserve

import (
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// entryOf returns the entry point that the rest of a path names: its segments,
// each unescaped by itself. A path whose segments are not the names of rules, one
// below the other, names none: nothing of it is ever read as more than a name.
func entryOf(rest string) (entry string, ok bool) {
	if rest == "" {
		return "", false
	}
	segments := strings.Split(rest, "/")
	for i, s := range segments {
		s, err := url.PathUnescape(s)
		if err != nil || s == "" || strings.ContainsAny(s, "/\x00") {
			return "", false
		}
		segments[i] = s
	}
	return strings.Join(segments, "/"), true
}

// options are OPA's parameters of a query.
type options struct {
	query                       url.Values
	pretty, provenance, metrics bool
}

// optionsOf reads the parameters. One that would change what is answered, and
// that we do not have, is refused.
func optionsOf(r *request) (*options, error) {
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, invalidf("the query of the URL cannot be parsed")
	}
	is := func(name string) bool {
		for _, v := range query[name] {
			if v == "" || v == "true" {
				return true
			}
		}
		return false
	}
	if is("strict-builtin-errors") {
		return nil, invalidf("strict-builtin-errors is not supported")
	}
	for _, mode := range query["explain"] {
		if mode != "off" {
			return nil, invalidf("explain is not supported")
		}
	}
	return &options{query: query, pretty: is("pretty"), provenance: is("provenance"), metrics: is("metrics") || is("instrument")}, nil
}

// maxTimeout is the longest time that a client may ask for.
const maxTimeout = answerTime

// timeoutOf returns the time that a client leaves for its answer, in the header
// X-Request-Timeout: a number of seconds, or with a unit like 250ms. Zero: it does
// not say, or something else.
func timeoutOf(h http.Header) time.Duration {
	text := h.Get("X-Request-Timeout")
	if text == "" {
		return 0
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		seconds, err := strconv.ParseFloat(text, 64)
		if err != nil || seconds > maxTimeout.Seconds() {
			return 0
		}
		d = time.Duration(seconds * float64(time.Second))
	}
	if d <= 0 || d > maxTimeout {
		return 0
	}
	return d
}
