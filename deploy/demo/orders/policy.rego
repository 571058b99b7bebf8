# The team "orders": who may do what follows from the roles in data.json.
package envoy.authz

# The route of this tenant takes the caller's name from x-user. It stands for
# whatever has authenticated the caller: a token, a client certificate.
user := input.attributes.request.http.headers["x-user"]

method := input.attributes.request.http.method

default allow := {"allowed": false, "http_status": 403, "body": "orders: your roles do not cover this\n"}

allow := {"allowed": true, "headers": {"x-user": user, "x-roles": roles}} if permitted

roles := data.users[user].roles

permitted if {
	some role in roles
	some permission in data.permissions[role]
	permission.method == method
	glob.match(permission.path, ["/"], path)
}

path := concat("/", array.concat([""], input.parsed_path))
