package stage

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// pins are the versions of the tools, as in fetch-tools and fetch-envoy.
var pins = map[string]string{
	"envoy":           "1.40.0",
	"versitygw":       "1.8.0",
	"toxiproxy":       "2.5.0",
	"opa":             "1.22.2",
	"prometheus":      "0.315.0",
	"promtool":        "0.315.0",
	"helm":            "4.3.1",
	"kubeconform":     "0.8.0",
	"egctl":           "1.9.1",
	"otelcol":         "0.155.0",
	"jaeger":          "1.76.0",
	"docker-compose":  "2.40.3",
	"cyclonedx-gomod": "1.10.0",
}

// Pin returns the version of a tool; "" where there is none of that name.
func Pin(name string) string { return pins[name] }

// Tool returns the binary of a tool: what GATEHOUSE_E2E_NAME names, or else what
// fetch-tools or fetch-envoy left in .cache.
func Tool(name string) (string, error) {
	env := "GATEHOUSE_E2E_" + strings.ReplaceAll(strings.ToUpper(name), "-", "_")
	path := os.Getenv(env)
	if path == "" {
		module, err := Module()
		if err != nil {
			return "", err
		}
		cache := os.Getenv("GATEHOUSE_CACHE")
		if cache == "" {
			cache = filepath.Join(filepath.Dir(module), ".cache")
		}
		path = filepath.Join(cache, name+"-"+pins[name])
	}
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("no %s %s, run e2e/fetch-tools and e2e/fetch-envoy or set %s: %w", name, pins[name], env, err)
	}
	return path, nil
}

// FreeAddr returns a loopback address that nothing listens on at this moment.
func FreeAddr() (string, error) {
	l, err := listenLoopback()
	if err != nil {
		return "", err
	}
	addr := l.Addr().String()
	return addr, l.Close()
}
