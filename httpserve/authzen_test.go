package httpserve_test

import (
	"bytes"
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"golang.org/x/tools/txtar"

	"github.com/gatehouse-authz/gatehouse/httpserve"
)

// vectors are requests to an AuthZEN API and what is expected of the answers.
type vectors struct {
	Fixtures map[string]json.RawMessage
	Vectors  []vector
}

type vector struct {
	ID, Suite, Method, Path string
	Headers                 map[string]string
	Body                    json.RawMessage
	RawBody                 *string `json:"raw_body"`
	Expect                  struct {
		Status         int
		Decision       *bool
		Evaluations    []struct{ Decision any }
		Length         *int
		Absent         []string
		Include        []entity `json:"results_include"`
		Type           string   `json:"results_type"`
		Set            []entity `json:"results_set"`
		Results        []entity
		Array          bool            `json:"results_is_array"`
		SameAs         string          `json:"same_results_as"`
		Page           json.RawMessage `json:"page_if_present"`
		PageRequired   json.RawMessage `json:"page_required"`
		OnlyIf         string          `json:"only_if"`
		Headers        map[string]string
		ContentType    string          `json:"content_type"`
		Required       []string        `json:"json_required"`
		EqualsBase     bool            `json:"policy_decision_point_equals_base_url"`
		HTTPS          []string        `json:"https_urls"`
		Suffix         string          `json:"policy_decision_point_suffix"`
		InputAssert    json.RawMessage `json:"input_assert"` // of what the policy sees: in authzen.txt
		LogAssert      json.RawMessage `json:"log_assert"`   // of the decision log: in TestEvaluationsAreRecorded
		ResultsPresent bool            `json:"-"`
	}
	Note    string
	Level   string
	Derived bool
}

// UnmarshalJSON refuses an expectation that nobody checks.
func (v *vector) UnmarshalJSON(text []byte) error {
	type plain vector
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode((*plain)(v)); err != nil {
		return err
	}
	var raw struct{ Expect map[string]json.RawMessage }
	if err := json.Unmarshal(text, &raw); err != nil {
		return err
	}
	_, v.Expect.ResultsPresent = raw.Expect["results"]
	return nil
}

// entity is an entity in a result.
type entity map[string]any

// authZENAnswer is an answer of an AuthZEN API.
type authZENAnswer struct {
	status int
	header http.Header
	body   map[string]any
}

func (a *authZENAnswer) results(t *testing.T) []entity {
	t.Helper()
	list, ok := a.body["results"].([]any)
	if !ok {
		t.Fatalf("got results %v, want an array", a.body["results"])
	}
	results := []entity{}
	for _, r := range list {
		results = append(results, entity(r.(map[string]any)))
	}
	return results
}

func readVectors(t *testing.T) *vectors {
	t.Helper()
	text, err := os.ReadFile("testdata/authzen.json")
	if err != nil {
		t.Fatal(err)
	}
	v := new(vectors)
	if err := json.Unmarshal(text, v); err != nil {
		t.Fatal(err)
	}
	return v
}

// tenant returns a server of the tenant that a suite of the vectors asks.
func (v *vectors) tenant(t *testing.T, name string) *httptest.Server {
	t.Helper()
	rego := map[string]string{}
	if err := json.Unmarshal(v.Fixtures["rego"], &rego); err != nil {
		t.Fatal(err)
	}
	data := maps.Clone(v.Fixtures)
	delete(data, "rego")
	document, err := json.Marshal(data)
	if err != nil {
		t.Fatal(err)
	}
	bundle := &txtar.Archive{Files: []txtar.File{{Name: "policy.rego", Data: []byte(rego[name])}, {Name: "data.json", Data: document}}}
	p, _ := pool(t, string(txtar.Format(bundle)), "authzen: {package: authzen."+name+"}", nil)
	web := httptest.NewServer(server(t, httpserve.Config{Pool: p, Local: true, URL: "https://authz.example.com"}))
	t.Cleanup(web.Close)
	return web
}

