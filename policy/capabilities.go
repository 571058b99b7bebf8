package policy

import (
	"slices"

	"github.com/open-policy-agent/opa/v1/ast"
)

// capabilities are what policies are compiled with: all of this OPA but for
// the builtins that reach the network, and no host for schemas to refer to.
// Those with a network may call http.send, which asks the Env's Network.
var (
	capabilities        = capabilitiesWithout(ast.NetLookupIPAddr.Name, ast.HTTPSend.Name)
	networkCapabilities = capabilitiesWithout(ast.NetLookupIPAddr.Name)
)

func capabilitiesWithout(names ...string) *ast.Capabilities {
	c := ast.CapabilitiesForThisVersion()
	c.Builtins = slices.DeleteFunc(slices.Clone(c.Builtins), func(b *ast.Builtin) bool {
		return slices.Contains(names, b.Name)
	})
	c.AllowNet = []string{}
	return c
}

// capabilitiesOf returns what a policy of these options may do.
func capabilitiesOf(opts *Options) *ast.Capabilities {
	if opts.Network {
		return networkCapabilities
	}
	return capabilities
}
