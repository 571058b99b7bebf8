package envoy.authz

# The bearer token is signed with a shared secret, names this audience, has not
# expired, and its scope has what the method needs.

default allow := false

allow if {
	[valid, _, claims] := io.jwt.decode_verify(token, {"secret": data.secret, "alg": "HS256", "aud": "orders", "time": now})
	valid
	needed[input.attributes.request.http.method] in split(claims.scope, " ")
}

token := substring(header, count("Bearer "), -1) if {
	header := input.attributes.request.http.headers.authorization
	startswith(header, "Bearer ")
}

now := input.attributes.request.time.seconds * 1000000000

needed := {"GET": "read", "POST": "write"}
