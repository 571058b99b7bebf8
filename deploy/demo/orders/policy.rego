# The team "orders": who may do what follows from the roles in data.json.
package envoy.authz

import data.session

# Who asks is who has logged in at the order desk.
user := session.user

# Without a session, a route takes the caller's name from x-user. It stands for
# whatever has authenticated the caller: a token, a client certificate. Routes
# for browsers, where nothing has, say `identity: session`.
user := input.attributes.request.http.headers["x-user"] if {
	not session.token
	not input.attributes.contextExtensions.identity == "session"
}

method := input.attributes.request.http.method

default allow := {"allowed": false, "http_status": 403, "body": "orders: your roles do not cover this\n"}

allow := {"allowed": true, "headers": {"x-user": user, "x-roles": roles}} if may(user, method, path)

roles := data.users[user].roles

# A role of the user covers the request, and nothing holds the order back.
may(who, verb, target) if {
	some role in data.users[who].roles
	some grant in data.grants[role]
	grant.method == verb
	glob.match(grant.path, ["/"], target)
	not held(target)
}

held(target) if {
	some id, _ in data.holds
	target == sprintf("/orders/%s/ship", [id])
}

path := concat("/", array.concat([""], input.parsed_path))
