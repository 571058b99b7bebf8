package httpserve_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gatehouse-authz/gatehouse/authztest"
	"github.com/gatehouse-authz/gatehouse/httpserve"
	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// lists is a server of permission lists, and what it asks.
type lists struct {
	*httpserve.Server
	pool      *tenants.Pool
	source    *authztest.Memory
	questions atomic.Int64 // that were decided

	mu   sync.Mutex
	gate chan struct{} // what Decide waits for; nil: nothing; guarded by mu
}

// Decide counts, and waits at the gate.
func (s *lists) Decide(ctx context.Context, id tenants.ID, questions []tenants.Question, answer func(int, tenants.Answer)) error {
	s.mu.Lock()
	gate := s.gate
	s.mu.Unlock()
	if gate != nil {
		select {
		case <-gate:
		case <-ctx.Done():
		}
	}
	s.questions.Add(int64(len(questions)))
	return s.pool.Decide(ctx, id, questions, answer)
}

func (s *lists) View(ctx context.Context, id tenants.ID) (*tenants.View, error) {
	return s.pool.View(ctx, id)
}

// hold has each Decide wait until release is called.
func (s *lists) hold() (release func()) {
	gate := make(chan struct{})
	s.mu.Lock()
	s.gate = gate
	s.mu.Unlock()
	return func() {
		s.mu.Lock()
		s.gate = nil
		s.mu.Unlock()
		close(gate)
	}
}

func listServer(t testing.TB, bundle, config string, cfg httpserve.Config, change func(*tenants.Settings)) *lists {
	t.Helper()
	s := new(lists)
	var told atomic.Pointer[httpserve.Server]
	s.pool, s.source = poolOf(t, tenants.Config{Activated: func(id tenants.ID) {
		if web := told.Load(); web != nil {
			web.Activated(id)
		}
	}}, bundle, config, change)
	cfg.Pool, cfg.Inputs, cfg.Local = s, realInputs(t), true
	s.Server = server(t, cfg)
	told.Store(s.Server)
	return s
}

// update makes text the tenant's bundle; it decides when update returns.
func (s *lists) update(t testing.TB, text string) {
	t.Helper()
	s.source.Set("orders", text)
	if err := s.pool.Refresh(context.Background(), "orders"); err != nil {
		t.Fatal(err)
	}
}

// get asks for a list.
func (s *lists) get(token string, header ...string) *httptest.ResponseRecorder {
	return s.ask("", token, header...)
}

