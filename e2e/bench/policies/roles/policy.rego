package envoy.authz

# A user has roles, a role has permissions: methods on paths with wildcards.

default allow := false

allow if {
	some role in data.users[input.attributes.request.http.headers["x-user"]].roles
	some permission in data.roles[role]
	permission.method == input.attributes.request.http.method
	glob.match(permission.path, ["/"], path)
}

path := concat("/", array.concat([""], input.parsed_path))
