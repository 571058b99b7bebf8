package gatehouse_test

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/gatehouse-authz/gatehouse/"

// arrows says which rooms a room may import: those that speak ask tenants,
// tenants joins what its leaves supply, and the leaves know neither tenants nor
// each other. A room that is not here does not belong in the house.
var arrows = map[string][]string{ // :: room → rooms it may import
	"cmd/gatehouse": {"extauthz", "httpserve", "peers", "tenants", "control", "policy", "bundles", "decisionlog", "schedule", "telemetry"},
	"extauthz":      {"tenants", "policy", "peers"},
	"httpserve":     {"tenants", "control", "policy", "decisionlog", "peers"},
	"tenants":       {"control", "policy", "bundles", "decisionlog", "schedule"},
	"control":       {"bundles", "decisionlog", "policy"},
	"policy":        {"plan", "document"},
	"plan":          {"document"},
	"document":      {},
	"bundles":       {},
	"decisionlog":   {"schedule"},
	"schedule":      {},
	"peers":         {},
	"telemetry":     {"decisionlog"},
	"authztest":     {"tenants", "control", "policy", "bundles", "decisionlog", "schedule"},
}

// walls says which libraries stay in one room: protobuf with those that speak
// it, evaluation with those that answer.
var walls = map[string][]string{ // :: import path prefix → rooms that may import it
	"github.com/envoyproxy/":                      {"extauthz", "cmd/gatehouse"},
	"google.golang.org/protobuf":                  {"extauthz", "bundles", "telemetry"},
	"google.golang.org/grpc":                      {"extauthz", "telemetry", "cmd/gatehouse"},
	"go.opentelemetry.io/otel/sdk":                {"telemetry"},
	"go.opentelemetry.io/otel/exporters":          {"telemetry"},
	"go.opentelemetry.io/contrib":                 {"telemetry"},
	"go.opentelemetry.io/proto":                   {"telemetry"},
	"github.com/open-policy-agent/opa/v1/topdown": {"plan", "policy"},
	"github.com/open-policy-agent/opa/v1/rego":    {"plan"},
	"github.com/open-policy-agent/opa/v1/storage": {"bundles", "policy"},
	"github.com/open-policy-agent/opa/v1/bundle":  {"bundles", "control", "policy"},
	"github.com/lestrrat-go/jwx":                  {"httpserve"},
	"github.com/prometheus/":                      {"tenants", "decisionlog", "telemetry", "cmd/gatehouse"},
	"net/http":                                    {"bundles", "control", "decisionlog", "httpserve", "policy", "telemetry", "cmd/gatehouse"},
	"os":                                          {"bundles", "control", "decisionlog", "extauthz", "cmd/gatehouse"},
	"testing":                                     {"authztest"},
}

func TestArrows(t *testing.T) {
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports", "./...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	seen := map[string]bool{}
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var pkg struct {
			ImportPath string
			Imports    []string
		}
		if err := dec.Decode(&pkg); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		room, ok := strings.CutPrefix(pkg.ImportPath, module)
		if !ok {
			continue // this package of tests
		}
		seen[room] = true
		allowed, ok := arrows[room]
		if !ok {
			t.Errorf("%s: no such room in the plan of the house", room)
		}
		for _, path := range pkg.Imports {
			if other, ok := strings.CutPrefix(path, module); ok && !slices.Contains(allowed, other) {
				t.Errorf("%s imports %s", room, other)
			}
			for prefix, rooms := range walls {
				if (path == prefix || strings.HasPrefix(path, strings.TrimSuffix(prefix, "/")+"/")) && !slices.Contains(rooms, room) {
					t.Errorf("%s imports %s", room, path)
				}
			}
		}
	}
	for room := range arrows {
		if !seen[room] {
			t.Errorf("%s: the room is in the plan but not in the house", room)
		}
	}
}
