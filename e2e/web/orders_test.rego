package orders_test

import data.envoy.authz
import data.permissions

token(user, more) := io.jwt.encode_sign(
	{"alg": "HS256", "typ": "JWT"},
	object.union({"iss": "order-desk", "aud": ["orders", "storefront"], "sub": user, "exp": 4102444800}, more),
	{"kty": "oct", "k": base64url.encode_no_pad(data.secret)},
)

cookie_of(user) := sprintf("a=b; __Host-session=%s; c=d", [token(user, {})])

request(method, path, headers) := {
	"attributes": {
		"request": {"http": {"method": method, "path": path, "headers": headers}},
		"contextExtensions": {"tenant": "orders", "identity": "session"},
	},
	"parsed_path": split(trim_prefix(path, "/"), "/"),
}

allowed(method, path, headers) if {
	answer := authz.allow with input as request(method, path, headers)
	answer.allowed
}

test_roles if {
	allowed("GET", "/orders", {"cookie": cookie_of("carol")})
	not allowed("POST", "/orders", {"cookie": cookie_of("carol")})
	allowed("POST", "/orders", {"cookie": cookie_of("bob")})
	not allowed("DELETE", "/orders/1001", {"cookie": cookie_of("bob")})
	allowed("DELETE", "/orders/1001", {"authorization": concat(" ", ["Bearer", token("alice", {})])})
}

test_held_order if {
	allowed("POST", "/orders/1001/ship", {"cookie": cookie_of("bob")})
	not allowed("POST", "/orders/1003/ship", {"cookie": cookie_of("bob")})
}

test_only_a_session_counts_for_pages if {
	not allowed("GET", "/orders", {"x-user": "alice"})
	not allowed("DELETE", "/orders/1001", {"cookie": cookie_of("bob"), "x-user": "alice"})
	not allowed("GET", "/orders", {"cookie": sprintf("__Host-session=%s", [token("bob", {"exp": 1})])})
	not allowed("GET", "/orders", {"cookie": sprintf("__Host-session=%s", [token("bob", {"aud": "payments"})])})
	not allowed("GET", "/orders", {"cookie": concat("; ", [cookie_of("bob"), cookie_of("alice")])})
}

test_elsewhere_x_user_stands_for_the_caller if {
	other := {
		"attributes": {"request": {"http": {"method": "GET", "headers": {"x-user": "alice"}}}},
		"parsed_path": ["orders", "42"],
	}
	answer := authz.allow with input as other
	answer == {"allowed": true, "headers": {"x-user": "alice", "x-roles": ["clerk", "manager"]}}
}

question(user, resource) := {
	"subject": {"type": "user", "id": user},
	"action": {"name": "ship"},
	"resource": resource,
}

test_ship_is_asked_about_one_order if {
	permissions.allow with input as question("bob", {"type": "order"})
	permissions.allow with input as question("bob", {"type": "order", "id": "1001"})
	not permissions.allow with input as question("bob", {"type": "order", "id": "1003"})
	not permissions.allow with input as question("carol", {"type": "order", "id": "1001"})
	not permissions.allow with input as question("bob", {"type": "invoice"})
}

# What the list says of ship is what a request gets.
test_ship_is_what_is_enforced if {
	every user in ["alice", "bob", "carol"] {
		every id in ["1001", "1003"] {
			asked := [1 | permissions.allow with input as question(user, {"type": "order", "id": id})]
			enforced := [1 | allowed("POST", sprintf("/orders/%s/ship", [id]), {"cookie": cookie_of(user)})]
			asked == enforced
		}
	}
}
