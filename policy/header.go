package policy

import (
	"fmt"
	"strings"
	"unicode/utf8"
)

// reservedHeaders may not be changed by a policy: they say where a request
// goes, how its message is framed, or what Envoy thinks of it.
var reservedHeaders = []string{
	":*", "host", "x-envoy-*",
	"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection",
	"te", "trailer", "transfer-encoding", "upgrade",
}

// headerRules say which headers a decision may change.
type headerRules struct {
	allowed []string // patterns that are allowed although they are reserved
}

func newHeaderRules(allowed []string) headerRules {
	rules := headerRules{allowed: make([]string, len(allowed))}
	for i, pattern := range allowed {
		rules.allowed[i] = strings.ToLower(pattern)
	}
	return rules
}

// check returns an error for a header that a decision may not have: one that is
// reserved, or that would be more than one line of a message.
func (r *headerRules) check(name, value string) error {
	if strings.ContainsAny(name, "\r\n\x00") {
		return fmt.Errorf("header name %q has a CR, LF or NUL", name)
	}
	if strings.ContainsAny(value, "\r\n\x00") {
		return fmt.Errorf("value of header %q has a CR, LF or NUL", name)
	}
	if !utf8.ValidString(name) || !utf8.ValidString(value) {
		return fmt.Errorf("header %q: %w", name, errUTF8)
	}
	if r.reserved(name) {
		return fmt.Errorf("header %q may not be changed by a policy", name)
	}
	return nil
}

// reserved reports whether a policy may not change the named header.
func (r *headerRules) reserved(name string) bool {
	name = strings.ToLower(name)
	return matchesAny(reservedHeaders, name) && !matchesAny(r.allowed, name)
}

func matchesAny(patterns []string, name string) bool {
	for _, p := range patterns {
		if prefix, ok := strings.CutSuffix(p, "*"); ok {
			if strings.HasPrefix(name, prefix) {
				return true
			}
		} else if p == name {
			return true
		}
	}
	return false
}