func (s *lists) ask(below, token string, header ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest("GET", "http://localhost/t/orders/v1/me/permissions"+below, nil)
	if token != "" {
		r.Header.Set("Authorization", "Bearer "+token)
	}
	for i := 0; i < len(header); i += 2 {
		r.Header.Add(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	s.ServeHTTP(w, r)
	return w
}

// listed is a list as it is sent.
type listed struct {
	Version     string
	Tenant      string
	Subject     struct{ Type, ID string }
	Revision    string
	Incomplete  bool
	Reasons     map[string]map[string]string
	Permissions map[string][]string
}

func listIn(t testing.TB, w *httptest.ResponseRecorder) *listed {
	t.Helper()
	l := new(listed)
	if err := json.Unmarshal(w.Body.Bytes(), l); w.Code != 200 || err != nil {
		t.Fatalf("got %d, %s, %v", w.Code, w.Body, err)
	}
	return l
}

// tokenOf is the token of a user of usersConfig.
func tokenOf(user string) string { return "token-of-the-user-" + user }

func usersConfig(permissions string, users ...string) string {
	var b strings.Builder
	b.WriteString("permissions: " + permissions + "\nauth:\n  tokens:\n")
	for _, u := range users {
		fmt.Fprintf(&b, "    - {subject: %s, type: user, token: %s}\n", u, tokenOf(u))
	}
	return b.String()
}

const roles = `package permissions

catalog := data.catalog

allow if data.grants[input.subject.id][input.resource.type][input.action.name]
-- envoy.rego --
package envoy.authz

http := input.attributes.request.http

user := substring(http.headers.authorization, count("Bearer token-of-the-user-"), -1)

allow := {"allowed": true} if data.requests[user][http.method][concat("/", input.parsed_path)]
-- .manifest --
{"revision": "%s"}
-- data.json --
%s
`

// For every user and pair of a catalogue the list says what the entry point that
// enforces answers.
func TestListIsEnforced(t *testing.T) {
	users := []string{"ada", "ben", "cy", "dee"}
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			r := rand.New(rand.NewPCG(seed, 1))
			catalog := map[string][]any{}
			grants := map[string]map[string]map[string]bool{}
			requests := map[string]map[string]map[string]bool{}
			for _, u := range users {
				grants[u], requests[u] = map[string]map[string]bool{}, map[string]map[string]bool{}
			}
			for i := range 1 + r.IntN(6) {
				kind := fmt.Sprintf("type %d", i)
				for j := range r.IntN(8) {
					action := fmt.Sprintf("a%d", j)
					method, path := []string{"GET", "POST"}[r.IntN(2)], fmt.Sprintf("x/%d/%d", i, r.IntN(4))
					plain := r.IntN(2) == 0
					if plain {
						catalog[kind] = append(catalog[kind], action)
					} else {
						catalog[kind] = append(catalog[kind], map[string]string{"action": action, "method": method, "path": "/" + path})
					}
					for _, u := range users {
						switch g := grants[u]; {
						case r.IntN(2) == 0:
						case plain && g[kind] == nil:
							g[kind] = map[string]bool{action: true}
						case plain:
							g[kind][action] = r.IntN(4) > 0
						case requests[u][method] == nil:
							requests[u][method] = map[string]bool{path: true}
						default:
							requests[u][method][path] = true
						}
					}
				}
			}
			data, err := json.Marshal(map[string]any{"catalog": catalog, "grants": grants, "requests": requests})
			if err != nil {
				t.Fatal(err)
			}
			dry := seed%4 == 3
			s := listServer(t, fmt.Sprintf(roles, "1", data), usersConfig("{package: permissions}", users...), httpserve.Config{},
				func(s *tenants.Settings) { s.DryRun = dry })
			for _, u := range users {
				got := listIn(t, s.get(tokenOf(u)))
				if got.Incomplete {
					t.Fatalf("got %+v, want a whole list", got)
				}
				for kind, actions := range catalog {
					for _, one := range actions {
						want := false
						action, plain := one.(string)
						q := tenants.Question{DecisionID: "x", Entry: "permissions/allow", Own: true, Input: authztest.Input(
							fmt.Sprintf(`{"subject":{"type":"user","id":%q},"action":{"name":%q},"resource":{"type":%q}}`, u, action, kind))}
						if !plain {
							request := one.(map[string]string)
							action = request["action"]
							q = tenants.Question{DecisionID: "x", Input: realInputs(t)(&httpserve.CheckedRequest{
								Method: request["method"], Path: request["path"],
								Headers: []policy.Header{{Name: "authorization", Value: "Bearer " + tokenOf(u)}},
							}, "x")}
						}
						err := s.pool.Decide(t.Context(), "orders", []tenants.Question{q}, func(_ int, a tenants.Answer) {
							want = a.Err == nil && (a.Decision.Allowed || !plain && a.DryRun)
						})
						if err != nil {
							t.Fatal(err)
						}
						if listed := slices.Contains(got.Permissions[kind], action); listed != want {
							t.Errorf("%s may %s %s: got %t, want %t", u, action, kind, listed, want)
						}
					}
				}
				for kind, actions := range got.Permissions {
					if !slices.IsSorted(actions) || catalog[kind] == nil {
						t.Errorf("got %v of %q, want what the catalogue has, sorted", actions, kind)
					}
				}
			}
		})
	}
}

const versions = `package permissions

catalog := {"v": [sprintf("v%%d", [data.version]), "always"]}

allow if {
	input.action.name != "always"
	data.version %% 2 == 0
}

allow if input.action.name == "always"
-- .manifest --
{"revision": "%[1]d"}
-- data.json --
{"version": %[1]d}
`

