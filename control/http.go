package control

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/gatehouse-authz/gatehouse/policy"
)

// HTTP is what a tenant offers over HTTP: plugins.gatehouse_http. Each part is
// off unless it is named. Nil: nothing is offered. It is never changed.
type HTTP struct {
	// Data are the entry points that single decisions and batches may ask.
	Data  []string
	Batch Batch

	Permissions *Permissions // permission lists; nil: none
	AuthZEN     *AuthZEN     // nil: none

	Check string // the entry point of forward-auth, by default that of Envoy; "": none
	Serve string // the one that writes HTTP responses; "": none

	// Auth says who may ask.
	Auth Auth

	// Origins are those whose pages may ask from a browser, exactly as it names
	// them.
	Origins []string

	identity string
}

// Batch bounds the batches of a tenant.
type Batch struct {
	Items int           // in one batch; default 1,000
	Bytes int64         // of one batch, expanded; default 4 MiB
	Time  time.Duration // for one batch; default 10 s
}

// Permissions are where permission lists come from: the entry points of rules in
// one package, and what they may take.
type Permissions struct {
	Package              string
	Catalog, Allow, List string

	Pairs   int   // of a type and an action in one catalogue; default 1,000
	Memory  int64 // bytes of lists that are remembered; default 4 MiB
	Streams int   // of events at once; default 1,000

	SubjectStreams int // those of one subject; default 10
}

// AuthZEN are the entry points of the rules that answer AuthZEN's requests.
type AuthZEN struct {
	Package                             string
	Allow, Subjects, Resources, Actions string
}

// Entries are the entry points that it asks, each of which the policy may have
// or not.
func (h *HTTP) Entries() []string {
	if h == nil {
		return nil
	}
	entries := append(slices.Clone(h.Data), h.Check, h.Serve)
	if p := h.Permissions; p != nil {
		entries = append(entries, p.Catalog, p.Allow, p.List)
	}
	if a := h.AuthZEN; a != nil {
		entries = append(entries, a.Allow, a.Subjects, a.Resources, a.Actions)
	}
	slices.Sort(entries)
	return slices.DeleteFunc(slices.Compact(entries), func(entry string) bool { return entry == "" })
}

// Identity is equal for two that say the same.
func (h *HTTP) Identity() string {
	if h == nil {
		return ""
	}
	return h.identity
}

// Open reports whether it answers callers of whom it cannot know who they are.
// Forward-auth is not open: it answers trusted peers alone.
func (h *HTTP) Open() bool {
	if h == nil || !h.Auth.None() {
		return false
	}
	return len(h.Data) > 0 || h.Permissions != nil || h.AuthZEN != nil || h.Serve != ""
}

// http reads what a tenant offers, whose Envoy entry point is entry.
func (r *reader) http(o object, entry string) *HTTP {
	h := &HTTP{Batch: r.batch(o.object("batch"))}
	for i, path := range o.list("data") {
		h.Data = append(h.Data, r.entry(fmt.Sprintf("%s[%d]", o.at("data"), i), path))
	}
	if o.has("permissions") {
		h.Permissions = r.permissions(o.object("permissions"))
	}
	if o.has("authzen") {
		h.AuthZEN = r.authZEN(o.object("authzen"))
	}
	h.Check = r.entryIn(o, "check", entry)
	h.Serve = r.entryIn(o, "serve", "")
	h.Auth = r.auth(o.object("auth"))
	h.Origins = r.cors(o.object("cors"))
	o.end()
	h.identity = identity(o.m)
	return h
}

// entryIn reads an object whose path is an entry point. "": there is none.
func (r *reader) entryIn(o object, key, def string) string {
	if !o.has(key) {
		return ""
	}
	part := o.object(key)
	defer part.end()
	return r.entry(part.at("path"), part.string("path", def))
}

func (r *reader) batch(o object) Batch {
	b := Batch{
		Items: int(o.count("items", 1000, 1, 100_000)),
		Bytes: o.count("bytes", 4<<20, 1, 1<<30),
		Time:  o.seconds("seconds", 10*time.Second),
	}
	if b.Time <= 0 {
		r.fault(o.at("seconds"), "is not more than 0")
	}
	o.end()
	return b
}

func (r *reader) permissions(o object) *Permissions {
	p := &Permissions{
		Package:        r.packageIn(o),
		Pairs:          int(o.count("pairs", 1000, 1, 100_000)),
		Memory:         o.count("memory_bytes", 4<<20, 1<<10, 1<<40),
		Streams:        int(o.count("streams", 1000, 0, 1_000_000)),
		SubjectStreams: int(o.count("subject_streams", 10, 0, 1_000_000)),
	}
	p.Catalog, p.Allow, p.List = p.Package+"/catalog", p.Package+"/allow", p.Package+"/list"
	o.end()
	return p
}

func (r *reader) authZEN(o object) *AuthZEN {
	a := &AuthZEN{Package: r.packageIn(o)}
	a.Allow, a.Subjects, a.Resources, a.Actions = a.Package+"/allow", a.Package+"/subjects", a.Package+"/resources", a.Package+"/actions"
	o.end()
	return a
}

// packageIn reads the path of a package, with slashes or dots.
func (r *reader) packageIn(o object) string {
	path, err := policy.ParseEntry(strings.ReplaceAll(o.string("package", ""), ".", "/"))
	if err != nil {
		r.fault(o.at("package"), "%s", err)
	}
	return path
}
