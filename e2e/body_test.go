package e2e

import (
	"strings"
	"testing"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

// A policy reads the body that Envoy sends along.
func TestBody(t *testing.T) {
	ten := tenants{
		"owner": `default allow := false
			allow if input.parsed_body.owner == "alice"`,
		"truncated": `allow := {"allowed": true, "headers": {
			"x-truncated": json.marshal(input.truncated_body),
			"x-parsed": json.marshal(input.parsed_body),
		}}`,
		"bytes": `allow := {"allowed": true, "headers": {
			"x-raw": input.attributes.request.http.rawBody,
			"x-parsed": json.marshal(input.parsed_body),
		}}`,
		"yes":  `default allow := true`,
		"tiny": `default allow := true`,
	}
	g, _ := startGatehouse(t, `overrides: {tiny: {limits: {body_bytes: 100}}}`, ten)
	whole := object{"max_request_bytes": 4096}
	eachEnvoy(t, func(t *testing.T, envoy string) {
		n := startEnvoy(t, envoy, g.GRPC, options{},
			listener{Name: "whole", Timeout: slack, Routes: byTenant(ten), Filter: object{"with_request_body": whole}},
			listener{Name: "partial", Timeout: slack, Routes: byTenant(ten), Filter: object{
				"with_request_body": object{"max_request_bytes": 16, "allow_partial_message": true},
			}},
			listener{Name: "bytes", Timeout: slack, Routes: byTenant(ten), Filter: object{
				"with_request_body": object{"max_request_bytes": 4096, "pack_as_bytes": true},
			}},
		)
		post := func(listener, path, body string, headers ...string) *stage.Response {
			t.Helper()
			return n.do(t, listener, stage.Request{Path: path, Body: body, Headers: append(headers, "content-type: application/json")})
		}

		t.Run("JSON", func(t *testing.T) {
			body := `{"owner": "alice"}`
			seen := n.allowed(t, post("whole", "/owner/a", body))
			equal(t, "body at the backend", seen.Body, body)
			n.denied(t, post("whole", "/owner/a", `{"owner": "mallory"}`), 403)
		})
		t.Run("truncated", func(t *testing.T) {
			body := `{"owner": "alice", "padding": "` + strings.Repeat("x", 100) + `"}`
			seen := n.allowed(t, post("partial", "/truncated/a", body))
			equal(t, "truncated_body", seen.Headers["x-truncated"], []string{"true"})
			equal(t, "parsed_body", seen.Headers["x-parsed"], []string{"null"})
			equal(t, "body at the backend", seen.Body, body)
			n.denied(t, post("partial", "/owner/a", body), 403)

			seen = n.allowed(t, post("partial", "/truncated/a", `{"a":1}`))
			equal(t, "truncated_body", seen.Headers["x-truncated"], []string{"false"})
			equal(t, "parsed_body", seen.Headers["x-parsed"], []string{`{"a":1}`})
		})
		t.Run("bytes", func(t *testing.T) {
			seen := n.allowed(t, post("bytes", "/bytes/a", `{"a":"b"}`))
			equal(t, "rawBody", seen.Headers["x-raw"], []string{"eyJhIjoiYiJ9"})
			equal(t, "parsed_body", seen.Headers["x-parsed"], []string{`{"a":"b"}`})

			seen = n.allowed(t, n.do(t, "bytes", stage.Request{Path: "/bytes/a", Body: "\xff\x00\xfe", Headers: []string{"content-type: text/plain"}}))
			equal(t, "rawBody", seen.Headers["x-raw"], []string{"/wD+"})
			equal(t, "body at the backend in bytes", seen.Bytes, 3)
		})
		t.Run("larger than the limit of the tenant", func(t *testing.T) {
			n.denied(t, post("whole", "/tiny/a", `"`+strings.Repeat("x", 99)+`"`), 413)
			n.allowed(t, post("whole", "/tiny/a", `"`+strings.Repeat("x", 98)+`"`))
		})
		t.Run("larger than Envoy buffers", func(t *testing.T) {
			n.denied(t, post("whole", "/yes/a", `"`+strings.Repeat("x", 5000)+`"`), 413)
		})
	})
}

// With encode_raw_headers Envoy sends a header map in place of headers.
func TestRawHeaders(t *testing.T) {
	ten := tenants{"raw": `allow := {"allowed": true, "headers": {
		"x-saw": input.attributes.request.http.headers["x-sent"],
		"x-method": input.attributes.request.http.headers[":method"],
		"x-parsed": json.marshal(input.parsed_body),
	}}`}
	g, _ := startGatehouse(t, "", ten)
	eachEnvoy(t, func(t *testing.T, envoy string) {
		n := startEnvoy(t, envoy, g.GRPC, options{}, listener{Name: "main", Timeout: slack, Routes: byTenant(ten), Filter: object{
			"encode_raw_headers": true,
			"with_request_body":  object{"max_request_bytes": 4096},
		}})
		seen := n.allowed(t, n.do(t, "main", stage.Request{
			Path: "/raw/a", Body: `{"a": [1]}`, Headers: []string{"Content-Type: application/json", "X-Sent: one", "x-sent: two"},
		}))
		equal(t, "header", seen.Headers["x-saw"], []string{"one,two"})
		equal(t, "method", seen.Headers["x-method"], []string{"POST"})
		equal(t, "parsed_body", seen.Headers["x-parsed"], []string{`{"a":[1]}`})
	})
}
