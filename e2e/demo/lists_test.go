package main

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

// For each user and each pair of the catalogues that stands for a request, the
// permission list says what the real Envoy does with that request: whoever has
// which roles, whichever way the credential is sent, and whatever else is.
func TestLists(t *testing.T) {
	s, err := build(t.Context(), options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Stop()
	catalogs := map[string]map[string][]pair{}
	for _, team := range deskTeams {
		catalogs[team] = catalogOf(t, filepath.Join(s.teams.dir, team))
	}
	users := append(slices.Clone(deskUsers), "nobody", "manager")
	expires := time.Now().Add(sessionTime).Unix()
	asked := map[bool]int{} // :: what was enforced → how often

	roles := map[string][]string{"orders": {"auditor", "clerk", "manager"}, "storefront": {"merchandiser"}}
	const seed = 6
	random := rand.New(rand.NewPCG(seed, seed))
	for round := range 4 { // the first is with the roles that they have
		for team, names := range roles {
			for _, user := range deskUsers {
				for _, role := range names {
					if round > 0 {
						if err := s.teams.grant(team, user, role, random.IntN(2) == 0); err != nil {
							t.Fatal(err)
						}
					}
				}
			}
			refresh(t, s, team)
		}
		for _, user := range users {
			for team, types := range catalogs {
				for _, headers := range [][]string{
					{"cookie: " + sessionCookie + "=" + sessionOf(user, expires)},
					{"authorization: Bearer " + sessionOf(user, expires), "x-user: alice", "accept-language: de"},
				} {
					list := listOf(t, s, team, headers)
					for kind, pairs := range types {
						for _, p := range pairs {
							want := enforced(t, s, p, headers)
							asked[want]++
							if got := slices.Contains(list[kind], p.action); got != want {
								t.Errorf("round %d of seed %d: %s of %s for %s, roles %v: the list says %v, Envoy %v",
									round, seed, p.action, kind, user, rolesOf(t, s, team)[user], got, want)
							}
						}
					}
				}
			}
		}
	}
	if asked[true] < 50 || asked[false] < 50 {
		t.Errorf("requests allowed and denied: %v, want many of both", asked)
	}
}

// pair is an action that stands for a request.
type pair struct{ action, method, path string }

// catalogOf asks OPA for the pairs of a team's catalogue that stand for requests.
func catalogOf(t *testing.T, folder string) map[string][]pair {
	t.Helper()
	opa, err := stage.Tool("opa")
	if err != nil {
		t.Fatal(err)
	}
	text, err := exec.Command(opa, "eval", "--format=raw", "--data", folder, "data.permissions.catalog").Output()
	if err != nil {
		t.Fatal(err)
	}
	var catalog map[string][]json.RawMessage
	if err := json.Unmarshal(text, &catalog); err != nil {
		t.Fatal(err)
	}
	pairs := map[string][]pair{}
	for kind, actions := range catalog {
		for _, a := range actions {
			var p struct{ Action, Method, Path string }
			if json.Unmarshal(a, &p) == nil { // else it is a name alone
				pairs[kind] = append(pairs[kind], pair{p.Action, p.Method, p.Path})
			}
		}
	}
	if len(pairs) == 0 {
		t.Fatalf("the catalogue %s names no requests", text)
	}
	return pairs
}

// refresh returns when gatehouse has the team's policy of now.
func refresh(t *testing.T, s *set, team string) {
	t.Helper()
	resp, err := http.Post(fmt.Sprintf("http://%s/tenants/%s/refresh", s.gatehouse.Admin, team), "", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		t.Fatalf("refreshing %s: status %d", team, resp.StatusCode)
	}
}

// listOf asks for a permission list.
func listOf(t *testing.T, s *set, team string, headers []string) map[string][]string {
	t.Helper()
	resp := do(t, s, stage.Request{Path: "/t/" + team + "/v1/me/permissions", Headers: headers})
	var list struct {
		Permissions map[string][]string
		Incomplete  bool
	}
	if err := json.Unmarshal([]byte(resp.Body), &list); err != nil || resp.Status != http.StatusOK || list.Incomplete {
		t.Fatalf("the list of %s: status %d, %s", team, resp.Status, resp.Body)
	}
	return list.Permissions
}

// enforced reports whether Envoy lets a request through to the desk.
func enforced(t *testing.T, s *set, p pair, headers []string) bool {
	t.Helper()
	resp := do(t, s, stage.Request{Method: p.method, Path: p.path, Headers: headers})
	reached := resp.Header.Get("X-Envoy-Upstream-Service-Time") != ""
	if denied := slices.Contains([]int{401, 403, 405}, resp.Status); denied == reached {
		t.Fatalf("%s %s: status %d, and it reached the desk: %v", p.method, p.path, resp.Status, reached)
	}
	return reached
}

func do(t *testing.T, s *set, r stage.Request) *stage.Response {
	t.Helper()
	resp, err := stage.Do(strings.TrimPrefix(s.DeskURL(), "http://"), r)
	if err != nil {
		t.Fatal(err)
	}
	return resp
}

func rolesOf(t *testing.T, s *set, team string) map[string][]string {
	t.Helper()
	roles, err := s.teams.roles(team)
	if err != nil {
		t.Fatal(err)
	}
	return roles
}
