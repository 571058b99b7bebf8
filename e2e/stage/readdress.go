package stage

import (
	"fmt"
	"net"
	"strconv"

	"go.yaml.in/yaml/v3"
)

// Readdress returns a configuration of Envoy with other addresses: to has the
// new one by the old one, each host:port. It fails where the configuration has
// not all of the old ones.
func Readdress(config []byte, to map[string]string) ([]byte, error) {
	var root yaml.Node
	if err := yaml.Unmarshal(config, &root); err != nil {
		return nil, fmt.Errorf("configuration of Envoy: %w", err)
	}
	used := map[string]bool{}
	if err := readdress(&root, to, used); err != nil {
		return nil, err
	}
	for old := range to {
		if !used[old] {
			return nil, fmt.Errorf("configuration of Envoy does not have address %s", old)
		}
	}
	return yaml.Marshal(&root)
}

func readdress(n *yaml.Node, to map[string]string, used map[string]bool) error {
	if n.Kind == yaml.MappingNode {
		var host, port *yaml.Node
		for i := 0; i+1 < len(n.Content); i += 2 {
			switch n.Content[i].Value {
			case "address":
				host = n.Content[i+1]
			case "port_value":
				port = n.Content[i+1]
			}
		}
		if host != nil && port != nil {
			old := net.JoinHostPort(host.Value, port.Value)
			if next, ok := to[old]; ok {
				h, p, err := net.SplitHostPort(next)
				if err != nil {
					return err
				}
				if _, err := strconv.ParseUint(p, 10, 16); err != nil {
					return fmt.Errorf("address %s: %w", next, err)
				}
				host.Value, port.Value = h, p
				used[old] = true
			}
		}
	}
	for _, child := range n.Content {
		if err := readdress(child, to, used); err != nil {
			return err
		}
	}
	return nil
}
