package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"go.yaml.in/yaml/v3"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

// set is all that runs: gatehouse with the tenants, a backend behind an Envoy,
// and the order desk behind another.
type set struct {
	teams      *teams
	gatehouse  *stage.Gatehouse
	envoy, web *stage.Envoy

	stops []func() // what ends it, in the order of the beginning
}

// Stop ends all.
func (s *set) Stop() {
	for i := len(s.stops) - 1; i >= 0; i-- {
		s.stops[i]()
	}
}

// DeskURL is where the order desk is. A browser takes a cookie that is Secure
// from this name.
func (s *set) DeskURL() string {
	_, port, _ := net.SplitHostPort(s.web.Listeners["web"]) // an address of Envoy
	return "http://localhost:" + port
}

// build starts all.
func build(ctx context.Context, o options) (built *set, err error) {
	s := &set{}
	defer func() {
		if err != nil {
			s.Stop()
		}
	}()
	module, err := stage.Module()
	if err != nil {
		return nil, err
	}
	root := filepath.Dir(module)
	if o.envoy == "" {
		o.envoy = filepath.Join(root, ".cache", "envoy-1.40.0")
	}
	if _, err := os.Stat(o.envoy); err != nil {
		return nil, fmt.Errorf("no Envoy, run e2e/fetch-envoy first: %w", err)
	}
	dir, err := os.MkdirTemp("", "gatehouse-demo-")
	if err != nil {
		return nil, err
	}
	s.stops = append(s.stops, func() { os.RemoveAll(dir) })
	if o.gatehouse == "" {
		if o.gatehouse, err = stage.Build(ctx, dir, "../cmd/gatehouse"); err != nil {
			return nil, err
		}
	}

	// The backends.
	echo, err := stage.StartEcho()
	if err != nil {
		return nil, err
	}
	s.stops = append(s.stops, echo.Close)
	if s.teams, err = newTeams(filepath.Join(root, "deploy", "demo"), filepath.Join(dir, "tenants")); err != nil {
		return nil, err
	}
	desk, err := startDesk(root, s.teams, "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s.stops = append(s.stops, desk.Close)

	// Gatehouse with the tenants.
	if o.s3 != "" {
		if s.teams.shelf, err = newShelf(o.s3, dir, s.teams.dir); err != nil {
			return nil, err
		}
		s.stops = append(s.stops, s.teams.shelf.Stop)
	}
	if s.gatehouse, err = startGatehouse(o.gatehouse, root, dir, s.teams); err != nil {
		return nil, err
	}
	s.stops = append(s.stops, s.gatehouse.Stop)

	// The Envoys before them.
	const any = "127.0.0.1:0"
	s.envoy, err = startEnvoy(o.envoy, filepath.Join(dir, "envoy"), filepath.Join(root, "deploy", "envoy", "envoy.yaml"), map[string]string{
		"127.0.0.1:10000": free(o.port), "127.0.0.1:9901": any, "127.0.0.1:9191": s.gatehouse.GRPC, "127.0.0.1:8080": echo.Addr,
	})
	if err != nil {
		return nil, err
	}
	s.stops = append(s.stops, s.envoy.Kill)
	s.web, err = startEnvoy(o.envoy, filepath.Join(dir, "web"), filepath.Join(root, "deploy", "demo", "web", "envoy.yaml"), map[string]string{
		"127.0.0.1:10080": free(o.desk), "127.0.0.1:9902": any,
		"127.0.0.1:9191": s.gatehouse.GRPC, "127.0.0.1:8181": s.gatehouse.HTTP, "127.0.0.1:8080": desk.Addr,
	})
	if err != nil {
		return nil, err
	}
	s.stops = append(s.stops, s.web.Kill)
	return s, nil
}

// startGatehouse starts gatehouse with the configuration of the order desk, on
// ports that the system chooses, and with the bundles of the teams.
func startGatehouse(binary, root, dir string, t *teams) (*stage.Gatehouse, error) {
	desk, err := os.ReadFile(filepath.Join(root, "deploy", "demo", "web", "gatehouse.yaml"))
	if err != nil {
		return nil, err
	}
	texts := [][]byte{desk, []byte(stage.Listen)}
	config := filepath.Join(dir, "gatehouse.yaml")
	args := []string{"-c", config}
	var env []string
	if t.shelf == nil {
		args = append(args, t.dir)
	} else {
		texts = append(texts, []byte(t.shelf.config()))
		env = t.shelf.Root.Environment()
	}
	text, err := merged(texts...)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(config, text, 0o600); err != nil {
		return nil, err
	}
	return stage.StartGatehouseIn(env, binary, args...)
}

// merged returns what several YAML documents say together; where they differ, the
// last one holds.
func merged(texts ...[]byte) ([]byte, error) {
	all := map[string]any{}
	for _, text := range texts {
		var one map[string]any
		if err := yaml.Unmarshal(text, &one); err != nil {
			return nil, err
		}
		merge(all, one)
	}
	return yaml.Marshal(all)
}

func merge(into, from map[string]any) {
	for k, v := range from {
		sub, ok := v.(map[string]any)
		if there, both := into[k].(map[string]any); ok && both {
			merge(there, sub)
			continue
		}
		into[k] = v
	}
}

// startEnvoy starts an Envoy with a file of the repository and other addresses.
func startEnvoy(binary, dir, file string, addresses map[string]string) (*stage.Envoy, error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	if text, err = stage.Readdress(text, addresses); err != nil {
		return nil, err
	}
	return stage.StartEnvoy(binary, dir, text)
}

// free returns a loopback address with the port, or with none if it is taken.
func free(port int) string {
	addr := fmt.Sprintf("127.0.0.1:%d", port)
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return "127.0.0.1:0"
	}
	l.Close()
	return addr
}
