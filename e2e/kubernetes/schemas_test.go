package kubernetes

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"
)

// sources are the modules that publish the schemas, each module@version.
//
//go:embed schemas.txt
var sources string

// crds are the files of definitions in those modules, as patterns.
var crds = map[string]string{
	"github.com/cert-manager/cert-manager":               "deploy/crds/*.yaml",
	"github.com/envoyproxy/gateway":                      "charts/gateway-helm/charts/crds/crds/generated/*.yaml",
	"github.com/prometheus-operator/prometheus-operator": "example/prometheus-operator-crd/*.yaml",
	"istio.io/api":            "kubernetes/customresourcedefinitions.gen.yaml",
	"sigs.k8s.io/gateway-api": "config/crd/experimental/*.yaml",
	"k8s.io/kubernetes":       "", // api/openapi-spec/v3
}

// coreFiles are the API groups of Kubernetes itself that the manifests use.
var coreFiles = []string{
	"api__v1", "apis__apps__v1", "apis__autoscaling__v2", "apis__policy__v1", "apis__networking.k8s.io__v1",
	"apis__admissionregistration.k8s.io__v1",
}

// object is JSON.
type object = map[string]any

// module returns the folder of a module that schemas.txt names.
func module(path string) (string, error) {
	for line := range strings.Lines(sources) {
		if name, _, _ := strings.Cut(strings.TrimSpace(line), "@"); name != path {
			continue
		}
		cmd := exec.Command("go", "mod", "download", "-json", strings.TrimSpace(line))
		cmd.Dir = os.TempDir()
		cmd.Env = append(os.Environ(), "GOFLAGS=", "GOWORK=off")
		out, err := cmd.Output()
		var got struct{ Dir, Error string }
		if jsonErr := json.Unmarshal(out, &got); jsonErr != nil || got.Dir == "" {
			return "", fmt.Errorf("module %s: %w %s; run make kubernetes", line, errors.Join(err, jsonErr), got.Error)
		}
		return got.Dir, nil
	}
	return "", fmt.Errorf("schemas.txt does not name module %s", path)
}

// writeSchemas writes a JSON schema for each kind into dir, as
// GROUP/KIND_VERSION.json, where what is not a field is refused.
func writeSchemas(dir string) error {
	for path, pattern := range crds {
		root, err := module(path)
		if err != nil {
			return err
		}
		if pattern == "" {
			err = writeCore(dir, filepath.Join(root, "api", "openapi-spec", "v3"))
		} else {
			err = writeCRDs(dir, filepath.Join(root, pattern))
		}
		if err != nil {
			return fmt.Errorf("schemas of %s: %w", path, err)
		}
	}
	return nil
}

func writeCore(dir, from string) error {
	for _, name := range coreFiles {
		text, err := os.ReadFile(filepath.Join(from, name+"_openapi.json"))
		if err != nil {
			return err
		}
		text = bytes.ReplaceAll(text, []byte("#/components/schemas/"), []byte("#/definitions/"))
		var spec struct {
			Components struct{ Schemas map[string]object }
		}
		if err := json.Unmarshal(text, &spec); err != nil {
			return err
		}
		for _, schema := range spec.Components.Schemas {
			strict(schema)
		}
		for typeName, schema := range spec.Components.Schemas {
			kinds, _ := schema["x-kubernetes-group-version-kind"].([]any)
			if len(kinds) != 1 {
				continue // no object, or one of all groups such as DeleteOptions
			}
			k := kinds[0].(object)
			whole := object{"$ref": "#/definitions/" + typeName, "definitions": spec.Components.Schemas}
			if err := writeSchema(dir, k["group"].(string), k["version"].(string), k["kind"].(string), whole); err != nil {
				return err
			}
		}
	}
	return nil
}

