package kubernetes

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

// deploy is the folder under test, and chart the Helm chart in it.
const (
	deploy = "../../deploy"
	chart  = deploy + "/helm/gatehouse"
)

// built is what all tests share.
var built struct {
	gatehouse string
	schemas   string // folder
	err       error
}

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "gatehouse-kubernetes-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	built.schemas = filepath.Join(dir, "schemas")
	if err := writeSchemas(built.schemas); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if built.gatehouse = os.Getenv("GATEHOUSE_BIN"); built.gatehouse == "" {
		built.gatehouse, built.err = stage.Build(context.Background(), dir, "../cmd/gatehouse")
	}
	code := m.Run()
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// tool returns the binary of a tool, and fails without it.
func tool(t *testing.T, name string) string {
	t.Helper()
	path, err := stage.Tool(name)
	if err != nil {
		t.Fatalf("%v; run make kubernetes", err)
	}
	return path
}

// gatehouse returns the binary to test.
func gatehouse(t *testing.T) string {
	t.Helper()
	if built.err != nil {
		t.Fatal(built.err)
	}
	return built.gatehouse
}

// helm runs helm, with folders of its own, and returns what it prints.
func helm(t *testing.T, args ...string) ([]byte, error) {
	t.Helper()
	cmd := exec.Command(tool(t, "helm"), args...)
	home := t.TempDir()
	cmd.Env = append(os.Environ(), "HOME="+home, "HELM_CACHE_HOME="+home, "HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home, "KUBECONFIG="+home+"/none")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return out, fmt.Errorf("helm %s: %w\n%s", strings.Join(args, " "), err, stderr.String())
	}
	return out, nil
}

// values returns the names of the chart's files of values, ci/NAME-values.yaml.
func values(t *testing.T) (names []string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(chart, "ci", "*-values.yaml"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no values in %s/ci: %v", chart, err)
	}
	for _, file := range files {
		names = append(names, strings.TrimSuffix(filepath.Base(file), "-values.yaml"))
	}
	return names
}

// render renders the chart as release "gatehouse" in namespace "gatehouse" with
// ci/NAME-values.yaml.
func render(t *testing.T, name string, args ...string) []byte {
	t.Helper()
	out, err := helm(t, append([]string{"template", "gatehouse", chart, "--namespace", "gatehouse", "--kube-version", "1.36.3",
		"--values", filepath.Join(chart, "ci", name+"-values.yaml")}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// eventually waits for something that another process does in its own time.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); {
		if time.Now().After(end) {
			t.Fatalf("waited in vain until %s", what)
		}
		<-time.After(20 * time.Millisecond)
	}
}
