# The team "storefront": everybody may look, merchandisers may change.
package envoy.authz

import data.session

default allow := {"allowed": false, "http_status": 405, "headers": {"allow": "GET, HEAD"}}

allow := {
	"allowed": true,
	"headers": {"x-segment": segment},
	"response_headers_to_add": {"x-frame-options": "DENY"},
} if looking

allow := {"allowed": true, "headers": {"x-user": session.user}} if {
	not looking
	may_change(session.user)
}

looking if input.attributes.request.http.method in {"GET", "HEAD"}

may_change(user) if "merchandiser" in data.users[user].roles

# The service shows what suits the visitor's language.
default segment := "world"

segment := "german" if startswith(input.attributes.request.http.headers["accept-language"], "de")