func writeCRDs(dir, pattern string) error {
	files, err := filepath.Glob(pattern)
	if err != nil {
		return err
	}
	if len(files) == 0 {
		return fmt.Errorf("no file is %s", pattern)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		docs, err := split(text)
		if err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		for _, doc := range docs {
			var crd struct {
				Kind string
				Spec struct {
					Group    string
					Names    struct{ Kind string }
					Versions []struct {
						Name   string
						Schema struct{ OpenAPIV3Schema object }
					}
				}
			}
			if err := yaml.Unmarshal(doc, &crd); err != nil {
				return fmt.Errorf("%s: %w", file, err)
			}
			if crd.Kind != "CustomResourceDefinition" {
				continue
			}
			for _, v := range crd.Spec.Versions {
				schema := v.Schema.OpenAPIV3Schema
				strict(schema)
				// The API server knows what these are.
				fields := schema["properties"].(object)
				fields["apiVersion"], fields["kind"] = object{"type": "string"}, object{"type": "string"}
				fields["metadata"] = object{"type": "object", "additionalProperties": false, "properties": object{
					"name": object{"type": "string"}, "namespace": object{"type": "string"}, "labels": object{"type": "object"}, "annotations": object{"type": "object"},
				}}
				if err := writeSchema(dir, crd.Spec.Group, v.Name, crd.Spec.Names.Kind, schema); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// strict has each object of a schema that lists its fields refuse others.
func strict(schema any) {
	switch s := schema.(type) {
	case object:
		_, fields := s["properties"].(object)
		_, more := s["additionalProperties"]
		if fields && !more && s["x-kubernetes-preserve-unknown-fields"] != true && s["type"] == "object" {
			s["additionalProperties"] = false
		}
		if s["x-kubernetes-int-or-string"] == true {
			delete(s, "type")
			s["type"] = []any{"integer", "string"}
		}
		for _, v := range s {
			strict(v)
		}
	case []any:
		for _, v := range s {
			strict(v)
		}
	}
}

func writeSchema(dir, group, version, kind string, schema object) error {
	if group == "" {
		group = version // as kubeconform has it
	}
	text, err := json.Marshal(schema)
	if err != nil {
		return err
	}
	file := filepath.Join(dir, group, strings.ToLower(kind)+"_"+version+".json")
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return os.WriteFile(file, text, 0o600)
}

// split returns the documents of a file.
func split(text []byte) (docs [][]byte, err error) {
	r := utilyaml.NewDocumentDecoder(io.NopCloser(bytes.NewReader(text)))
	defer r.Close()
	buf := make([]byte, len(text)+1)
	for {
		n, err := r.Read(buf)
		if errors.Is(err, io.EOF) {
			return docs, nil
		}
		if err != nil {
			return nil, err
		}
		doc := bytes.Clone(buf[:n])
		var any any
		if err := yaml.Unmarshal(doc, &any); err != nil {
			return nil, err
		}
		if any != nil {
			docs = append(docs, doc)
		}
	}
}

// conform checks objects against their schemas, and returns what was found wrong.
func conform(t *testing.T, manifests []byte) []string {
	t.Helper()
	docs, err := split(manifests)
	if err != nil {
		t.Fatal(err)
	}
	if len(docs) == 0 {
		t.Fatal("there is no object to check")
	}
	cmd := exec.Command(tool(t, "kubeconform"), "-strict", "-output", "json", "-summary",
		"-schema-location", filepath.Join(built.schemas, "{{ .Group }}", "{{ .ResourceKind }}_{{ .ResourceAPIVersion }}.json"), "-")
	cmd.Stdin = bytes.NewReader(manifests)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var report struct {
		Resources []struct{ Kind, Name, Status, Msg string }
		Summary   struct{ Valid, Invalid, Errors, Skipped int }
	}
	if jsonErr := json.Unmarshal(out, &report); jsonErr != nil {
		t.Fatalf("kubeconform: %v %v\n%s%s", err, jsonErr, out, stderr.String())
	}
	var wrong []string
	for _, r := range report.Resources {
		wrong = append(wrong, fmt.Sprintf("%s %s: %s", r.Kind, r.Name, r.Msg))
	}
	if s := report.Summary; len(wrong) == 0 && (err != nil || s.Valid != len(docs) || s.Skipped != 0) {
		t.Fatalf("kubeconform checked %d of %d objects, skipped %d: %v", s.Valid, len(docs), s.Skipped, err)
	}
	return wrong
}

// Regression: a schema that lets anything pass would make each other test here
// pass, too.
func TestSchemasRefuse(t *testing.T) {
	chart := string(render(t, "default"))
	s3 := string(render(t, "s3"))
	read := func(file string) string {
		text, err := os.ReadFile(filepath.Join(deploy, file))
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	for _, c := range []struct{ name, text, old, bad, want string }{
		{"deployment, unknown", chart, "enableServiceLinks: false", "enableServiceLink: false", "enableServiceLink"},
		{"deployment, type", chart, "minReadySeconds: 5", "minReadySeconds: soon", "minReadySeconds"},
		{"container, unknown", chart, "readOnlyRootFilesystem: true", "readonlyRootFilesystem: true", "readonlyRootFilesystem"},
		{"network policy", chart, "policyTypes: [Ingress, Egress]", "policyType: [Ingress, Egress]", "policyType"},
		{"disruption budget", chart, "maxUnavailable: 1\n", "maxUnavailability: 1\n", "maxUnavailability"},
		{"autoscaler", s3, "averageUtilization: 60", "averageUtilisation: 60", "averageUtilisation"},
		{"service monitor", s3, "honorLabels: false", "honourLabels: false", "honourLabels"},
		{"certificate", string(render(t, "tls")), "renewBefore:", "renewAfter:", "renewAfter"},
		{"authorization policy", read("istio/policies.yaml"), "action: CUSTOM", "action: ASK", "action"},
		{"peer authentication", read("istio/policies.yaml"), "mtls:", "mTLS:", "mTLS"},
		{"security policy", read("envoy-gateway/orders.yaml"), "failOpen:", "failClosed:", "failClosed"},
		{"external auth", read("gateway-api/routes.yaml"), "protocol: GRPC", "protocol: REST", "protocol"},
		{"admission policy", read("envoy-gateway/admission.yaml"), "validations:", "validation:", "validation"},
		{"a kind that nobody knows", chart, "kind: Deployment", "kind: Deploymint", "could not find schema"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if !strings.Contains(c.text, c.old) {
				t.Fatalf("the manifest has no %q", c.old)
			}
			wrong := strings.Join(conform(t, []byte(strings.Replace(c.text, c.old, c.bad, 1))), "\n")
			if !strings.Contains(wrong, c.want) {
				t.Errorf("%q for %q: got %q, want a fault that names %s", c.bad, c.old, wrong, c.want)
			}
		})
	}
}
