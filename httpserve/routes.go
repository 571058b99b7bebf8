package httpserve

import (
	"net/http"
	"slices"
	"strings"

	"github.com/gatehouse-authz/gatehouse/control"
)

// routes are what there is below /t/{tenant}. A path that ends with "/" stands
// for all that begins with it.
//
// They are found in the path as it was sent. http.ServeMux would redirect what it
// takes for another way to write a path, and a client's path is what is asked
// about.
var routes = []*route{
	{path: "/v1/data/", methods: methods("GET", "POST"), offered: offersData, form: opaForm, serve: (*Server).data},
	{path: "/v1/batch/data/", methods: methods("POST"), offered: offersData, form: opaForm, serve: (*Server).batch},
	{path: "/v1/me/permissions", methods: methods("GET", "HEAD"), offered: offersPermissions, serve: (*Server).permissionList},
	{path: "/v1/me/permissions/events", methods: methods("GET"), offered: offersPermissions, serve: (*Server).permissionEvents},
	{path: "/v1/me/permissions/check", methods: methods("POST"), offered: offersPermissions, content: jsonOnly, serve: (*Server).permissionCheck},
	{path: "/v1/permissions/catalog", methods: methods("GET", "HEAD"), offered: offersPermissions, serve: (*Server).permissionCatalog},
	{path: "/access/v1/evaluation", methods: methods("POST"), offered: offersAuthZEN, content: jsonOrInvalid, serve: (*Server).evaluation},
	{path: "/access/v1/evaluations", methods: methods("POST"), offered: offersAuthZEN, content: jsonOrInvalid, serve: (*Server).evaluations},
	{path: "/access/v1/search/subject", methods: methods("POST"), offered: offersAuthZEN, content: jsonOrInvalid, serve: searchSubjects.serve},
	{path: "/access/v1/search/resource", methods: methods("POST"), offered: offersAuthZEN, content: jsonOrInvalid, serve: searchResources.serve},
	{path: "/access/v1/search/action", methods: methods("POST"), offered: offersAuthZEN, content: jsonOrInvalid, serve: searchActions.serve},
	{path: "/check", offered: offersCheck, access: forPeers, foreign: true, closed: true, unready: true, serve: (*Server).check},
	{path: "/check/", offered: offersCheck, access: forPeers, foreign: true, closed: true, unready: true, serve: (*Server).check},
	{path: "/serve/", offered: offersServe, serve: (*Server).respond},
}

// route is one of the ways to ask a tenant.
type route struct {
	path    string
	methods []string                 // nil: any
	offered func(*control.HTTP) bool // whether the tenant offers it

	access  access  // who may ask; default: callers that are known
	content content // which bodies are taken; default: any
	form    form    // of its errors; default: an object "error"
	closed  bool    // a proxy may take an answer of 5xx for a permission: 403 in its place
	unready bool    // also for a tenant without a policy, as its on_error says
	foreign bool    // what comes from a page of a foreign origin is the policy's to judge: no CORS

	// serve answers the request, or returns why not: an error that failureOf
	// knows, before anything was written.
	serve func(s *Server, w http.ResponseWriter, r *request) error
}

// access says who may ask.
type access int

const (
	forCallers access = iota // who is known by what the tenant's auth says
	forPeers                 // the peers that the operator trusts
	forAll                   // anybody
)

// methods are those of a route. OPTIONS is always answered.
func methods(names ...string) []string { return names }

func (r *route) allows(method string) bool {
	return r.methods == nil || slices.Contains(r.methods, method)
}

// noRoute stands for the route of a request that has none.
var noRoute = &route{path: "none"}

// discovery is the route of AuthZEN's metadata, which lies at the top of the
// host: https://host/t/orders is described at
// https://host/.well-known/authzen-configuration/t/orders.
var discovery = &route{path: "/.well-known/authzen-configuration", methods: methods("GET"), offered: offersAuthZEN, access: forAll, serve: (*Server).metadata}

func offersAuthZEN(h *control.HTTP) bool { return h.AuthZEN != nil }
func offersCheck(h *control.HTTP) bool   { return h.Check != "" }
func offersServe(h *control.HTTP) bool   { return h.Serve != "" }

func offersPermissions(h *control.HTTP) bool { return h.Permissions != nil }

func offersData(h *control.HTTP) bool { return len(h.Data) > 0 }

// routeOf returns the route of an escaped path, the name of its tenant, which may
// be none, and what follows the route's own path.
func routeOf(path string) (r *route, tenant, rest string, ok bool) {
	if tenant, ok := strings.CutPrefix(path, discovery.path+"/t/"); ok && !strings.Contains(tenant, "/") {
		return discovery, tenant, "", true
	}
	below, ok := strings.CutPrefix(path, "/t/")
	if !ok {
		return nil, "", "", false
	}
	i := strings.IndexByte(below, '/')
	if i < 0 {
		return nil, "", "", false
	}
	tenant, below = below[:i], below[i:]
	for _, r := range routes {
		if below == r.path {
			return r, tenant, "", true
		}
		if rest, ok := strings.CutPrefix(below, r.path); ok && strings.HasSuffix(r.path, "/") {
			return r, tenant, rest, true
		}
	}
	return nil, "", "", false
}
