package stage

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Proxy is a running proxy that is not an Envoy.
type Proxy struct {
	*Process
	Addr string
}

// system returns the binary of a program that the system has: what
// GATEHOUSE_E2E_NAME names, or else one on the path.
func system(name string) (string, error) {
	env := "GATEHOUSE_E2E_" + strings.ToUpper(name)
	if path := os.Getenv(env); path != "" {
		return path, nil
	}
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	path := filepath.Join("/usr/sbin", name)
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("no %s, run e2e/fetch-proxies or set %s: %w", name, env, err)
	}
	return path, nil
}

// StartNginx runs nginx with these directives in its http block, in which LISTEN
// stands for the address that it listens on. Its files are in dir.
func StartNginx(dir, directives string) (*Proxy, error) {
	binary, err := system("nginx")
	if err != nil {
		return nil, err
	}
	addr, err := FreeAddr()
	if err != nil {
		return nil, err
	}
	config := fmt.Sprintf(`daemon off;
master_process off;
pid %[1]s/nginx.pid;
error_log stderr warn;
events {}
http {
	access_log off;
	client_body_temp_path %[1]s/body;
	proxy_temp_path %[1]s/proxy;
	fastcgi_temp_path %[1]s/fastcgi;
	uwsgi_temp_path %[1]s/uwsgi;
	scgi_temp_path %[1]s/scgi;
%[2]s
}
`, dir, strings.ReplaceAll(directives, "LISTEN", addr))
	file := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return nil, err
	}
	return startProxy(addr, "nginx", exec.Command(binary, "-p", dir, "-e", "stderr", "-c", file))
}

// StartCaddy runs Caddy with this Caddyfile, in which LISTEN stands for the port
// that it listens on. Its files are in dir.
func StartCaddy(dir, caddyfile string) (*Proxy, error) {
	binary, err := system("caddy")
	if err != nil {
		return nil, err
	}
	addr, err := FreeAddr()
	if err != nil {
		return nil, err
	}
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	file := filepath.Join(dir, "Caddyfile")
	if err := os.WriteFile(file, []byte(strings.ReplaceAll(caddyfile, "LISTEN", port)), 0o600); err != nil {
		return nil, err
	}
	cmd := exec.Command(binary, "run", "--config", file, "--adapter", "caddyfile")
	cmd.Env = append(os.Environ(), "HOME="+dir, "XDG_DATA_HOME="+dir, "XDG_CONFIG_HOME="+dir)
	return startProxy(addr, "caddy", cmd)
}

func startProxy(addr, name string, cmd *exec.Cmd) (*Proxy, error) {
	p, err := Start(name, cmd)
	if err != nil {
		return nil, err
	}
	err = p.until(func() bool {
		conn, err := net.DialTimeout("tcp", addr, time.Second)
		if err != nil {
			return false
		}
		conn.Close()
		return true
	})
	if err != nil {
		return nil, err
	}
	return &Proxy{Process: p, Addr: addr}, nil
}
