package main

import (
	"strings"
	"testing"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

// The demo shows what it says it shows, wherever the bundles come from.
func TestDemo(t *testing.T) {
	s3, err := stage.Tool("versitygw")
	if err != nil {
		t.Fatal(err)
	}
	for name, args := range map[string][]string{
		"directory": {"-port=0"},
		"S3":        {"-port=0", "-s3=" + s3},
	} {
		t.Run(name, func(t *testing.T) {
			var out strings.Builder
			if err := run(t.Context(), args, true, &out); err != nil {
				t.Errorf("%v\n%s", err, out.String())
			}
		})
	}
}