// Equal lists have equal tags, and what a client has is neither sent nor evaluated
// again.
func TestListTags(t *testing.T) {
	config := usersConfig("{package: permissions}", "ada", "ben")
	s := listServer(t, fmt.Sprintf(versions, 2), config, httpserve.Config{}, nil)
	w := s.get(tokenOf("ada"))
	first, tag := listIn(t, w), w.Header().Get("ETag")
	asked := s.questions.Load()
	if asked != 3 || len(tag) < 10 || strings.HasPrefix(tag, "W/") {
		t.Fatalf("got %d questions and ETag %s, want the catalogue, its 2 pairs, and a strong tag", asked, tag)
	}
	for _, match := range []string{tag, "W/" + tag, `"x", ` + tag, "*", strings.TrimSuffix(tag, `"`) + `-gzip"`} {
		w := s.get(tokenOf("ada"), "If-None-Match", match)
		if w.Code != 304 || w.Body.Len() > 0 || w.Header().Get("ETag") == "" || w.Header().Get("Content-Type") != "" ||
			w.Header().Get("Cache-Control") != "private, no-cache" || w.Header().Get("Vary") == "" {
			t.Errorf("If-None-Match %s: got %d, %v", match, w.Code, w.Header())
		}
	}
	if w := s.get(tokenOf("ada"), "If-None-Match", `"x"`); w.Code != 200 || w.Header().Get("ETag") != tag {
		t.Errorf("another tag: got %d", w.Code)
	}
	if got := s.questions.Load(); got != asked {
		t.Errorf("got %d questions more for a list that is remembered", got-asked)
	}
	if w := s.get(tokenOf("ben"), "If-None-Match", tag); w.Code != 200 || w.Header().Get("ETag") == tag {
		t.Errorf("ben with ada's tag: got %d, want a list of his own", w.Code)
	}
	// Another process, and another tag only where the bytes are others.
	again := listServer(t, fmt.Sprintf(versions, 2), config, httpserve.Config{}, nil)
	if got := again.get(tokenOf("ada")).Header().Get("ETag"); got != tag {
		t.Errorf("another process has ETag %s, want %s", got, tag)
	}
	s.update(t, strings.Replace(fmt.Sprintf(versions, 2), `"revision": "2"`, `"revision": "two"`, 1))
	w = s.get(tokenOf("ada"), "If-None-Match", tag)
	if next := listIn(t, w); next.Revision != "two" || next.Version != first.Version {
		t.Errorf("got %+v after a revision that says the same, want version %s", next, first.Version)
	}
	s.update(t, fmt.Sprintf(versions, 3))
	if next := listIn(t, s.get(tokenOf("ada"), "If-None-Match", tag)); next.Version == first.Version || len(next.Permissions["v"]) != 1 {
		t.Errorf("got %+v after a revision that says other things", next)
	}
}

// What is compressed has a tag of its own.
func TestListGzip(t *testing.T) {
	actions := make([]string, 200)
	for i := range actions {
		actions[i] = strconv.Itoa(i + 1000)
	}
	data, _ := json.Marshal(map[string]any{"types": map[string]any{"x": actions}})
	s := listServer(t, "package permissions\n\nlist := data.types\n-- data.json --\n"+string(data), usersConfig("{package: permissions}", "ada"), httpserve.Config{}, nil)
	plain, zipped := s.get(tokenOf("ada")), s.get(tokenOf("ada"), "Accept-Encoding", "gzip")
	zr, err := gzip.NewReader(zipped.Body)
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(zr)
	if err != nil || !bytes.Equal(text, plain.Body.Bytes()) {
		t.Errorf("got another text compressed: %v", err)
	}
	if a, b := plain.Header().Get("ETag"), zipped.Header().Get("ETag"); a == b || !strings.HasSuffix(b, `-gzip"`) {
		t.Errorf("got ETag %s, compressed %s", a, b)
	}
	if got := zipped.Header().Values("Vary"); !strings.Contains(strings.Join(got, ","), "Accept-Encoding") {
		t.Errorf("got Vary %v", got)
	}
}

