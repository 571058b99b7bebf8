package stage

import (
	"bufio"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"
)

// Request is sent as it is: nothing is cleaned, sorted or merged.
type Request struct {
	Method  string   // default GET, or POST where there is a body
	Path    string   // with the query
	Host    string   // default "localhost"
	Headers []string // "name: value", in order
	Body    string
}

// Response is what came back for a Request.
type Response struct {
	Status int
	Header http.Header
	Body   string
	Seen   *Seen  // by the backend; nil if it was not reached
	Tag    string // of the request, for Echo.Hits
}

// Do sends a request on a connection of its own.
func Do(addr string, req Request) (*Response, error) {
	conn, err := net.DialTimeout("tcp", addr, 5*time.Second)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return nil, err
	}

	method := req.Method
	if method == "" {
		method = http.MethodGet
		if req.Body != "" {
			method = http.MethodPost
		}
	}
	host := req.Host
	if host == "" {
		host = "localhost"
	}
	out := &Response{Tag: rand.Text()}
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nhost: %s\r\n%s: %s\r\nconnection: close\r\n", method, req.Path, host, lower(TagHeader), out.Tag)
	for _, h := range req.Headers {
		b.WriteString(h + "\r\n")
	}
	isLength := func(h string) bool { return strings.HasPrefix(lower(h), "content-length:") }
	if req.Body != "" && !slices.ContainsFunc(req.Headers, isLength) {
		fmt.Fprintf(&b, "content-length: %d\r\n", len(req.Body))
	}
	b.WriteString("\r\n" + req.Body)
	// A server may answer and close before it has read a large body: then the
	// write fails, and there is an answer to read.
	written := make(chan error, 1)
	go func() {
		_, err := io.WriteString(conn, b.String())
		written <- err
	}()

	resp, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
	if err != nil {
		return nil, fmt.Errorf("%s %s: reading the response: %w", method, req.Path, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, fmt.Errorf("%s %s: reading the body: %w", method, req.Path, err)
	}
	out.Status, out.Header, out.Body = resp.StatusCode, resp.Header, string(body)
	var seen Seen
	if json.Unmarshal(body, &seen) == nil && seen.Headers != nil && slices.Contains(seen.Headers[lower(TagHeader)], out.Tag) {
		out.Seen = &seen
	}
	return out, nil
}

func lower(s string) string { return strings.ToLower(s) }
