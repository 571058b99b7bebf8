package main

import (
	"crypto/hmac"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/gatehouse-authz/gatehouse/e2e/traffic"
)

// policyCase is one tenant of the benchmark.
type policyCase struct {
	name     string
	files    map[string]string      // of its bundle, by path
	requests []*authv3.CheckRequest // that the load consists of; all are allowed
	denied   *authv3.CheckRequest   // to verify that the policy decides; nil: it allows all
}

//go:embed policies/trivial/policy.rego
var trivialPolicy string

//go:embed policies/roles/policy.rego
var rolesPolicy string

//go:embed policies/jwt/policy.rego
var jwtPolicy string

// Sizes of what the policies look at.
const (
	users  = 1000
	tokens = 4096 // more than any cache of tokens is likely to hold
)

func trivial() policyCase {
	return policyCase{
		name:     "trivial",
		files:    map[string]string{"policy.rego": trivialPolicy},
		requests: []*authv3.CheckRequest{traffic.Get("/orders/42?expand=items", map[string]string{"x-user": "user-0042"})},
	}
}

// roles has so many users, each with two of twenty roles, each role with five
// permissions. Users ask for what the last permission of their second role
// covers; of many users the first thousand ask.
func roles(count int) policyCase {
	type permission struct {
		Method string `json:"method"`
		Path   string `json:"path"`
	}
	type user struct {
		Roles []string `json:"roles"`
	}
	const roleCount, permissionCount = 20, 5
	rolesData, usersData := map[string][]permission{}, map[string]user{}
	for r := range roleCount {
		for p := range permissionCount {
			rolesData[fmt.Sprintf("role-%02d", r)] = append(rolesData[fmt.Sprintf("role-%02d", r)],
				permission{"GET", fmt.Sprintf("/area-%d/*/item-%d/**", r, p)})
		}
	}
	c := policyCase{name: "role-based"}
	for u := range count {
		name, second := fmt.Sprintf("user-%04d", u), (u+7)%roleCount
		usersData[name] = user{Roles: []string{fmt.Sprintf("role-%02d", u%roleCount), fmt.Sprintf("role-%02d", second)}}
		if u >= users {
			continue
		}
		c.requests = append(c.requests, traffic.Get(
			fmt.Sprintf("/area-%d/%d/item-%d/notes/1?expand=all", second, u, permissionCount-1), map[string]string{"x-user": name}))
	}
	c.denied = traffic.Get("/area-3/1/item-0/notes/1", map[string]string{"x-user": "user-0000"})
	c.files = map[string]string{
		"policy.rego": rolesPolicy,
		"data.json":   toJSON(map[string]any{"users": usersData, "roles": rolesData}),
	}
	return c
}

// jwt has a token for each of many callers.
func jwt() policyCase {
	const secret = "a secret of the benchmark, shared with nobody"
	c := policyCase{
		name:  "JWT, HS256",
		files: map[string]string{"policy.rego": jwtPolicy, "data.json": toJSON(map[string]any{"secret": secret})},
	}
	get := func(token string) *authv3.CheckRequest {
		return traffic.Get("/orders/42?expand=items", map[string]string{"authorization": "Bearer " + token})
	}
	for i := range tokens {
		c.requests = append(c.requests, get(sign(secret, i)))
	}
	c.denied = get(sign("another secret", 0))
	return c
}

func sign(secret string, caller int) string {
	encode := func(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }
	text := encode(`{"alg":"HS256","typ":"JWT"}`) + "." + encode(toJSON(map[string]any{
		"iss": "https://login.example.com", "sub": fmt.Sprintf("user-%04d", caller), "aud": "orders",
		"exp": 4_000_000_000, "iat": 1_600_000_000, "scope": "read write", "email": fmt.Sprintf("user-%04d@example.com", caller),
	}))
	mac := hmac.New(sha256.New, []byte(secret))
	mac.Write([]byte(text))
	return text + "." + encode(string(mac.Sum(nil)))
}

// The sizes of what is large.
const (
	bodyBytes  = 64 << 10
	ruleCount  = 1000
	entryCount = 100_000
)

// unread has a body at which the policy does not look.
func unread() policyCase {
	c := trivial()
	c.name, c.requests = "body not read", []*authv3.CheckRequest{post()}
	return c
}

// readBody has a policy that reads the body.
func readBody() policyCase {
	refused := traffic.Get("/orders", nil)
	return policyCase{
		name:     "body read",
		files:    map[string]string{"policy.rego": bodyPolicy},
		requests: []*authv3.CheckRequest{post()},
		denied:   refused,
	}
}

const bodyPolicy = `package envoy.authz

default allow := false

allow if input.parsed_body.customer.id == "alice"
`

// post is a request with a large body.
func post() *authv3.CheckRequest {
	type item struct {
		ID       string `json:"id"`
		Quantity int    `json:"quantity"`
		Note     string `json:"note"`
	}
	body := struct {
		Items    []item            `json:"items"`
		Customer map[string]string `json:"customer"`
	}{Customer: map[string]string{"id": "alice"}}
	for size := 0; size < bodyBytes-100; size += 100 { // an item has a hundred bytes
		i := item{fmt.Sprintf("item-%05d", len(body.Items)), 1 + len(body.Items)%9, ""}
		i.Note = strings.Repeat("x", 99-len(toJSON(i)))
		body.Items = append(body.Items, i)
	}
	text := toJSON(body)
	req := traffic.Get("/orders", map[string]string{"content-type": "application/json", ":method": "POST", "content-length": fmt.Sprint(len(text))})
	req.Attributes.Request.Http.Method, req.Attributes.Request.Http.Body = "POST", text
	req.Attributes.Request.Http.Size = int64(len(text))
	return req
}

// rules has a thousand rules, each for one path; all of them are asked for.
func rules() policyCase {
	c := policyCase{name: "1,000 rules", denied: traffic.Get("/orders/none", nil)}
	var b strings.Builder
	b.WriteString("package envoy.authz\n\ndefault allow := false\n")
	for i := range ruleCount {
		path := fmt.Sprintf("/orders/%d", i)
		fmt.Fprintf(&b, "\nallow if {\n\tinput.attributes.request.http.path == %q\n\tinput.attributes.request.http.method == \"GET\"\n}\n", path)
		c.requests = append(c.requests, traffic.Get(path, nil))
	}
	c.files = map[string]string{"policy.rego": b.String()}
	return c
}

// entries has the role-based policy with a hundred thousand users.
func entries() policyCase {
	c := roles(entryCount)
	c.name = "role-based, 100,000 users"
	return c
}

func toJSON(v any) string {
	text, err := json.Marshal(v)
	if err != nil {
		panic(err) // a value of ours that is no JSON
	}
	return string(text)
}
