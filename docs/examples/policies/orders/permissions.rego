# What a page shows. Nothing here lets a request in.
package permissions

# An action that names a request is asked as that request: the rule that Envoy asks
# decides, and the page shows what the proxy enforces.
catalog := {"order": [
	{"action": "read", "method": "GET", "path": "/orders/0"},
	{"action": "cancel", "method": "DELETE", "path": "/orders/0"},
	"export",
]}

# One that names none is asked here.
allow if {
	input.action.name == "export"
	input.resource.type == "order"
	"manager" in data.users[input.subject.id].roles
}
