# The team "storefront": everybody may look, nobody may change.
package envoy.authz

default allow := {"allowed": false, "http_status": 405, "headers": {"allow": "GET, HEAD"}}

allow := {
	"allowed": true,
	"headers": {"x-segment": segment},
	"response_headers_to_add": {"x-frame-options": "DENY"},
} if input.attributes.request.http.method in {"GET", "HEAD"}

# The service shows what suits the visitor's language.
default segment := "world"

segment := "german" if startswith(input.attributes.request.http.headers["accept-language"], "de")