// sharedCache stores what its headers let a cache store, for all who ask.
type sharedCache struct {
	next    http.Handler
	private bool // it stores what is private, which it must not
	stored  []cached
}

type cached struct {
	vary map[string]string // :: name → value of the request
	resp *http.Response
	body []byte
}

func (c *sharedCache) get(t *testing.T, token string) []byte {
	r := httptest.NewRequest("GET", "http://localhost/t/orders/v1/me/permissions", nil)
	r.Header.Set("Authorization", "Bearer "+token)
	var hit *cached
	for i := range c.stored {
		fits := true
		for name, value := range c.stored[i].vary {
			fits = fits && r.Header.Get(name) == value
		}
		if fits {
			hit = &c.stored[i]
			r.Header.Set("If-None-Match", hit.resp.Header.Get("ETag")) // no-cache
		}
	}
	w := httptest.NewRecorder()
	c.next.ServeHTTP(w, r)
	if w.Code == http.StatusNotModified {
		if hit == nil {
			t.Fatal("304 for what is not stored")
		}
		return hit.body
	}
	control := w.Header().Get("Cache-Control")
	if !strings.Contains(control, "no-cache") {
		t.Fatalf("Cache-Control %q lets a cache answer unasked", control)
	}
	if !strings.Contains(control, "private") || c.private {
		one := cached{vary: map[string]string{}, resp: w.Result(), body: w.Body.Bytes()}
		for _, list := range w.Header().Values("Vary") {
			for name := range strings.SplitSeq(list, ",") {
				one.vary[strings.TrimSpace(name)] = r.Header.Get(strings.TrimSpace(name))
			}
		}
		c.stored = append(c.stored, one)
	}
	return w.Body.Bytes()
}

// A cache between two users never gives one the other's list: not one that keeps
// what is private, and not one that heeds no Vary either.
func TestListBehindCache(t *testing.T) {
	s := listServer(t, fmt.Sprintf(versions, 2), usersConfig("{package: permissions}", "ada", "ben"), httpserve.Config{}, nil)
	for name, c := range map[string]*sharedCache{
		"good":          {next: s},
		"keeps private": {next: s, private: true},
		"heeds no vary": {next: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			s.ServeHTTP(w, r)
			w.Header().Del("Vary")
		}), private: true},
	} {
		for i := range 12 {
			user := []string{"ada", "ben"}[i*i%3%2]
			if got := string(c.get(t, tokenOf(user))); !strings.Contains(got, `"id":"`+user+`"`) {
				t.Errorf("%s: %s has got %s", name, user, got)
			}
		}
		if name == "good" && len(c.stored) > 0 {
			t.Errorf("a shared cache has stored %d lists", len(c.stored))
		}
	}
}

// A list is of one revision, and never of one from before the request, whatever is
// activated meanwhile.
func TestListRevision(t *testing.T) {
	s := listServer(t, fmt.Sprintf(versions, 0), usersConfig("{package: permissions}", "ada", "ben", "cy"), httpserve.Config{}, nil)
	s.get(tokenOf("ada")) // it is loaded
	ctx, stop := context.WithTimeout(t.Context(), 2*time.Second)
	defer stop()
	var newest atomic.Int64
	var work sync.WaitGroup
	work.Go(func() {
		for version := int64(1); ctx.Err() == nil; version++ {
			s.update(t, fmt.Sprintf(versions, version))
			newest.Store(version)
			select {
			case <-time.After(50 * time.Millisecond):
			case <-ctx.Done():
			}
		}
	})
	var lists atomic.Int64
	for _, user := range []string{"ada", "ada", "ben", "cy"} {
		work.Go(func() {
			tag, last := "", (*listed)(nil)
			for ctx.Err() == nil {
				least := newest.Load()
				w := s.get(tokenOf(user), "If-None-Match", tag)
				if w.Code == 503 && strings.Contains(w.Body.String(), "changes while it is asked") {
					continue
				}
				l := last
				if w.Code != 304 {
					l = listIn(t, w)
					tag, last = w.Header().Get("ETag"), l
				}
				lists.Add(1)
				version, err := strconv.ParseInt(l.Revision, 10, 64)
				want := []string{"always"}
				if version%2 == 0 {
					want = append(want, fmt.Sprintf("v%d", version))
				}
				if err != nil || version < least || !slices.Equal(l.Permissions["v"], want) || l.Subject.ID != user {
					t.Errorf("%s has got %+v, want %v of revision %d or later", user, l, want, least)
					return
				}
			}
		})
	}
	work.Wait()
	if newest.Load() < 10 || lists.Load() < 100 {
		t.Errorf("got %d revisions and %d lists, too few to show anything", newest.Load(), lists.Load())
	}
}

