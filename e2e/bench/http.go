package main

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
	"github.com/gatehouse-authz/gatehouse/e2e/traffic"
)

//go:embed policies/roles/permissions.rego
var rolesPermissions string

// httpConfig has one tenant that remembers permission lists, and one that has no
// room for those of all users. A trusted peer says who asks for a list; batches come with a
// token.
const httpConfig = `
http: {listen: "127.0.0.1:0", trusted_peers: ["127.0.0.1"]}
tenants: {preload: ["*"]}
opa:
  plugins:
    gatehouse_http:
      data: [envoy/authz/allow]
      permissions: {package: permissions}
      auth:
        headers: {subject: x-user}
        tokens: [{subject: bench, token: "` + httpToken + `"}]
overrides:
  forgetful: {opa: {plugins: {gatehouse_http: {permissions: {memory_bytes: 262144}}}}}
`

const (
	httpToken = "a-token-of-the-benchmark"

	httpConcurrency = 4 // requests in flight; a batch is many questions at once

	pairs   = 50 // of the catalogue in rolesPermissions
	covered = 10 // those that the roles of the first user cover
)

// httpCase is one kind of request.
type httpCase struct {
	name    string
	items   int             // in one request
	request []*http.Request // in turn; all are answered alike
	bodies  [][]byte        // of the requests
	verify  func(status int, body []byte) error

	mu      sync.Mutex
	count   int               // requests
	took    time.Duration     // by the wall
	cpu     time.Duration     // of the server
	latency traffic.Histogram // guarded by mu
}

// http measures what batches and permission lists cost.
func (b *bench) http(ctx context.Context, binary string, rounds int, stdout io.Writer) error {
	files := maps.Clone(roles().files)
	files["permissions.rego"] = rolesPermissions
	dir := filepath.Join(b.dir, "tenants-http")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	for _, name := range []string{"mindful", "forgetful"} {
		if err := os.WriteFile(filepath.Join(dir, name+".tar.gz"), stage.Bundle(files), 0o600); err != nil {
			return err
		}
	}
	config := dir + ".yaml"
	text := strings.Replace(stage.Listen, `http:  {listen: "127.0.0.1:0"}`, "", 1) + httpConfig
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return err
	}
	g, err := stage.StartGatehouse(binary, "-c", config, dir)
	if err != nil {
		return err
	}
	b.processes = append(b.processes, g.Process)
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: httpConcurrency, DisableCompression: true}}
	defer client.CloseIdleConnections()
	cases, err := httpCases("http://"+g.HTTP+"/t/", client)
	if err != nil {
		return err
	}
	for range rounds {
		for _, c := range cases {
			if err := c.measure(ctx, client, g.Pid(), b.round); err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
		}
	}
	fmt.Fprintf(stdout, "\nover HTTP, role-based; %d requests in flight; a catalogue of %d pairs\n\n", httpConcurrency, pairs)
	w := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "request\titems\tCPU µs/request\tCPU µs/item\trequests/s\tp50 µs\tp99 µs\t")
	for _, c := range cases {
		each := float64(c.cpu.Nanoseconds()) / 1e3 / float64(c.count)
		fmt.Fprintf(w, "%s\t%d\t%.1f\t%.1f\t%.0f\t%d\t%d\t\n", c.name, c.items, each, each/float64(c.items),
			float64(c.count)/c.took.Seconds(), c.latency.Quantile(0.5).Microseconds(), c.latency.Quantile(0.99).Microseconds())
	}
	return w.Flush()
}

