package main

import (
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

// The server of the order desk does what deploy/demo/web/README.md says.
func TestDesk(t *testing.T) {
	module, err := stage.Module()
	if err != nil {
		t.Fatal(err)
	}
	root := filepath.Dir(module)
	all, err := newTeams(filepath.Join(root, "deploy", "demo"), filepath.Join(t.TempDir(), "tenants"))
	if err != nil {
		t.Fatal(err)
	}
	d, err := startDesk(root, all, "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()

	const asJSON = "content-type: application/json"
	expires := time.Now().Add(time.Minute).Unix()
	cookie := func(token string) string { return "cookie: " + sessionCookie + "=" + token }
	forged := sessionOf("alice", expires)
	forged = forged[:strings.LastIndexByte(forged, '.')] + "." + encode(mac("something else"))
	for _, c := range []struct {
		request string // method, path, body
		header  string
		status  int
		body    string // a part of it
	}{
		{"GET /", "", 200, "<title>Order desk</title>"},
		{"GET /desk.js", "", 200, `from "/permissions.js"`},
		{"GET /permissions.js", "", 200, "function createPermissions("},
		{"GET /icon.svg", "", 200, "<svg"},
		{"GET /nothing", "", 404, `{"error":`},
		{"GET /session", "", 200, `{"expires":0,"user":null}`},
		{"GET /session", cookie(sessionOf("bob", expires)), 200, fmt.Sprintf(`{"expires":%d,"user":"bob"}`, expires)},
		{"GET /session", cookie(sessionOf("bob", time.Now().Unix()-1)), 200, `"user":null`},
		{"GET /session", cookie(forged), 200, `"user":null`},
		{`POST /session {"user": "carol"}`, asJSON, 200, `"user":"carol"`},
		{`POST /session {"user": "mallory"}`, asJSON, 400, "user is not one of the demo's"},
		{`POST /session {"user": "carol"}`, "content-type: text/plain", 415, "application/json"},
		{"DELETE /session", "", 204, ""},
		{"GET /orders", "", 200, `{"orders":[{"id":"1001"`},
		{`POST /orders {"customer": "Anna", "total": 5}`, asJSON, 201, `"id":"1006"`},
		{`POST /orders {"customer": "Anna"}`, asJSON, 400, "customer and total are needed"},
		{"POST /orders/1006/ship", "", 200, `"status":"shipped"`},
		{"POST /orders/1006/ship", "", 409, "the order is shipped"},
		{"POST /orders/1006/refund", "", 200, `"status":"refunded"`},
		{"DELETE /orders/0", "", 404, "there is no such order"},
		{`PUT /storefront/products/vase {"price": 20.5}`, asJSON, 200, `"price":20.5`},
		{"POST /storefront/products/vase/publish", "", 200, `"published":true`},
		{"GET /storefront/products", "", 200, `{"id":"vase","title":"Blue vase","price":20.5,"published":true}`},
		{"GET /stage/roles", "", 200, `"bob":["clerk"]`},
		{`PUT /stage/roles/orders/bob/manager {"granted": true}`, asJSON, 204, ""},
		{"GET /stage/roles", "", 200, `"bob":["clerk","manager"]`},
		{`PUT /stage/roles/orders/bob/manager {"granted": false}`, asJSON, 204, ""},
		{"GET /stage/roles", "", 200, `"bob":["clerk"]`},
		{`PUT /stage/roles/orders/bob/manager {}`, asJSON, 400, "granted"},
		{`PUT /stage/roles/web/bob/manager {"granted": true}`, asJSON, 404, "there is no such team"},
		{`PUT /stage/roles/orders/mallory/manager {"granted": true}`, asJSON, 404, "there is no such user"},
	} {
		parts := append(strings.SplitN(c.request, " ", 3), "")
		req := stage.Request{Method: parts[0], Path: parts[1], Body: parts[2]}
		if c.header != "" {
			req.Headers = []string{c.header}
		}
		resp, err := stage.Do(d.Addr, req)
		if err != nil {
			t.Fatal(err)
		}
		if resp.Status != c.status || !strings.Contains(resp.Body, c.body) {
			t.Errorf("%s, %s: got %d %.200s, want %d and %s", c.request, c.header, resp.Status, resp.Body, c.status, c.body)
		}
		switch set, err := http.ParseSetCookie(resp.Header.Get("Set-Cookie")); {
		case parts[1] != "/session" || parts[0] == "GET" || resp.Status >= 400:
		case err != nil:
			t.Errorf("%s: %v", c.request, err)
		case set.Name != sessionCookie || !set.Secure || !set.HttpOnly || set.SameSite != http.SameSiteLaxMode || set.Path != "/" ||
			set.MaxAge != map[string]int{"POST": 900, "DELETE": -1}[parts[0]]:
			t.Errorf("%s: got the cookie %s", c.request, set)
		}
	}
}
