# The same for services that speak AuthZEN.
package authzen

import data.envoy.authz

methods := {"read": "GET", "cancel": "DELETE"}

allow if {
	input.resource.type == "order"
	authz.may(input.subject.id, methods[input.action.name], ["orders", input.resource.id])
}

actions contains {"name": name} if {
	some name, method in methods
	authz.may(input.subject.id, method, ["orders", input.resource.id])
}
