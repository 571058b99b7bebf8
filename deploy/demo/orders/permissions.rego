# What a page shows of "orders". Nothing here lets a request in.
package permissions

import data.envoy.authz

# Most actions are a request each, and the rule that Envoy asks is asked about it.
catalog := {"order": [
	{"action": "list", "method": "GET", "path": "/orders"},
	{"action": "create", "method": "POST", "path": "/orders"},
	{"action": "cancel", "method": "DELETE", "path": "/orders/0"},
	{"action": "refund", "method": "POST", "path": "/orders/0/refund"},
	"ship",
]}

# Shipping depends on the order, so it can be asked about one.
allow if {
	input.action.name == "ship"
	input.resource.type == "order"
	id := object.get(input.resource, "id", "0")
	authz.may(input.subject.id, "POST", sprintf("/orders/%s/ship", [id]))
}
