package stage

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
)

// Toxiproxy is a network that can be made ill: the server of the program of that
// name.
type Toxiproxy struct {
	*Process
	api string
}

// StartToxiproxy starts a server without proxies.
func StartToxiproxy(binary string) (*Toxiproxy, error) {
	addr, err := FreeAddr()
	if err != nil {
		return nil, err
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	p, err := Start("toxiproxy", exec.Command(binary, "-host", host, "-port", port))
	if err != nil {
		return nil, err
	}
	x := &Toxiproxy{Process: p, api: "http://" + addr}
	return x, p.until(func() bool { return x.call(http.MethodGet, "/version", nil, nil) == nil })
}

// Link is one proxy of a Toxiproxy.
type Link struct {
	Addr string

	proxy *Toxiproxy
	name  string
}

// Link makes a proxy before an address.
func (x *Toxiproxy) Link(name, upstream string) (*Link, error) {
	var made struct{ Listen string }
	err := x.call(http.MethodPost, "/proxies", map[string]any{
		"name": name, "listen": "127.0.0.1:0", "upstream": upstream, "enabled": true,
	}, &made)
	return &Link{Addr: made.Listen, proxy: x, name: name}, err
}

// Toxin makes the link ill, in what comes back from upstream: kind is bandwidth,
// latency, limit_data, reset_peer, slicer, slow_close or timeout.
func (l *Link) Toxin(kind string, attributes map[string]any) error {
	return l.proxy.call(http.MethodPost, "/proxies/"+l.name+"/toxics", map[string]any{
		"name": kind, "type": kind, "stream": "downstream", "toxicity": 1.0, "attributes": attributes,
	}, nil)
}

// Cure removes a toxin.
func (l *Link) Cure(kind string) error {
	return l.proxy.call(http.MethodDelete, "/proxies/"+l.name+"/toxics/"+kind, nil, nil)
}

// Down refuses connections and breaks those that are there.
func (l *Link) Down() error { return l.enable(false) }

// Up ends Down, at the same address.
func (l *Link) Up() error { return l.enable(true) }

func (l *Link) enable(on bool) error {
	// The address must go along: without it the proxy would look for another port.
	return l.proxy.call(http.MethodPost, "/proxies/"+l.name, map[string]any{"enabled": on, "listen": l.Addr}, nil)
}

func (x *Toxiproxy) call(method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		text, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(text)
	}
	req, err := http.NewRequest(method, x.api+path, body)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	text, err := io.ReadAll(resp.Body)
	if err = errors.Join(err, resp.Body.Close()); err != nil {
		return err
	}
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("toxiproxy: %s %s: status %d: %s", method, path, resp.StatusCode, text)
	}
	if out != nil {
		return json.Unmarshal(text, out)
	}
	return nil
}
