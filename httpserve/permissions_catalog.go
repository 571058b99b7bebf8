package httpserve

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/decisionlog"
	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// Codes and faults of policies whose rules about permissions are not what they
// should be. They name no content of the policy.
const (
	codeCatalog = "invalid_catalog"
	codeList    = "invalid_list"
)

var (
	errNoRules = faultf(http.StatusInternalServerError, codeUndefined, "the policy says nothing about permissions")
	errMoving  = &fault{http.StatusServiceUnavailable, codeBusy, "the tenant's policy changes while it is asked", "", time.Second}
)

func catalogf(format string, args ...any) *fault {
	return faultf(http.StatusInternalServerError, codeCatalog, "the tenant's catalogue "+format, args...)
}

func listf(format string, args ...any) *fault {
	return faultf(http.StatusInternalServerError, codeList, "the list that the tenant's policy gives "+format, args...)
}

// catalogue is what a tenant's lists are made of, under one State. It is never
// changed.
type catalogue struct {
	state    string
	revision string
	pairs    []pair // sorted by type and action
	mode     mode
	varies   bool // it, or an answer to one of its pairs, can change under one State
	made     time.Time
	size     int64
}

// mode is what else than a caller's name and claims its list follows from.
type mode struct {
	rule     bool // one rule gives the list, there is no catalogue
	token    bool // claims that differ from token to token count
	identity bool // a proxy's view of the caller counts
}

// pair is a type and an action, and the request that the action stands for.
type pair struct {
	kind, action string
	method, path string // "": it stands for none
}

func (p *pair) request() bool { return p.method != "" }

// key names the pair in the decision log.
func (p *pair) key() string { return p.kind + "/" + p.action }

// typed are actions of one type.
type typed struct {
	name    string
	actions []string
}

// types returns all actions by type.
func (c *catalogue) types() []typed {
	var types []typed
	for i := range c.pairs {
		types = addAction(types, &c.pairs[i])
	}
	return types
}

// addAction adds a pair, which comes after those that are there.
func addAction(types []typed, p *pair) []typed {
	if n := len(types); n == 0 || types[n-1].name != p.kind {
		types = append(types, typed{name: p.kind})
	}
	last := &types[len(types)-1]
	last.actions = append(last.actions, p.action)
	return types
}

// find returns a pair; nil: the catalogue has none of that name.
func (c *catalogue) find(kind, action string) *pair {
	i, ok := slices.BinarySearchFunc(c.pairs, pair{kind: kind, action: action}, comparePairs)
	if !ok {
		return nil
	}
	return &c.pairs[i]
}

func comparePairs(a, b pair) int {
	if c := strings.Compare(a.kind, b.kind); c != 0 {
		return c
	}
	return strings.Compare(a.action, b.action)
}

// readCatalogue asks for the catalogue that view's policy has, or for that of a
// policy that has taken its place meanwhile.
func (l *lists) readCatalogue(ctx context.Context, id tenants.ID, view *tenants.View) (*catalogue, error) {
	for range maxMoves {
		offers := view.Settings.HTTP
		if offers == nil || offers.Permissions == nil {
			return nil, errRoute
		}
		rules := offers.Permissions
		switch {
		case view.Has(rules.Catalog):
		case view.Has(rules.List):
			return &catalogue{
				state: view.State, revision: view.Revision, made: time.Now(), size: entrySize,
				mode: mode{rule: true, token: view.ReadsTokenClaims(rules.List)}, varies: view.Varies(rules.List),
			}, nil
		default:
			return nil, errNoRules
		}
		var a tenants.Answer
		q := tenants.Question{DecisionID: tenants.NewDecisionID(), Entry: rules.Catalog, Own: true, Value: true, Input: jsonInput(nil)}
		if err := l.pool.Decide(ctx, id, []tenants.Question{q}, func(_ int, got tenants.Answer) { a = got }); err != nil {
			return nil, err
		}
		if err := errorIn(&a); err != nil {
			return nil, err
		}
		if a.State == view.State {
			c, err := catalogueOf(a.Decision.Value, rules.Pairs)
			if err != nil {
				return nil, err
			}
			c.state, c.revision, c.made = a.State, revisionOf(&a), time.Now()
			c.look(view)
			return c, nil
		}
		var err error
		if view, err = l.pool.View(ctx, id); err != nil {
			return nil, err
		}
	}
	return nil, errMoving
}

