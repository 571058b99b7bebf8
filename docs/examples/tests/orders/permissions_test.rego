package permissions_test

import data.authzen
import data.permissions

test_managers_export if {
	question := {"action": {"name": "export"}, "resource": {"type": "order"}}
	permissions.allow with input as object.union(question, {"subject": {"type": "user", "id": "alice"}})
	not permissions.allow with input as object.union(question, {"subject": {"type": "user", "id": "bob"}})
}

test_authzen_says_what_envoy_is_told if {
	question := {"action": {"name": "cancel"}, "resource": {"type": "order", "id": "7"}}
	authzen.allow with input as object.union(question, {"subject": {"type": "user", "id": "alice"}})
	not authzen.allow with input as object.union(question, {"subject": {"type": "user", "id": "bob"}})
	authzen.actions == {{"name": "read"}} with input as {"subject": {"id": "bob"}, "resource": {"type": "order", "id": "7"}}
}
