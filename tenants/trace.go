package tenants

import "strings"

// ParseTrace returns the IDs of the trace and the span that the value of a
// traceparent header names (https://www.w3.org/TR/trace-context/#traceparent-header):
// VERSION-TRACE-SPAN-FLAGS, in lower case. A version that is not known may have
// more after it. They are empty where the value is not valid.
func ParseTrace(value string) (trace, span string) {
	const length = len("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
	if len(value) < length || value[2] != '-' || value[35] != '-' || value[52] != '-' {
		return "", ""
	}
	version, flags := value[:2], value[53:length]
	trace, span = value[3:35], value[36:52]
	switch {
	case !isHex(version) || !isHex(trace) || !isHex(span) || !isHex(flags),
		version == "ff",
		version == "00" && len(value) > length,
		len(value) > length && value[length] != '-',
		strings.Trim(trace, "0") == "" || strings.Trim(span, "0") == "":
		return "", ""
	}
	return trace, span
}

// isHex reports whether s has only digits of hexadecimal numbers, in lower case.
func isHex(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}
