package storefront_test

import data.envoy.authz

cookie_of(user) := sprintf("__Host-session=%s", [io.jwt.encode_sign(
	{"alg": "HS256", "typ": "JWT"},
	{"iss": "order-desk", "aud": ["orders", "storefront"], "sub": user, "exp": 4102444800},
	{"kty": "oct", "k": base64url.encode_no_pad(data.secret)},
)])

answer(method, headers) := decision if {
	decision := authz.allow with input as {"attributes": {"request": {"http": {"method": method, "headers": headers}}}}
}

test_everybody_looks if {
	answer("GET", {}).allowed
	answer("GET", {"accept-language": "de-AT"}).headers["x-segment"] == "german"
	answer("HEAD", {"cookie": cookie_of("carol")}).allowed
}

test_merchandisers_change if {
	answer("PUT", {"cookie": cookie_of("carol")}) == {"allowed": true, "headers": {"x-user": "carol"}}
	not answer("PUT", {"cookie": cookie_of("alice")}).allowed
	answer("DELETE", {}).http_status == 405
}
