# The rule that Envoy asks. Who asks stands in x-user, which the proxy sets when it
# has verified a token, and removes from what clients send.
package envoy.authz

default allow := {"allowed": false, "http_status": 403, "body": "orders: your roles do not cover this\n"}

# Nobody without a name.
allow := {"allowed": false, "http_status": 401, "headers": {"www-authenticate": "Bearer"}} if not user

allow := {
	"allowed": true,
	"headers": {"x-roles": concat(",", roles)},
	"request_headers_to_remove": ["x-debug"],
	"response_headers_to_add": {"cache-control": "private"},
	"dynamic_metadata": {"roles": roles},
} if may(user, input.attributes.request.http.method, input.parsed_path)

user := input.attributes.request.http.headers["x-user"]

roles := data.users[user].roles

# A role of the user covers the request.
may(who, method, path) if {
	some role in data.users[who].roles
	some grant in data.grants[role]
	grant.method == method
	glob.match(grant.path, ["/"], concat("/", path))
}

# An order has a limit, and a body that was cut off has no amount.
may(who, "POST", ["orders"]) if {
	not input.truncated_body
	input.parsed_body.amount <= data.users[who].limit
}