// TestAuthZENVectors runs the vectors with the tenant's base before their paths.
// The description of the API lies where its base says; two vectors that place it
// elsewhere are read so.
func TestAuthZENVectors(t *testing.T) {
	v := readVectors(t)
	cert, search := v.tenant(t, "cert"), v.tenant(t, "search")
	answers := map[string]*authZENAnswer{}
	for _, c := range v.Vectors {
		t.Run(c.ID, func(t *testing.T) {
			web := cert
			if strings.HasPrefix(c.ID, "search/") {
				web = search
			}
			if c.Expect.OnlyIf != "" {
				c.Body = bytes.ReplaceAll(c.Body, []byte("<next_token from previous response>"), []byte(nextToken(t, answers["cert/c-4-5-1"])))
			}
			a := c.ask(t, web.URL)
			answers[c.ID] = a
			c.check(t, a, answers[c.Expect.SameAs])
		})
	}
	if len(answers) != len(v.Vectors) || len(answers) < 270 {
		t.Errorf("%d vectors were run of %d", len(answers), len(v.Vectors))
	}
}

func nextToken(t *testing.T, a *authZENAnswer) string {
	t.Helper()
	page, _ := a.body["page"].(map[string]any)
	token, _ := page["next_token"].(string)
	if token == "" {
		t.Fatalf("got page %v, want one with a next token", page)
	}
	return token
}

