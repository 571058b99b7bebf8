# Who has logged in at the order desk. Its token is in a cookie of the page, or
# sent as a bearer token.
package session

user := claims.sub

claims := payload if {
	[valid, _, payload] := io.jwt.decode_verify(token, {
		"secret": data.secret,
		"alg": "HS256",
		"iss": "order-desk",
		"aud": "storefront",
	})
	valid
	payload.exp
}

headers := input.attributes.request.http.headers

# Two that differ are none.
token := value if {
	count(tokens) == 1
	some value in tokens
}

tokens contains substring(headers.authorization, count("Bearer "), -1) if {
	startswith(headers.authorization, "Bearer ")
}

tokens contains substring(part, count("__Host-session="), -1) if {
	some cookie in split(headers.cookie, ";")
	part := trim_space(cookie)
	startswith(part, "__Host-session=")
}
