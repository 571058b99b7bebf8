package envoy.authz_test

import data.envoy.authz

request(method, path, user) := {
	"attributes": {"request": {"http": {"method": method, "headers": {"x-user": user}}}},
	"parsed_path": path,
}

test_a_clerk_reads if {
	decision := authz.allow with input as request("GET", ["orders", "7"], "bob")
	decision.allowed
	decision.headers == {"x-roles": "clerk"}
}

test_a_clerk_cancels_nothing if {
	decision := authz.allow with input as request("DELETE", ["orders", "7"], "bob")
	not decision.allowed
	decision.http_status == 403
}

test_nobody_without_a_name if {
	decision := authz.allow with input as {"attributes": {"request": {"http": {"method": "GET", "headers": {}}}}, "parsed_path": ["orders", "7"]}
	decision.http_status == 401
}

test_the_limit_holds if {
	small := object.union(request("POST", ["orders"], "bob"), {"parsed_body": {"amount": 100}, "truncated_body": false})
	authz.allow.allowed with input as small
	not authz.allow.allowed with input as object.union(small, {"parsed_body": {"amount": 101}})
	not authz.allow.allowed with input as object.union(small, {"truncated_body": true, "parsed_body": null})
}

# What was decided is decided again: events of a decision log, as they were
# delivered. A change of the policy that changes one of them fails here.
test_recorded_decisions if {
	count(data.recorded) > 0
	every event in data.recorded {
		decision := authz.allow with input as event.input
		decision == event.result
	}
}
