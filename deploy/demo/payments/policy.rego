# The team "payments": nobody, unless a token says so. Without a valid token the
# answer is 401, with one that does not cover the request 403.
package envoy.authz

default allow := {
	"allowed": false,
	"http_status": 401,
	"headers": {"www-authenticate": `Bearer realm="payments"`, "content-type": "application/json"},
	"body": `{"error": "a valid token is needed"}`,
}

# A token is for this service, and has not expired.
claims := payload if {
	header := input.attributes.request.http.headers.authorization
	startswith(header, "Bearer ")
	[valid, _, payload] := io.jwt.decode_verify(
		substring(header, count("Bearer "), -1),
		{"secret": data.secret, "alg": "HS256", "aud": "payments"},
	)
	valid
}

# The identity goes to the service, the token does not.
allow := {
	"allowed": true,
	"headers": {"x-user": claims.sub},
	"request_headers_to_remove": ["authorization"],
	"dynamic_metadata": {"user": claims.sub},
} if permitted

allow := {
	"allowed": false,
	"http_status": 403,
	"headers": {"content-type": "application/json"},
	"body": json.marshal({"error": sprintf("%s may pay at most %d", [claims.sub, claims.limit])}),
} if {
	claims
	not permitted
}

permitted if {
	claims
	input.attributes.request.http.method == "GET"
}

permitted if {
	input.attributes.request.http.method == "POST"
	amount := input.parsed_body.amount
	is_number(amount)
	amount > 0
	amount <= claims.limit
}