// Right after a revision the lists of those who have asked are computed, and not
// when they ask again.
func TestListPrecomputed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := listServer(t, fmt.Sprintf(versions, 1), usersConfig("{package: permissions}", "ada", "ben"), httpserve.Config{}, nil)
		s.get(tokenOf("ada"))
		s.get(tokenOf("ben"))
		s.update(t, fmt.Sprintf(versions, 2))
		synctest.Wait()
		asked := s.questions.Load()
		for _, user := range []string{"ada", "ben"} {
			if l := listIn(t, s.get(tokenOf(user))); l.Revision != "2" || len(l.Permissions["v"]) != 2 {
				t.Errorf("%s: got %+v", user, l)
			}
		}
		if got := s.questions.Load(); got != asked || asked != 3+2+3+2 {
			t.Errorf("got %d questions before and %d after they ask again, want 10 and none", asked, got-asked)
		}
		// Who has not asked for long is not in use.
		time.Sleep(5 * time.Minute)
		s.get(tokenOf("ben"))
		s.update(t, fmt.Sprintf(versions, 3))
		synctest.Wait()
		if _, lists, _ := s.Remembered(); lists != 1 {
			t.Errorf("got %d lists, want ben's", lists)
		}
	})
}

// However many wait, a list is computed once; each waits as long as it may itself.
func TestListOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := listServer(t, fmt.Sprintf(versions, 2), usersConfig("{package: permissions}", "ada"), httpserve.Config{}, nil)
		s.get(tokenOf("ada"))
		s.source.Set("orders", fmt.Sprintf(versions, 4))
		release := s.hold()
		if err := s.pool.Refresh(t.Context(), "orders"); err != nil {
			t.Fatal(err)
		}
		before := s.questions.Load()
		var waiting sync.WaitGroup
		for range 50 {
			waiting.Go(func() {
				if l := listIn(t, s.get(tokenOf("ada"))); l.Revision != "4" {
					t.Errorf("got %+v", l)
				}
			})
		}
		start := time.Now()
		if w := s.get(tokenOf("ada"), "X-Request-Timeout", "0.2"); w.Code != 503 || time.Since(start) != 200*time.Millisecond || w.Header().Get("Retry-After") == "" {
			t.Errorf("who has 200 ms got %d after %s: %s", w.Code, time.Since(start), w.Body)
		}
		synctest.Wait()
		release()
		waiting.Wait()
		if got := s.questions.Load() - before; got != 3 {
			t.Errorf("got %d questions, want the catalogue and its 2 pairs once", got)
		}
		// Nobody waits: nothing goes on.
		s.source.Set("orders", fmt.Sprintf(versions, 5))
		release = s.hold()
		defer release()
		if err := s.pool.Refresh(t.Context(), "orders"); err != nil {
			t.Fatal(err)
		}
	})
}

const secret = "0123456789abcdef0123456789abcdef"

const jwtUsers = `
permissions: {package: permissions}
auth: {jwt: {issuer: "https://issuer.example.com", audiences: [orders], secret: "` + secret + `"}}
`

func token(t testing.TB, changes ...string) string {
	return sign(t, []byte(secret), "HS256", `{"alg":"HS256"}`, claims(changes...))
}

