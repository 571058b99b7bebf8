package stage

import (
	"encoding/json"
	"net/http"
	"os/exec"
	"strings"
)

// Listen is the part of a gatehouse configuration that lets the system choose
// the ports.
const Listen = `
grpc:  {listen: "127.0.0.1:0"}
admin: {listen: "127.0.0.1:0"}
`

// Gatehouse is a running gatehouse.
type Gatehouse struct {
	*Process
	GRPC  string // address
	Admin string // address
}

// StartGatehouse runs "gatehouse serve" with these arguments until it is ready.
func StartGatehouse(binary string, args ...string) (*Gatehouse, error) {
	g, err := StartUnready(binary, args...)
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
	p, err := Start("gatehouse", exec.Command(binary, append([]string{"serve", "-log-format=json"}, args...)...))
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
		var entry struct{ Msg, GRPC, Admin string }
		if json.Unmarshal([]byte(line), &entry) == nil && entry.Msg == "serving" {
			g.GRPC, g.Admin = entry.GRPC, entry.Admin
			return true
		}
	}
	return false
}
