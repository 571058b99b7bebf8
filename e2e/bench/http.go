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

	"github.com/gatehouse-authz/gatehouse/e2e/traffic"
)

//go:embed policies/roles/permissions.rego
var rolesPermissions string

// httpConfig has one tenant that remembers permission lists, and one that has no
// room for those of all users. A trusted peer says who asks for a list; batches come with a
// token.
const httpConfig = `
overrides:
  forgetful: {opa: {plugins: {gatehouse_http: {permissions: {memory_bytes: 262144}}}}}
`

const httpOPA = `
  plugins:
    gatehouse_http:
      data: [envoy/authz/allow]
      permissions: {package: permissions}
      auth:
        headers: {subject: x-user}
        tokens: [{subject: bench, token: "` + httpToken + `"}]
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
	items   int // in one request
	client  *http.Client
	request []*http.Request // in turn; all are answered alike
	bodies  [][]byte        // of the requests
	verify  func(status int, body []byte) error
}

// Which requests of the HTTP API are measured.
type httpKind int

const (
	batches httpKind = iota
	lists
)

// batch measures what batches cost, and list what permission lists do.
func (b *bench) batch(ctx context.Context) ([]table, error) { return b.overHTTP(ctx, "batch", batches) }
func (b *bench) list(ctx context.Context) ([]table, error)  { return b.overHTTP(ctx, "list", lists) }

func (b *bench) overHTTP(ctx context.Context, part string, kind httpKind) ([]table, error) {
	client := b.httpClient()
	var contenders []*contender
	for _, evaluator := range b.evaluators {
		for _, binary := range b.binaries() {
			s, err := b.gatehouse(httpSetting(binary.path, evaluator))
			if err != nil {
				return nil, err
			}
			cases, err := httpCases("http://"+s.http+"/t/", client, kind)
			if err != nil {
				return nil, err
			}
			for _, c := range cases {
				if err := c.send(ctx, 0, c.verify); err != nil {
					return nil, fmt.Errorf("%s: %w", c.name, err)
				}
				load := traffic.Load{Concurrency: httpConcurrency, Duration: b.roundTime}
				contenders = append(contenders, &contender{
					names: []string{binary.name + ", " + evaluator, c.name}, server: s, items: c.items,
					load: func(ctx context.Context) *traffic.Report { return c.drive(ctx, load) },
				})
			}
		}
	}
	if err := b.rounds(ctx, contenders); err != nil {
		return nil, err
	}
	title := fmt.Sprintf("batches over HTTP, role-based, %d in flight", httpConcurrency)
	if kind == lists {
		title = fmt.Sprintf("permission lists from a catalogue of %d pairs, role-based, %d in flight", pairs, httpConcurrency)
	}
	t := table{Part: part, Title: title, Columns: columns("server, request, items:0, CPU µs/request:1, CPU µs/item:1, requests/s:0, p50 µs:0, p99 µs:0, p99.9 µs:0, allocations:0, RSS MiB:0")}
	for _, c := range contenders {
		cells := c.cells(0)
		r := row{c.names[0], c.names[1], float64(c.items), c.cost(), c.cost() / float64(c.items)}
		t.Rows = append(t.Rows, append(r, cells[2:]...))
	}
	return []table{t}, nil
}

// httpClient returns one that keeps as many connections as are used at once.
func (b *bench) httpClient() *http.Client {
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: concurrency, DisableCompression: true}}
	b.closing = append(b.closing, client.CloseIdleConnections)
	return client
}

// httpSetting is a gatehouse with one tenant that remembers permission lists and one
// that forgets them.
func httpSetting(binary, evaluator string) setting {
	files := maps.Clone(roles(users).files)
	files["permissions.rego"] = rolesPermissions
	return setting{
		binary: binary, evaluator: evaluator, config: httpConfig, opa: httpOPA, listen: httpListen,
		tenants: map[string]map[string]string{"mindful": files, "forgetful": files},
	}
}

// httpListen is stage.Listen with a peer that may say who asks.
const httpListen = `
grpc:  {listen: "127.0.0.1:0"}
http:  {listen: "127.0.0.1:0", trusted_peers: ["127.0.0.1"]}
admin: {listen: "127.0.0.1:0"}
drain: {delay: 0s}
`

// httpCases returns what is measured of the server at base.
func httpCases(base string, client *http.Client, kind httpKind) ([]*httpCase, error) {
	if kind == lists {
		return listCases(base, client)
	}
	var cases []*httpCase
	for _, size := range []int{1, 10, 100, 1000} {
		c, err := batchCase(base, client, size)
		if err != nil {
			return nil, err
		}
		cases = append(cases, c)
	}
	return cases, nil
}

// batchCase has batches of one size.
func batchCase(base string, client *http.Client, size int) (*httpCase, error) {
	c := &httpCase{name: fmt.Sprintf("batch of %d", size), items: size, client: client, verify: func(status int, body []byte) error {
		return want(status, body, http.StatusOK, `"result":true`, size)
	}}
	for first := 0; first < users; first += size {
		if err := c.add(http.MethodPost, base+"mindful/v1/batch/data/envoy/authz/allow", batchOf(first, size),
			"Content-Type", "application/json", "Authorization", "Bearer "+httpToken); err != nil {
			return nil, err
		}
	}
	return c, nil
}

func listCases(base string, client *http.Client) ([]*httpCase, error) {
	whole := func(status int, body []byte) error {
		return want(status, body, http.StatusOK, `"item-`, covered)
	}
	cold := &httpCase{name: "computed", items: pairs, client: client, verify: whole}
	kept := &httpCase{name: "remembered", items: pairs, client: client, verify: whole}
	same := &httpCase{name: "304", items: pairs, client: client, verify: func(status int, body []byte) error {
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
	return []*httpCase{cold, kept, same}, nil
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

// drive sends the requests in turn. Of the answers only the status is looked at:
// one was read.
func (c *httpCase) drive(ctx context.Context, load traffic.Load) *traffic.Report {
	return traffic.Drive(ctx, load, func(ctx context.Context, _, n int) (string, error) {
		outcome := "allowed"
		err := c.send(ctx, n, func(status int, body []byte) error {
			if status != http.StatusOK && status != http.StatusNotModified {
				outcome = fmt.Sprintf("status %d", status)
			}
			return nil
		})
		if err != nil {
			outcome = err.Error()
		}
		return outcome, err
	})
}

// send sends the i-th of the requests.
func (c *httpCase) send(ctx context.Context, i int, verify func(int, []byte) error) error {
	i %= len(c.request)
	req := c.request[i].Clone(ctx)
	if body := c.bodies[i]; body != nil {
		req.Body, req.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	}
	resp, err := c.client.Do(req)
	if err != nil {
		return err
	}
	body, err := io.ReadAll(resp.Body)
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		return err
	}
	return verify(resp.StatusCode, body)
}