// Two tokens of one subject have one list where the policy cannot read what they
// differ in, and two where it can; a list does not outlive its token.
func TestListTokens(t *testing.T) {
	const byRole = `package permissions

catalog := {"x": ["a", "b"]}

allow if input.action.name in input.subject.claims.roles
`
	const byID = byRole + `
allow if input.subject.claims.jti == "2"
`
	synctest.Test(t, func(t *testing.T) {
		s := listServer(t, byRole, jwtUsers, httpserve.Config{}, nil)
		soon := func(d time.Duration) string { return strconv.FormatInt(time.Now().Add(d).Unix(), 10) }
		one := token(t, "jti", `"1"`, "roles", `["a"]`, "exp", soon(time.Minute))
		two := token(t, "jti", `"2"`, "roles", `["a"]`, "exp", soon(time.Hour))
		other := token(t, "roles", `["b"]`, "exp", soon(time.Hour))
		w := s.get(one)
		first := listIn(t, w)
		expires, err := http.ParseTime(w.Header().Get("Expires"))
		if err != nil || expires.Unix() != time.Now().Add(time.Minute).Unix() {
			t.Errorf("got Expires %v, %v", expires, err)
		}
		asked := s.questions.Load()
		if l := listIn(t, s.get(two)); l.Version != first.Version || s.questions.Load() != asked {
			t.Errorf("got %+v, and %d more questions, for another token of the subject", l, s.questions.Load()-asked)
		}
		if l := listIn(t, s.get(other)); !slices.Equal(l.Permissions["x"], []string{"b"}) {
			t.Errorf("got %+v for a token with another role", l)
		}
		time.Sleep(91 * time.Second) // with the leeway between two clocks
		if w := s.get(one); w.Code != 401 {
			t.Errorf("expired: got %d", w.Code)
		}
		asked = s.questions.Load()
		if s.get(two); s.questions.Load() != asked {
			t.Error("the list ended with the first of two tokens")
		}
		s.update(t, byID)
		if l := listIn(t, s.get(two)); len(l.Permissions["x"]) != 2 {
			t.Errorf("got %+v, want all for token 2", l)
		}
		three := token(t, "jti", `"3"`, "roles", `["a"]`, "exp", soon(time.Minute))
		if l := listIn(t, s.get(three)); len(l.Permissions["x"]) != 1 {
			t.Errorf("got %+v, want what token 3 is for", l)
		}
		time.Sleep(61 * time.Second)
		s.update(t, byRole)
		synctest.Wait()
		if _, lists, _ := s.Remembered(); lists != 0 {
			t.Errorf("got %d lists after all have expired or moved, want none", lists)
		}
	})
}

// Lists that follow from the time are not remembered for long.
func TestListVaries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := listServer(t, `package permissions

catalog := {"x": ["early", "late"]}

late := time.now_ns() > data.noon

allow if { input.action.name == "late"; late }
allow if { input.action.name == "early"; not late }
-- data.json --
{"noon": `+strconv.FormatInt(time.Now().Add(time.Minute).UnixNano(), 10)+`}
`, usersConfig("{package: permissions}", "ada"), httpserve.Config{}, nil)
		if l := listIn(t, s.get(tokenOf("ada"))); l.Permissions["x"][0] != "early" {
			t.Errorf("got %+v", l)
		}
		asked := s.questions.Load()
		if s.get(tokenOf("ada")); s.questions.Load() != asked {
			t.Error("it is not remembered at all")
		}
		time.Sleep(time.Minute + 5*time.Second)
		if l := listIn(t, s.get(tokenOf("ada"))); l.Permissions["x"][0] != "late" {
			t.Errorf("got %+v after noon", l)
		}
	})
}