// httpCases returns what is measured of the server at base.
func httpCases(base string, client *http.Client) ([]*httpCase, error) {
	var cases []*httpCase
	for _, size := range []int{1, 10, 100, 1000} {
		c := &httpCase{name: "batch", items: size, verify: func(status int, body []byte) error {
			return want(status, body, http.StatusOK, `"result":true`, size)
		}}
		for first := 0; first < users; first += size {
			if err := c.add(http.MethodPost, base+"mindful/v1/batch/data/envoy/authz/allow", batchOf(first, size),
				"Content-Type", "application/json", "Authorization", "Bearer "+httpToken); err != nil {
				return nil, err
			}
		}
		cases = append(cases, c)
	}
	whole := func(status int, body []byte) error {
		return want(status, body, http.StatusOK, `"item-`, covered)
	}
	cold := &httpCase{name: "list, computed", items: pairs, verify: whole}
	kept := &httpCase{name: "list, remembered", items: pairs, verify: whole}
	same := &httpCase{name: "list, 304", items: pairs, verify: func(status int, body []byte) error {
		return want(status, body, http.StatusNotModified, "", 0)
	}}
	for u := range users {
		user := fmt.Sprintf("user-%04d", u)
		if err := cold.add(http.MethodGet, base+"forgetful/v1/me/permissions", nil, "X-User", user); err != nil {
			return nil, err
		}
	}
	for u := range users / 10 {
		user := fmt.Sprintf("user-%04d", u)
		url := base + "mindful/v1/me/permissions"
		if err := kept.add(http.MethodGet, url, nil, "X-User", user); err != nil {
			return nil, err
		}
		resp, err := client.Do(kept.request[u])
		if err != nil {
			return nil, err
		}
		resp.Body.Close()
		if err := same.add(http.MethodGet, url, nil, "X-User", user, "If-None-Match", resp.Header.Get("ETag")); err != nil {
			return nil, err
		}
	}
	return append(cases, cold, kept, same), nil
}

// want checks an answer, and how often it has a text.
func want(status int, body []byte, wantStatus int, text string, times int) error {
	if status != wantStatus || text != "" && bytes.Count(body, []byte(text)) != times {
		return fmt.Errorf("status %d, %q %d times, want %d and %d: %.300s", status, text, bytes.Count(body, []byte(text)), wantStatus, times, body)
	}
	return nil
}

// batchOf returns a batch of the same questions that checks of roles ask.
func batchOf(first, size int) []byte {
	inputs := map[string]any{}
	for u := first; u < first+size; u++ {
		area := (u + 7) % 20
		inputs[fmt.Sprintf("item-%d", u)] = map[string]any{
			"attributes":  map[string]any{"request": map[string]any{"http": map[string]any{"method": "GET", "headers": map[string]any{"x-user": fmt.Sprintf("user-%04d", u)}}}},
			"parsed_path": []string{fmt.Sprintf("area-%d", area), fmt.Sprint(u), "item-4", "notes", "1"},
		}
	}
	return []byte(toJSON(map[string]any{"inputs": inputs}))
}

// add adds a request.
func (c *httpCase) add(method, url string, body []byte, headers ...string) error {
	req, err := http.NewRequest(method, url, nil)
	if err != nil {
		return err
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	c.request, c.bodies = append(c.request, req), append(c.bodies, body)
	return nil
}

// measure runs one round.
func (c *httpCase) measure(ctx context.Context, client *http.Client, pid int, round time.Duration) error {
	if err := c.send(ctx, client, 0, c.verify); err != nil {
		return err
	}
	before, err := traffic.CPUTime(pid)
	if err != nil {
		return err
	}
	begun := time.Now()
	errs := make([]error, httpConcurrency)
	var wg sync.WaitGroup
	for worker := range httpConcurrency {
		wg.Go(func() {
			var latency traffic.Histogram
			n := 0
			for ; time.Since(begun) < round && errs[worker] == nil; n++ {
				sent := time.Now()
				errs[worker] = c.send(ctx, client, worker+n*httpConcurrency, c.verifyFast)
				latency.Record(time.Since(sent))
			}
			c.mu.Lock()
			defer c.mu.Unlock()
			c.latency.Add(&latency)
			c.count += n
		})
	}
	wg.Wait()
	c.took += time.Since(begun)
	after, err := traffic.CPUTime(pid)
	c.cpu += after - before
	return errors.Join(append(errs, err)...)
}

// verifyFast checks the status alone: the answer was read once.
func (c *httpCase) verifyFast(status int, body []byte) error {
	if status != http.StatusOK && status != http.StatusNotModified {
		return fmt.Errorf("status %d: %.300s", status, body)
	}
	return nil
}

// send sends the i-th of the requests.
func (c *httpCase) send(ctx context.Context, client *http.Client, i int, verify func(int, []byte) error) error {
	i %= len(c.request)
	req := c.request[i].Clone(ctx)
	if body := c.bodies[i]; body != nil {
		req.Body, req.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	body, err := io.ReadAll(resp.Body)
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		return err
	}
	return verify(resp.StatusCode, body)
}
