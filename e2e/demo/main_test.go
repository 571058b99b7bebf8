package main

import (
	"strings"
	"testing"
)

// The demo shows what it says it shows.
func TestDemo(t *testing.T) {
	var out strings.Builder
	if err := run(t.Context(), []string{"-port=0"}, true, &out); err != nil {
		t.Errorf("%v\n%s", err, out.String())
	}
}
