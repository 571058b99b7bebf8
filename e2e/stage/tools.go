package stage

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// pins are the versions of the tools, as in fetch-tools and fetch-envoy.
var pins = map[string]string{
	"envoy":     "1.40.0",
	"versitygw": "1.8.0",
	"toxiproxy": "2.5.0",
	"opa":       "1.22.2",
}

// Tool returns the binary of a tool: what GATEHOUSE_E2E_NAME names, or else what
// fetch-tools or fetch-envoy left in .cache.
func Tool(name string) (string, error) {
	env := "GATEHOUSE_E2E_" + strings.ToUpper(name)
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
