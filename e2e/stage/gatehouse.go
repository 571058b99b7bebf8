package stage

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
)

// Listen is the part of a gatehouse configuration that lets the system choose
// the ports, and that does not wait for proxies to look elsewhere at the end.
const Listen = `
grpc:  {listen: "127.0.0.1:0"}
http:  {listen: "127.0.0.1:0"}
admin: {listen: "127.0.0.1:0"}
drain: {delay: 0s}
`

// Gatehouse is a running gatehouse.
type Gatehouse struct {
	*Process
	GRPC  string // address
	HTTP  string // address, or "off"
	Admin string // address
}

// StartGatehouse runs "gatehouse serve" with these arguments until it is ready.
func StartGatehouse(binary string, args ...string) (*Gatehouse, error) {
	return StartGatehouseIn(nil, binary, args...)
}

// StartGatehouseIn is StartGatehouse with variables, each NAME=VALUE, that the
// environment has beside its own.
func StartGatehouseIn(env []string, binary string, args ...string) (*Gatehouse, error) {
	g, err := startUnready(env, binary, args...)
	if err != nil {
		return nil, err
	}
	err = g.until(func() bool {
		resp, err := http.Get("http://" + g.Admin + "/readyz")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
	if err != nil {
		return nil, err
	}
	return g, nil
}

// StartUnready runs "gatehouse serve" until it listens.
func StartUnready(binary string, args ...string) (*Gatehouse, error) {
	return startUnready(nil, binary, args...)
}

func startUnready(env []string, binary string, args ...string) (*Gatehouse, error) {
	cmd := exec.Command(binary, append([]string{"serve", "-log-format=json"}, args...)...)
	cmd.Env = append(os.Environ(), env...)
	p, err := Start("gatehouse", cmd)
	if err != nil {
		return nil, err
	}
	g := &Gatehouse{Process: p}
	if err := p.until(g.addresses); err != nil {
		return nil, err
	}
	return g, nil
}

// addresses reads from the log where the server listens.
func (g *Gatehouse) addresses() bool {
	for line := range strings.Lines(g.Output()) {
		var entry struct{ Msg, GRPC, HTTP, Admin string }
		if json.Unmarshal([]byte(line), &entry) == nil && entry.Msg == "serving" {
			g.GRPC, g.HTTP, g.Admin = entry.GRPC, entry.HTTP, entry.Admin
			return true
		}
	}
	return false
}

// Get asks the admin listener.
func (g *Gatehouse) Get(path string) (string, error) {
	resp, err := http.Get("http://" + g.Admin + path)
	if err != nil {
		return "", err
	}
	body, err := io.ReadAll(resp.Body)
	return string(body), errors.Join(err, resp.Body.Close())
}

// Metric returns the value of a series, written as /metrics does, or 0 where
// there is none.
func (g *Gatehouse) Metric(series string) (float64, error) {
	text, err := g.Get("/metrics")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), series+" "); ok {
			return strconv.ParseFloat(value, 64)
		}
	}
	return 0, nil
}
