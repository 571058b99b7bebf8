package stage

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// Envoy is a running Envoy that is ready.
type Envoy struct {
	*Process
	Admin     string            // address
	Listeners map[string]string // :: name → address
}

// StartEnvoy runs Envoy with a configuration in YAML or JSON, whose files are in
// dir. The configuration needs an admin address; it may have port 0, and so may
// those of the listeners.
func StartEnvoy(binary, dir string, config []byte) (*Envoy, error) {
	file, adminFile := filepath.Join(dir, "envoy.yaml"), filepath.Join(dir, "admin-address")
	if err := os.WriteFile(file, config, 0o600); err != nil {
		return nil, err
	}
	p, err := Start("envoy", exec.Command(binary,
		"--config-path", file,
		"--admin-address-path", adminFile,
		"--concurrency", "1",
		"--disable-hot-restart",
		"--log-level", "warn",
		"--file-flush-interval-msec", "20",
	))
	if err != nil {
		return nil, err
	}
	e := &Envoy{Process: p}
	err = p.until(func() bool {
		admin, err := os.ReadFile(adminFile)
		if err != nil || len(admin) == 0 {
			return false
		}
		e.Admin = strings.TrimSpace(string(admin))
		body, err := e.Get("/ready")
		if err != nil || !strings.HasPrefix(body, "LIVE") {
			return false
		}
		e.Listeners, err = e.listeners()
		return err == nil && len(e.Listeners) > 0
	})
	if err != nil {
		return nil, err
	}
	return e, nil
}

// Get asks the admin interface.
func (e *Envoy) Get(path string) (string, error) {
	resp, err := http.Get("http://" + e.Admin + path)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return string(body), err
}

func (e *Envoy) listeners() (map[string]string, error) {
	body, err := e.Get("/listeners?format=json")
	if err != nil {
		return nil, err
	}
	var list struct {
		Statuses []struct {
			Name  string `json:"name"`
			Local struct {
				Socket struct {
					Address string `json:"address"`
					Port    int    `json:"port_value"`
				} `json:"socket_address"`
			} `json:"local_address"`
		} `json:"listener_statuses"`
	}
	if err := json.Unmarshal([]byte(body), &list); err != nil {
		return nil, fmt.Errorf("listeners of Envoy: %w", err)
	}
	listeners := map[string]string{}
	for _, l := range list.Statuses {
		if l.Local.Socket.Port == 0 {
			return nil, fmt.Errorf("listener %q is not bound yet", l.Name)
		}
		listeners[l.Name] = net.JoinHostPort(l.Local.Socket.Address, strconv.Itoa(l.Local.Socket.Port))
	}
	return listeners, nil
}