func (c *vector) ask(t *testing.T, base string) *authZENAnswer {
	t.Helper()
	path := "/t/orders" + c.Path
	if strings.HasPrefix(c.Path, "/.well-known/") {
		path = "/.well-known/authzen-configuration/t/orders"
	}
	body := string(c.Body)
	if c.RawBody != nil {
		body = *c.RawBody
	}
	req, err := http.NewRequestWithContext(t.Context(), c.Method, base+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range c.Headers {
		req.Header.Set(name, value)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	a := &authZENAnswer{status: resp.StatusCode, header: resp.Header}
	if err := json.Unmarshal(text, &a.body); err != nil {
		t.Fatalf("status %d, body %q: %v", resp.StatusCode, text, err)
	}
	return a
}

func (c *vector) check(t *testing.T, a, same *authZENAnswer) {
	t.Helper()
	e := &c.Expect
	if a.status != e.Status {
		t.Fatalf("got status %d and %v, want %d", a.status, a.body, e.Status)
	}
	for name, want := range e.Headers {
		if got := a.header.Get(name); got != want {
			t.Errorf("header %s: got %q, want %q", name, got, want)
		}
	}
	if e.Status != http.StatusOK {
		if _, ok := a.body["error"]; !ok {
			t.Errorf("got %v, want an error", a.body)
		}
		return
	}
	if e.Decision != nil && a.body["decision"] != *e.Decision {
		t.Errorf("got decision %v, want %t", a.body["decision"], *e.Decision)
	}
	for _, name := range e.Absent {
		if _, ok := a.body[name]; ok {
			t.Errorf("got %q, want none", name)
		}
	}
	c.checkEvaluations(t, a)
	c.checkResults(t, a, same)
	c.checkMetadata(t, a)
}

func (c *vector) checkEvaluations(t *testing.T, a *authZENAnswer) {
	t.Helper()
	e := &c.Expect
	if e.Evaluations == nil {
		return
	}
	list, _ := a.body["evaluations"].([]any)
	if len(list) != len(e.Evaluations) || e.Length != nil && len(list) != *e.Length {
		t.Fatalf("got %v, want %d decisions", a.body["evaluations"], len(e.Evaluations))
	}
	if _, ok := a.body["decision"]; ok {
		t.Error("got a decision beside the evaluations")
	}
	for i, want := range e.Evaluations {
		got, isBool := list[i].(map[string]any)["decision"].(bool)
		if !isBool || want.Decision != "<boolean>" && got != want.Decision {
			t.Errorf("item %d: got %v, want %v", i, list[i], want.Decision)
		}
	}
}

func (c *vector) checkResults(t *testing.T, a, same *authZENAnswer) {
	t.Helper()
	e := &c.Expect
	has := func(list []entity, want entity) bool {
		return slices.ContainsFunc(list, func(got entity) bool { return reflect.DeepEqual(got, want) })
	}
	equal := func(want []entity) {
		t.Helper()
		got := a.results(t)
		if len(got) != len(want) || slices.ContainsFunc(want, func(w entity) bool { return !has(got, w) }) {
			t.Errorf("got results %v, want %v", got, want)
		}
	}
	for _, want := range e.Include {
		if got := a.results(t); !has(got, want) {
			t.Errorf("got results %v, want %v in it", got, want)
		}
	}
	if e.Type != "" {
		for _, got := range a.results(t) {
			if got["type"] != e.Type {
				t.Errorf("got result %v, want type %q", got, e.Type)
			}
		}
	}
	if e.Set != nil || e.ResultsPresent {
		equal(append(e.Set, e.Results...))
	}
	if e.SameAs != "" {
		equal(same.results(t))
	}
	if e.Array {
		a.results(t)
		page, _ := a.body["page"].(map[string]any)
		if _, ok := page["next_token"].(string); !ok {
			t.Errorf("got page %v, want one with a next token", page)
		}
	}
}

func (c *vector) checkMetadata(t *testing.T, a *authZENAnswer) {
	t.Helper()
	e := &c.Expect
	if e.ContentType != "" && a.header.Get("Content-Type") != e.ContentType {
		t.Errorf("got content-type %q, want %q", a.header.Get("Content-Type"), e.ContentType)
	}
	const base = "https://authz.example.com/t/orders"
	if (e.EqualsBase || e.Suffix != "") && a.body["policy_decision_point"] != base {
		t.Errorf("got policy decision point %v, want %s", a.body["policy_decision_point"], base)
	}
	for _, name := range append(slices.Clone(e.HTTPS), e.Required...) {
		if got, _ := a.body[name].(string); !strings.HasPrefix(got, base) {
			t.Errorf("%s: got %v, want a URL at %s", name, a.body[name], base)
		}
	}
}

// A page that a token names is the next of the same results, and of no others.
func TestSearchPages(t *testing.T) {
	v := readVectors(t)
	web := v.tenant(t, "search")
	search := func(subject, token string) *authZENAnswer {
		body, err := json.Marshal(map[string]any{
			"subject": map[string]string{"type": "user", "id": subject}, "action": map[string]string{"name": "view"},
			"resource": map[string]string{"type": "record"}, "page": map[string]any{"limit": 3, "token": token},
		})
		if err != nil {
			t.Fatal(err)
		}
		c := &vector{Method: "POST", Path: "/access/v1/search/resource", Headers: map[string]string{"Content-Type": "application/json"}, Body: body}
		return c.ask(t, web.URL)
	}
	var ids []string
	pages := 0
	for token := ""; pages == 0 || token != ""; pages++ {
		a := search("bob", token)
		if a.status != http.StatusOK {
			t.Fatalf("page %d: got status %d and %v", pages, a.status, a.body)
		}
		for _, r := range a.results(t) {
			ids = append(ids, r["id"].(string))
		}
		next, _ := a.body["page"].(map[string]any)["next_token"].(string)
		if token = next; token != "" {
			if other := search("alice", token); other.status != http.StatusBadRequest {
				t.Errorf("token of another search: got status %d, want 400", other.status)
			}
		}
	}
	if !slices.IsSorted(ids) || len(slices.Compact(ids)) != len(ids) || pages != (len(ids)+2)/3 || pages < 2 {
		t.Errorf("got %v on %d pages", ids, pages)
	}
}
