package tenants

import (
	"fmt"
	"strings"
)

// ID is the name of a tenant. It comes from ParseID and is therefore safe as a
// path segment, an object key, a host label and a metric label.
type ID string

// maxID is the longest name of a tenant, in bytes.
const maxID = 128

// ParseID parses the name of a tenant: [a-z0-9]([a-z0-9._-]{0,126}[a-z0-9])?
// without "..". Its error quotes no more than the bound of a name.
func ParseID(s string) (ID, error) {
	if s == "" {
		return "", fmt.Errorf("tenant name is empty")
	}
	if len(s) > maxID {
		return "", fmt.Errorf("tenant name has %d bytes, limit %d", len(s), maxID)
	}
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9':
		case (c == '.' || c == '_' || c == '-') && i > 0 && i < len(s)-1:
		default:
			return "", fmt.Errorf("tenant name %q: byte %d is not allowed", s, i)
		}
	}
	if strings.Contains(s, "..") {
		return "", fmt.Errorf(`tenant name %q contains ".."`, s)
	}
	return ID(s), nil
}
