package tenants_test

import (
	"strings"
	"testing"

	"github.com/gatehouse-authz/gatehouse/tenants"
)

func TestParseID(t *testing.T) {
	long := strings.Repeat("a", 128)
	for _, ok := range []string{"a", "0", "orders", "a.b-c_d", long, "a1"} {
		if id, err := tenants.ParseID(ok); err != nil || string(id) != ok {
			t.Errorf("ParseID(%q): got %q, %v", ok, id, err)
		}
	}
	for _, no := range []string{"", "A", "a/b", "../a", "a..b", ".a", "a.", "-a", "a-", "_", "a b", "a\x00", "ä", "{{.}}", "a?x", long + "a"} {
		if id, err := tenants.ParseID(no); err == nil || id != "" {
			t.Errorf("ParseID(%q): got %q, want an error", no, id)
		}
	}
}

func FuzzParseID(f *testing.F) {
	f.Add("orders")
	f.Add("a/../b")
	f.Fuzz(func(t *testing.T, s string) {
		id, err := tenants.ParseID(s)
		if err == nil && (string(id) != s || strings.ContainsAny(s, "/\\%?#&{}\x00 ") || strings.Contains(s, "..") || len(s) > 128) {
			t.Errorf("ParseID(%q): got %q", s, id)
		}
	})
}