// look finds out what the answers to the pairs follow from.
func (c *catalogue) look(view *tenants.View) {
	rules := view.Settings.HTTP.Permissions
	c.varies = view.Varies(rules.Catalog)
	for i := range c.pairs {
		if c.pairs[i].request() {
			c.mode.identity = true
			c.varies = c.varies || view.Varies(view.Settings.Entry)
		} else {
			c.mode.token = c.mode.token || view.ReadsTokenClaims(rules.Allow)
			c.varies = c.varies || view.Varies(rules.Allow)
		}
	}
}

// catalogueOf reads {type: [action | {"action", "method", "path"}]}.
func catalogueOf(v ast.Value, pairs int) (*catalogue, error) {
	obj, ok := v.(ast.Object)
	switch {
	case !ok:
		return nil, catalogf("is not an object of types")
	case obj.Len() > maxTypes:
		return nil, catalogf("has more than %d types", maxTypes)
	}
	c := &catalogue{size: entrySize}
	err := obj.Iter(func(k, v *ast.Term) error {
		kind, ok := k.Value.(ast.String)
		if !ok || !isName(string(kind)) {
			return catalogf("has a type whose name is not a text of 1 to %d bytes", maxName)
		}
		actions, err := elementsOf(v.Value)
		switch {
		case err != nil:
			return catalogf("has a type whose actions are not a list")
		case len(actions) > maxActions:
			return catalogf("has a type with more than %d actions", maxActions)
		case len(c.pairs)+len(actions) > pairs:
			return catalogf("has more than %d pairs of a type and an action", pairs)
		}
		for _, t := range actions {
			p, err := pairOf(string(kind), t.Value)
			if err != nil {
				return err
			}
			c.size += pairSize + int64(len(p.kind)+len(p.action)+len(p.path))
			if c.size > maxCatalog {
				return catalogf("is larger than %d bytes", maxCatalog)
			}
			c.pairs = append(c.pairs, p)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(c.pairs, comparePairs)
	for i := 1; i < len(c.pairs); i++ {
		if comparePairs(c.pairs[i-1], c.pairs[i]) == 0 {
			return nil, catalogf("has a type with one action twice")
		}
	}
	return c, nil
}

func pairOf(kind string, v ast.Value) (pair, error) {
	p := pair{kind: kind}
	obj, ok := v.(ast.Object)
	if !ok {
		name, ok := v.(ast.String)
		if !ok || !isName(string(name)) {
			return p, catalogf("has an action whose name is not a text of 1 to %d bytes", maxName)
		}
		p.action = string(name)
		return p, nil
	}
	text := func(key *ast.Term) (string, bool) {
		t := obj.Get(key)
		if t == nil {
			return "", true
		}
		s, ok := t.Value.(ast.String)
		return string(s), ok
	}
	var named, methodOK, pathOK bool
	p.action, named = text(termAction)
	p.method, methodOK = text(termMethod)
	p.path, pathOK = text(termPath)
	switch {
	case !named || !isName(p.action):
		return p, catalogf("has an action whose name is not a text of 1 to %d bytes", maxName)
	case !methodOK || !pathOK || (p.method == "") != (p.path == ""):
		return p, catalogf("has an action with one of method and path")
	case p.path != "" && (p.path[0] != '/' || len(p.path) > maxTarget):
		return p, catalogf("has an action whose path does not begin with / or has more than %d bytes", maxTarget)
	case p.method != "" && (!isMethod(p.method) || !isTarget(p.path)):
		return p, catalogf("has an action whose method or path is not one of HTTP")
	}
	return p, nil
}

// elementsOf returns what an array or a set has.
func elementsOf(v ast.Value) ([]*ast.Term, error) {
	switch v := v.(type) {
	case *ast.Array:
		terms := make([]*ast.Term, v.Len())
		for i := range terms {
			terms[i] = v.Elem(i)
		}
		return terms, nil
	case ast.Set:
		return v.Slice(), nil
	}
	return nil, errors.New("is not a list")
}

// revisionOf names the revision that an answer comes from, as View.Revision does.
func revisionOf(a *tenants.Answer) string {
	if len(a.Bundles) == 0 {
		return ""
	}
	return a.Bundles[0].Revision
}

// The keys of inputs and of what the rules give.
var (
	termSubject  = ast.StringTerm("subject")
	termAction   = ast.StringTerm("action")
	termResource = ast.StringTerm("resource")
	termType     = ast.StringTerm("type")
	termID       = ast.StringTerm("id")
	termName     = ast.StringTerm("name")
	termMethod   = ast.StringTerm("method")
	termPath     = ast.StringTerm("path")

	termPermissions = ast.StringTerm("permissions")
	termRules       = ast.StringTerm("rules")
)

// pairInput is {subject, action: {name}, resource: {type, id?}}.
type pairInput struct {
	subject      *ast.Term // shared by all of a batch
	kind, action string
	id           *ast.Term // nil: it is about the type
}

func (p *pairInput) Input(tenants.Needs) (ast.Value, error) {
	resource := ast.NewObject(ast.Item(termType, ast.StringTerm(p.kind)))
	if p.id != nil {
		resource.Insert(termID, p.id)
	}
	return ast.NewObject(
		ast.Item(termSubject, p.subject),
		ast.Item(termAction, ast.ObjectTerm(ast.Item(termName, ast.StringTerm(p.action)))),
		ast.Item(termResource, ast.NewTerm(resource)),
	), nil
}

// subjectInput is {subject}.
type subjectInput struct{ subject *ast.Term }

func (s subjectInput) Input(tenants.Needs) (ast.Value, error) {
	return ast.NewObject(ast.Item(termSubject, s.subject)), nil
}

// noCheck is the input of requests where nobody makes such inputs.
type noCheck struct{}

func (noCheck) Input(tenants.Needs) (ast.Value, error) { return nil, errNoCheck }

var errNoCheck = errors.New("actions that stand for requests are not supported here")

// questionAbout returns the question whether who may do what p says: the one that
// a proxy would ask where p stands for a request, and else one to the rule allow.
func (l *lists) questionAbout(w *who, allow string, subject *ast.Term, p *pair, id *ast.Term) tenants.Question {
	q := w.question()
	if p.request() && id == nil {
		q.Input = noCheck{}
		if l.inputs != nil {
			c := w.identity
			c.Method, c.Path = p.method, p.path
			q.Input = l.inputs(&c, q.DecisionID)
		}
		return q // of the tenant's default entry point
	}
	q.Entry, q.Own = allow, true
	q.Input = &pairInput{subject, p.kind, p.action, id}
	return q
}

// allowedIn reports whether an answer lets the subject do what was asked. What the
// policy says nothing about is not allowed. The error is why it is not known.
func allowedIn(a *tenants.Answer, request bool) (bool, error) {
	switch {
	case a.Err == nil:
		return a.Decision.Allowed || request && a.DryRun, nil // as the check would be answered
	case errors.Is(a.Err, policy.ErrUndefined), errors.Is(a.Err, policy.ErrEntry):
		return false, nil
	}
	return false, a.Err
}

// transient reports whether what was not known may be known soon.
func transient(err error) bool {
	for _, passing := range []error{
		tenants.ErrBusy, tenants.ErrDeadline, tenants.ErrNotReady, tenants.ErrNotLogged, policy.ErrCanceled,
	} {
		if errors.Is(err, passing) {
			return true
		}
	}
	return false
}

// reason says why it is not known whether an action is allowed.
type reason struct{ name, action, code string }

// listing is a permission list. It is never changed.
type listing struct {
	tenant        tenants.ID
	kind, subject string
	state         string // of what has answered
	revision      string
	version       string        // equal for lists that say the same, whatever the revision
	types         []typed       // what is allowed, sorted
	rules         []caslRule    // that the policy gives; nil: they follow from types
	reasons       []reason      // why others are missing, sorted
	keep          time.Duration // how long it may be remembered under its state; 0: as long as that lasts
	passing       bool          // some are missing that may be there soon
	body          []byte        // of the whole list
	tag           string
	size          int64
}

func (l *listing) incomplete() bool { return len(l.reasons) > 0 }

// caslRule is a rule of CASL that the policy gives.
type caslRule struct {
	subjects []string
	text     []byte
}

// How long lists are remembered that can change by themselves.
const (
	keepVarying = 5 * time.Second // the rules read the time, or what else no policy says
	keepPassing = time.Second     // a part is missing that may be there soon
)

// maxMoves is how often a list is begun anew since the policy has changed.
const maxMoves = 4

// compute asks for who's list, by one revision. It is errMoved where that
// revision looks at callers in another way than w was looked at.
func (l *lists) compute(ctx context.Context, w *who, m mode, view *tenants.View) (*listing, error) {
	for range maxMoves {
		c, err := l.catalogue(ctx, w.tenant, view)
		if err != nil {
			return nil, err
		}
		if c.mode != m {
			return nil, errMoved
		}
		if c.state != view.State { // a newer one has answered
			if view, err = l.pool.View(ctx, w.tenant); err != nil {
				return nil, err
			}
			if c.state != view.State {
				continue
			}
		}
		offers := view.Settings.HTTP // named by the catalogue's state, so they are there
		out := &listing{
			tenant: w.tenant, kind: w.caller.Type, subject: w.caller.Subject, state: c.state, revision: c.revision,
		}
		if c.varies {
			out.keep = keepVarying
		}
		if c.mode.rule {
			err = l.byRule(ctx, w, offers.Permissions.List, offers.Permissions.Pairs, out)
		} else {
			err = l.byCatalogue(ctx, w, offers.Permissions.Allow, c, out)
		}
		switch {
		case err != nil:
			return nil, err
		case out.state == c.state:
			return out, out.finish()
		}
		if view, err = l.pool.View(ctx, w.tenant); err != nil {
			return nil, err
		}
	}
	return nil, errMoving
}

// byCatalogue asks about each pair of the catalogue, as one batch.
func (l *lists) byCatalogue(ctx context.Context, w *who, allow string, c *catalogue, out *listing) error {
	if len(c.pairs) == 0 {
		return nil
	}
	subject := ast.NewTerm(w.caller.Value())
	batch := tenants.NewDecisionID()
	questions := make([]tenants.Question, len(c.pairs))
	for i := range c.pairs {
		q := l.questionAbout(w, allow, subject, &c.pairs[i], nil)
		q.BatchDecisionID, q.Batch = batch, &decisionlog.Batch{Key: c.pairs[i].key(), Index: i, Size: len(c.pairs)}
		questions[i] = q
	}
	allowed := make([]bool, len(c.pairs))
	errs := make([]error, len(c.pairs))
	state := ""
	err := l.pool.Decide(ctx, w.tenant, questions, func(i int, a tenants.Answer) {
		state = a.State
		allowed[i], errs[i] = allowedIn(&a, c.pairs[i].request())
	})
	if err != nil {
		return err
	}
	failed := 0
	for i := range c.pairs {
		if errs[i] != nil {
			failed++
			out.passing = out.passing || transient(errs[i])
			out.reasons = append(out.reasons, reason{c.pairs[i].kind, c.pairs[i].action, failureOf(errs[i]).code})
		} else if allowed[i] {
			out.types = addAction(out.types, &c.pairs[i])
		}
	}
	if failed == len(c.pairs) && out.passing {
		return errs[0] // the client keeps the list that it has
	}
	if out.passing {
		out.keep = keepPassing
	}
	out.state = state
	return nil
}

// byRule asks the rule that gives the list: {type: [actions]}, or that as the
// member "permissions" beside "rules" of CASL.
func (l *lists) byRule(ctx context.Context, w *who, entry string, pairs int, out *listing) error {
	q := w.question()
	q.Entry, q.Own, q.Value = entry, true, true
	q.Input = subjectInput{ast.NewTerm(w.caller.Value())}
	var a tenants.Answer
	if err := l.pool.Decide(ctx, w.tenant, []tenants.Question{q}, func(_ int, got tenants.Answer) { a = got }); err != nil {
		return err
	}
	if err := errorIn(&a); err != nil {
		return err
	}
	out.state, out.revision = a.State, revisionOf(&a)
	if a.Decision.Value == nil { // undefined is nothing
		return nil
	}
	return out.read(a.Decision.Value, pairs)
}

// read reads what the rule gives.
func (l *listing) read(v ast.Value, pairs int) error {
	obj, ok := v.(ast.Object)
	if !ok {
		return listf("is not an object of types")
	}
	if inner := obj.Get(termPermissions); inner != nil {
		if permissions, ok := inner.Value.(ast.Object); ok {
			if rules := obj.Get(termRules); rules != nil {
				if err := l.readRules(rules.Value, pairs); err != nil {
					return err
				}
			}
			obj = permissions
		}
	}
	if obj.Len() > maxTypes {
		return listf("has more than %d types", maxTypes)
	}
	n := 0
	return obj.Iter(func(k, v *ast.Term) error {
		kind, ok := k.Value.(ast.String)
		if !ok || !isName(string(kind)) {
			return listf("has a type whose name is not a text of 1 to %d bytes", maxName)
		}
		elems, err := elementsOf(v.Value)
		if n += len(elems); err == nil && (len(elems) > maxActions || n > pairs) {
			return listf("has more than %d actions of one type, or %d pairs of a type and an action", maxActions, pairs)
		}
		if err != nil {
			return listf("has a type whose actions are not a list")
		}
		actions := make([]string, len(elems))
		for i, t := range elems {
			s, ok := t.Value.(ast.String)
			if !ok || !isName(string(s)) {
				return listf("has an action whose name is not a text of 1 to %d bytes", maxName)
			}
			actions[i] = string(s)
		}
		slices.Sort(actions)
		if actions = slices.Compact(actions); len(actions) > 0 {
			l.types = append(l.types, typed{string(kind), actions}) // in the order of the keys
		}
		return nil
	})
}

// readRules reads rules of CASL: objects with action and subject, which are given
// on as they are.
func (l *listing) readRules(v ast.Value, limit int) error {
	elems, err := elementsOf(v)
	if err != nil || len(elems) > limit {
		return listf("has rules that are not a list of at most %d", limit)
	}
	l.rules = make([]caslRule, 0, len(elems))
	size := 0
	for _, t := range elems {
		obj, ok := t.Value.(ast.Object)
		if !ok {
			return listf("has a rule that is not an object")
		}
		if _, ok := namesIn(obj.Get(termAction)); !ok {
			return listf("has a rule whose action is not a name or a list of names")
		}
		rule := caslRule{}
		if rule.subjects, ok = namesIn(obj.Get(termSubject)); !ok {
			return listf("has a rule whose subject is not a name or a list of names")
		}
		if rule.text, err = appendValue(nil, obj); err != nil {
			return listf("has a rule that is not JSON")
		}
		if size += len(rule.text); size > maxList {
			return listf("is larger than %d bytes", maxList)
		}
		l.rules = append(l.rules, rule)
	}
	return nil
}

// namesIn returns the name, or the names, that a term is.
func namesIn(t *ast.Term) ([]string, bool) {
	if t == nil {
		return nil, false
	}
	if s, ok := t.Value.(ast.String); ok {
		return []string{string(s)}, isName(string(s))
	}
	elems, err := elementsOf(t.Value)
	if err != nil || len(elems) == 0 || len(elems) > maxActions {
		return nil, false
	}
	names := make([]string, len(elems))
	for i, e := range elems {
		s, ok := e.Value.(ast.String)
		if !ok || !isName(string(s)) {
			return nil, false
		}
		names[i] = string(s)
	}
	return names, true
}

// finish writes the list.
func (l *listing) finish() error {
	h := sha256.New()
	bare := *l
	bare.revision = ""
	h.Write(bare.text(want{}))
	if l.rules != nil {
		h.Write(bare.text(want{casl: true}))
	}
	l.version = hex.EncodeToString(h.Sum(nil)[:16])
	l.body = l.text(want{})
	if len(l.body) > maxList {
		return listf("is larger than %d bytes", maxList)
	}
	l.tag = tagOf(l.body)
	l.size = int64(3*len(l.body)) + int64(len(l.types))*64 // names are shared with the catalogue at best
	for _, r := range l.rules {
		l.size += int64(len(r.text)) + 64
	}
	return nil
}

// tagOf returns the entity tag of a body, without quotes.
func tagOf(body []byte) string {
	sum := sha256.Sum256(body)
	return base64.RawURLEncoding.EncodeToString(sum[:18])
}