// What is remembered stays within its bounds, of a tenant and of all.
func TestListMemory(t *testing.T) {
	users := make([]string, 300)
	for i := range users {
		users[i] = fmt.Sprintf("user%03d", i)
	}
	for name, c := range map[string]struct {
		permissions string
		all         int64
		limit       int64
	}{
		"tenant": {"{package: permissions, memory_bytes: 100000}", 0, 100_000},
		"all":    {"{package: permissions}", 50_000, 50_000},
	} {
		s := listServer(t, fmt.Sprintf(versions, 2), usersConfig(c.permissions, users...), httpserve.Config{ListMemory: c.all}, nil)
		for round := range 2 {
			for _, u := range users {
				if l := listIn(t, s.get(tokenOf(u))); l.Subject.ID != u {
					t.Fatalf("%s has got %+v", u, l)
				}
				if bytes, _, _ := s.Remembered(); bytes > c.limit {
					t.Fatalf("%s: got %d bytes, limit %d", name, bytes, c.limit)
				}
			}
			if _, lists, _ := s.Remembered(); lists < 10 || lists > 100 {
				t.Errorf("%s, round %d: got %d lists", name, round, lists)
			}
		}
		asked := s.questions.Load()
		if s.get(tokenOf(users[len(users)-1])); s.questions.Load() != asked {
			t.Errorf("%s: who has asked last was forgotten", name)
		}
	}
}

// Regression: a list for which there is no room at all was answered with 500.
func TestListNoRoom(t *testing.T) {
	for name, c := range map[string]struct {
		permissions string
		all         int64
	}{
		"tenant": {"{package: permissions, memory_bytes: 1024}", 0},
		"all":    {"{package: permissions}", 1},
	} {
		s := listServer(t, fmt.Sprintf(versions, 2), usersConfig(c.permissions, "ada"), httpserve.Config{ListMemory: c.all}, nil)
		for range 2 {
			if l := listIn(t, s.get(tokenOf("ada"))); l.Subject.ID != "ada" {
				t.Errorf("%s: got %+v", name, l)
			}
		}
		if bytes, lists, _ := s.Remembered(); bytes != 0 || lists != 0 {
			t.Errorf("%s: got %d bytes and %d lists", name, bytes, lists)
		}
	}
}

// A catalogue over a bound is refused, with the bound, and nothing is asked.
func TestCatalogueBounds(t *testing.T) {
	many := func(n int, one func(i int) string) string {
		parts := make([]string, n)
		for i := range parts {
			parts[i] = one(i)
		}
		return strings.Join(parts, ",")
	}
	quoted := func(prefix string) func(int) string {
		return func(i int) string { return fmt.Sprintf(`"%s%d"`, prefix, i) }
	}
	for name, c := range map[string]struct{ catalog, want string }{
		"types":       {"{" + many(1001, func(i int) string { return fmt.Sprintf(`"t%d":[]`, i) }) + "}", "more than 1000 types"},
		"actions":     {`{"x":[` + many(1001, quoted("a")) + `]}`, "more than 1000 actions"},
		"pairs":       {`{"x":[` + many(15, quoted("a")) + `],"y":[` + many(6, quoted("a")) + `]}`, "more than 20 pairs"},
		"name":        {`{"x":["` + strings.Repeat("a", 257) + `"]}`, "1 to 256 bytes"},
		"no name":     {`{"":[]}`, "1 to 256 bytes"},
		"control":     {`{"x":["a\nb"]}`, "1 to 256 bytes"},
		"twice":       {`{"x":["a",{"action":"a","method":"GET","path":"/"}]}`, "one action twice"},
		"half":        {`{"x":[{"action":"a","method":"GET"}]}`, "one of method and path"},
		"no path":     {`{"x":[{"action":"a","method":"GET","path":"x"}]}`, "begin with /"},
		"long path":   {`{"x":[{"action":"a","method":"GET","path":"/` + strings.Repeat("a", 2048) + `"}]}`, "2048 bytes"},
		"method":      {`{"x":[{"action":"a","method":"G T","path":"/"}]}`, "not one of HTTP"},
		"no object":   {`[]`, "not an object"},
		"no list":     {`{"x":{"a":true}}`, "not a list"},
		"wrong":       {`{"x":[1]}`, "1 to 256 bytes"},
		"not defined": {`false`, "not an object"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := listServer(t, "package permissions\n\ncatalog := data.c\n\nallow := true\n-- data.json --\n{\"c\":"+c.catalog+"}",
				usersConfig("{package: permissions, pairs: 20}", "ada"), httpserve.Config{}, nil)
			w := s.get(tokenOf("ada"))
			if w.Code != 500 || !strings.Contains(w.Body.String(), c.want) || !strings.Contains(w.Body.String(), "invalid_catalog") {
				t.Errorf("got %d, %s", w.Code, w.Body)
			}
			if got := s.questions.Load(); got != 1 {
				t.Errorf("got %d questions, want that for the catalogue", got)
			}
		})
	}
}

