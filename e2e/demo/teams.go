package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
)

// teams are the tenants of the demo: a folder of each, and the shelf where
// gatehouse fetches what is made from it.
type teams struct {
	dir   string
	shelf *shelf // nil: gatehouse reads the folders

	mu sync.Mutex // held while a folder changes
}

var (
	errTeam = errors.New("there is no such team")
	errUser = errors.New("there is no such user")
)

// newTeams copies the tenants of a folder to dir. The folder of the order desk's
// page lies among them, and is none.
func newTeams(from, dir string) (*teams, error) {
	if err := os.CopyFS(dir, os.DirFS(from)); err != nil {
		return nil, err
	}
	return &teams{dir: dir}, os.RemoveAll(filepath.Join(dir, "web"))
}

// roles returns the roles of each user of a team.
func (t *teams) roles(team string) (map[string][]string, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	data, err := t.data(team)
	if err != nil {
		return nil, err
	}
	all := map[string][]string{}
	for user := range data.users {
		if all[user], err = data.roles(user); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// grant gives a user a role or takes it away, and returns when the new bundle is
// where gatehouse fetches it.
func (t *teams) grant(team, user, role string, granted bool) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	data, err := t.data(team)
	if err != nil {
		return err
	}
	roles, err := data.roles(user)
	if err != nil {
		return err
	}
	if slices.Contains(roles, role) == granted {
		return nil
	}
	if roles = slices.DeleteFunc(roles, func(r string) bool { return r == role }); granted {
		roles = append(roles, role)
	}
	data.users[user].(map[string]any)["roles"] = roles
	text, err := json.MarshalIndent(data.all, "", "  ")
	if err != nil {
		return err
	}
	// It is there as a whole or not at all.
	next := filepath.Join(t.dir, ".data.json")
	if err := os.WriteFile(next, append(text, '\n'), 0o600); err != nil {
		return err
	}
	if err := os.Rename(next, filepath.Join(t.dir, team, "data.json")); err != nil || t.shelf == nil {
		return err
	}
	return t.shelf.upload(team)
}

// change says how to change the policy of a team.
func (t *teams) change(team string) string {
	if t.shelf == nil {
		return "Change a policy in " + t.dir
	}
	return t.shelf.change(team)
}

// teamData is what data.json of a team says.
type teamData struct{ all, users map[string]any }

func (t *teams) data(team string) (*teamData, error) {
	if !slices.Contains(deskTeams, team) {
		return nil, errTeam
	}
	text, err := os.ReadFile(filepath.Join(t.dir, team, "data.json"))
	if err != nil {
		return nil, err
	}
	d := &teamData{}
	if err := json.Unmarshal(text, &d.all); err != nil {
		return nil, fmt.Errorf("data.json of %s: %w", team, err)
	}
	d.users, _ = d.all["users"].(map[string]any) // nil: nobody
	return d, nil
}

func (d *teamData) roles(user string) ([]string, error) {
	entry, ok := d.users[user].(map[string]any)
	if !ok {
		return nil, errUser
	}
	list, _ := entry["roles"].([]any) // nil: none
	roles := []string{}
	for _, r := range list {
		if name, ok := r.(string); ok {
			roles = append(roles, name)
		}
	}
	return roles, nil
}