// A list over its bound is refused.
func TestListBytes(t *testing.T) {
	s := listServer(t, `package permissions

list := {sprintf("%s%d", [n, i]): [sprintf("%s%d", [n, j]) | some j in numbers.range(1, 40)] | some i in numbers.range(1, 140)}

n := concat("", ["xxxxxxxxxx" | some i in numbers.range(1, 24)])
`, usersConfig("{package: permissions, pairs: 10000}", "ada"), httpserve.Config{}, func(s *tenants.Settings) { s.Limits.EvaluationTime = 10 * time.Second })
	if w := s.get(tokenOf("ada")); w.Code != 500 || !strings.Contains(w.Body.String(), "larger than 1048576 bytes") {
		t.Errorf("got %d, %.200s", w.Code, w.Body)
	}
}

// What cannot be known now is asked again soon, and a list with nothing known is
// none: the client keeps what it has.
func TestListBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := listServer(t, fmt.Sprintf(versions, 2), usersConfig("{package: permissions}", "ada"), httpserve.Config{}, nil)
		s.get(tokenOf("ada"))
		s.update(t, fmt.Sprintf(versions, 4))
		synctest.Wait()
		s.source.Set("orders", fmt.Sprintf(versions, 6))
		release := s.hold()
		if err := s.pool.Refresh(t.Context(), "orders"); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		if w := s.get(tokenOf("ada")); w.Code != 503 || w.Header().Get("Retry-After") == "" || time.Since(start) > 10*time.Second {
			t.Errorf("got %d after %s", w.Code, time.Since(start))
		}
		release()
		synctest.Wait()
		if l := listIn(t, s.get(tokenOf("ada"))); l.Revision != "6" || l.Incomplete {
			t.Errorf("got %+v", l)
		}
	})
}

// The operator's own policy counts in lists, too, and its revisions.
func TestListGuard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		guarded := new(authztest.Memory)
		const guard = "package guard\n\nallow if not input.action\n\nallow if not input.action.name in data.never\n-- data.json --\n{\"never\": [%s]}"
		guarded.Set("guard", fmt.Sprintf(guard, `"v2"`))
		guardSettings, err := authztest.Settings(guarded, func(_ tenants.ID, s *tenants.Settings) { s.Entry = "guard/allow" })("guard")
		if err != nil {
			t.Fatal(err)
		}
		source := new(authztest.Memory)
		source.Set("orders", fmt.Sprintf(versions, 2))
		h := offers(t, usersConfig("{package: permissions}", "ada"))
		var web atomic.Pointer[httpserve.Server]
		p := authztest.Pool(t, tenants.Config{
			Guard:     guardSettings,
			Settings:  authztest.Settings(source, func(_ tenants.ID, s *tenants.Settings) { s.HTTP = h }),
			Activated: func(id tenants.ID) { web.Load().Activated(id) },
		})
		s := &lists{pool: p}
		s.Server = server(t, httpserve.Config{Pool: s, Local: true})
		web.Store(s.Server)
		synctest.Wait()
		if l := listIn(t, s.get(tokenOf("ada"))); !slices.Equal(l.Permissions["v"], []string{"always"}) || l.Incomplete {
			t.Errorf("got %+v", l)
		}
		guarded.Set("guard", fmt.Sprintf(guard, `"always"`))
		time.Sleep(3 * time.Second) // it is polled every second
		if l := listIn(t, s.get(tokenOf("ada"))); !slices.Equal(l.Permissions["v"], []string{"v2"}) {
			t.Errorf("got %+v after the operator's policy has changed", l)
		}
	})
}
