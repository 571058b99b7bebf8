package httpserve

import (
	"errors"
	"net/http"
	"strconv"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/decisionlog"
	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// The names of AuthZEN's entities, and which strings each must have (AuthZEN
// Authorization API 1.0, section 5).
const (
	entitySubject  = "subject"
	entityAction   = "action"
	entityResource = "resource"
	entityContext  = "context"
)

var entityFields = map[string][]string{ // :: entity → names of its strings
	entitySubject:  {"type", "id"},
	entityAction:   {"name"},
	entityResource: {"type", "id"},
	entityContext:  nil,
}

// entities are the parts of an evaluation, as the input document has them.
type entities [4]ast.Value // in the order of entityNames; nil: there is none

var entityNames = [4]string{entitySubject, entityAction, entityResource, entityContext}

// entitiesIn returns the entities of an object, where each that is there is an
// object. Others of its members are ignored.
func entitiesIn(obj ast.Object) (e entities, err error) {
	for i, name := range entityNames {
		e[i] = member(obj, name)
		if _, ok := e[i].(ast.Object); !ok && e[i] != nil {
			return e, invalidf("%s is not an object", name)
		}
	}
	return e, nil
}

// or returns e with those of def that it has not. An entity is replaced as a
// whole (section 7.1.1).
func (e entities) or(def entities) entities {
	for i := range e {
		if e[i] == nil {
			e[i] = def[i]
		}
	}
	return e
}

// check returns an error where an entity lacks something. Those of which a search
// looks for the identifier need none.
func (e entities) check(searched string) error {
	for i, name := range entityNames {
		if name == searched && name == entityAction {
			continue
		}
		obj, ok := e[i].(ast.Object)
		if !ok {
			if name == entityContext {
				continue
			}
			return invalidf("%s is missing", name)
		}
		for _, field := range entityFields[name] {
			if name == searched && field == "id" {
				continue
			}
			switch member(obj, field).(type) {
			case ast.String:
			case nil:
				return invalidf("%s.%s is missing", name, field)
			default:
				return invalidf("%s.%s is not a string", name, field)
			}
		}
		if name == entityContext {
			continue
		}
		if _, ok := member(obj, "properties").(ast.Object); !ok && member(obj, "properties") != nil {
			return invalidf("%s.properties is not an object", name)
		}
	}
	return nil
}

// Input returns the input document.
func (e entities) Input(tenants.Needs) (ast.Value, error) {
	items := make([][2]*ast.Term, 0, len(e))
	for i, v := range e {
		if v != nil {
			items = append(items, ast.Item(ast.StringTerm(entityNames[i]), ast.NewTerm(v)))
		}
	}
	return ast.NewObject(items...), nil
}

// objectOf reads a body that is an object. The caller releases the body.
func (s *Server) objectOf(r *request, limit int64) (ast.Object, *body, error) {
	body, err := s.bodyOf(r, limit)
	if err != nil {
		return nil, nil, err
	}
	if err := body.grow(valueFactor * int64(len(body.text))); err != nil {
		body.release()
		return nil, nil, err
	}
	v, err := policy.ParseJSON(body.text, nil)
	switch obj, ok := v.(ast.Object); {
	case errors.Is(err, policy.ErrDuplicateKey):
		err = invalidf("body has an object with one key twice")
	case err != nil:
		err = errJSON
	case !ok:
		err = errNoObject
	default:
		return obj, body, nil
	}
	body.release()
	return nil, nil, err
}

// evaluation is AuthZEN's Access Evaluation API (section 6).
func (s *Server) evaluation(w http.ResponseWriter, r *request) error {
	obj, body, err := s.objectOf(r, bodyBytes(r.View.Settings))
	if err != nil {
		return err
	}
	defer body.release()
	e, err := entitiesIn(obj)
	if err != nil {
		return err
	}
	return s.evaluateOne(w, r, e)
}

func (s *Server) evaluateOne(w http.ResponseWriter, r *request, e entities) error {
	if err := e.check(""); err != nil {
		return err
	}
	if !r.View.Has(r.Offers.AuthZEN.Allow) {
		return errRoute
	}
	q := r.question(r.Offers.AuthZEN.Allow, e)
	a, err := s.ask(r, &q)
	if err != nil && !errors.Is(err, errGuard) {
		return err
	}
	out := newOutput()
	if _, err := out.evaluation(&a, err); err != nil {
		return err
	}
	w.Header().Set(decisionHeader, q.DecisionID)
	return out.send(w, r, http.StatusOK, false)
}

// evaluation writes an answer, or, where there is none, a denial that says why.
// It reports the decision. The error, before which nothing was written, wraps
// policy.ErrResult.
//
// A policy answers with a boolean, or with an object {allowed, context}. What it
// says nothing about is denied.
func (o *output) evaluation(a *tenants.Answer, failure error) (bool, error) {
	if failure != nil {
		f := failureOf(failure)
		o.begin('{')
		_ = o.value("decision", ast.Boolean(false))
		o.name("context")
		o.begin('{')
		o.name("error")
		o.begin('{')
		o.int("status", int64(f.status))
		o.string("message", f.message)
		o.end('}')
		o.end('}')
		o.end('}')
		return false, nil
	}
	var context ast.Value
	switch v := a.Decision.Value.(type) {
	case nil, ast.Boolean:
	case ast.Object:
		if _, ok := member(v, "allowed").(ast.Boolean); !ok {
			return false, resultErrorf("allowed is not a boolean")
		}
		if context = member(v, "context"); context != nil {
			if _, ok := context.(ast.Object); !ok {
				return false, resultErrorf("context is not an object")
			}
		}
	default:
		return false, resultErrorf("neither a boolean nor an object")
	}
	begun := len(o.buf)
	o.begin('{')
	_ = o.value("decision", ast.Boolean(a.Decision.Allowed))
	if context != nil {
		if err := o.value("context", context); err != nil {
			o.buf = o.buf[:begun]
			return false, resultErrorf("context: %w", err)
		}
	}
	o.end('}')
	return a.Decision.Allowed, nil
}

// The semantics of evaluations (section 7.1.2.1).
const (
	executeAll          = "execute_all"
	denyOnFirstDeny     = "deny_on_first_deny"
	permitOnFirstPermit = "permit_on_first_permit"
)

// semanticOf returns the semantic that a request asks for.
func semanticOf(obj ast.Object) (string, error) {
	v := member(obj, "options")
	if v == nil {
		return executeAll, nil
	}
	options, ok := v.(ast.Object)
	if !ok {
		return "", invalidf("options is not an object")
	}
	switch semantic := member(options, "evaluations_semantic"); semantic {
	case nil:
		return executeAll, nil
	case ast.String(executeAll), ast.String(denyOnFirstDeny), ast.String(permitOnFirstPermit):
		return string(semantic.(ast.String)), nil
	}
	return "", invalidf("options.evaluations_semantic is not one of %s, %s and %s", executeAll, denyOnFirstDeny, permitOnFirstPermit)
}

// evaluations is AuthZEN's Access Evaluations API (section 7): one decision for
// each of its items, by one revision and each recorded as one. Without items it
// is a single evaluation.
func (s *Server) evaluations(w http.ResponseWriter, r *request) error {
	obj, body, err := s.objectOf(r, r.Offers.Batch.Bytes)
	if err != nil {
		return err
	}
	defer body.release()
	def, err := entitiesIn(obj)
	if err != nil {
		return err
	}
	semantic, err := semanticOf(obj)
	if err != nil {
		return err
	}
	list, ok := member(obj, "evaluations").(*ast.Array)
	switch {
	case !ok && member(obj, "evaluations") != nil:
		return invalidf("evaluations is not an array")
	case !ok || list.Len() == 0:
		return s.evaluateOne(w, r, def)
	case list.Len() > r.Offers.Batch.Items:
		return faultf(http.StatusRequestEntityTooLarge, codeTooLarge, "evaluations has more than %d items", r.Offers.Batch.Items)
	case !r.View.Has(r.Offers.AuthZEN.Allow):
		return errRoute
	}
	b := newEvaluations(r, list, def, semantic)
	ctx, cancel := r.bounded(r.Offers.Batch.Time)
	defer cancel()
	if len(b.questions) > 0 {
		if err := s.pool.Decide(ctx, r.Tenant, b.questions, b.take); err != nil {
			return err
		}
	}
	if err := body.grow(int64(len(b.text.buf))); err != nil {
		return err
	}
	return b.write(w, r)
}

// evaluationItems are the items of one request.
type evaluationItems struct {
	semantic  string
	texts     []rendered // the answers, by item; shortened where one decides all
	text      output     // of the answers, one after the other
	questions []tenants.Question
	items     []int // :: question → its item
	over      bool  // an item has decided all
}

func newEvaluations(r *request, list *ast.Array, def entities, semantic string) *evaluationItems {
	n := list.Len()
	b := &evaluationItems{semantic: semantic, texts: make([]rendered, n), questions: make([]tenants.Question, 0, n), items: make([]int, 0, n)}
	batch, asked := tenants.NewDecisionID(), r.question(r.Offers.AuthZEN.Allow, nil)
	for i := range n {
		e, err := itemOf(list.Elem(i).Value, def)
		if err != nil {
			b.add(i, &tenants.Answer{}, err)
			if semantic == denyOnFirstDeny {
				b.texts = b.texts[:i+1] // none after it is ever needed
				break
			}
			continue
		}
		q := asked
		q.DecisionID, q.BatchDecisionID, q.Input = tenants.NewDecisionID(), batch, e
		q.Batch = &decisionlog.Batch{Key: strconv.Itoa(i), Index: i, Size: n}
		if semantic != executeAll {
			q.Needed = func() bool { return !b.over }
		}
		b.questions = append(b.questions, q)
		b.items = append(b.items, i)
	}
	return b
}

// itemOf returns the entities of an item, where it is whole.
func itemOf(v ast.Value, def entities) (entities, error) {
	obj, ok := v.(ast.Object)
	if !ok {
		return entities{}, invalidf("the item is not an object")
	}
	e, err := entitiesIn(obj)
	if err != nil {
		return e, err
	}
	e = e.or(def)
	return e, e.check("")
}

// take takes the answer to a question.
func (b *evaluationItems) take(i int, a tenants.Answer) {
	allowed := b.add(b.items[i], &a, errorIn(&a))
	if b.semantic == denyOnFirstDeny && !allowed || b.semantic == permitOnFirstPermit && allowed {
		b.over, b.texts = true, b.texts[:b.items[i]+1]
	}
}

// add writes the answer to an item, and reports the decision.
func (b *evaluationItems) add(item int, a *tenants.Answer, failure error) bool {
	out := &b.text
	begun := len(out.buf)
	if failure == nil && begun > maxAnswers {
		failure = errAnswers
	}
	allowed, err := out.evaluation(a, failure)
	if err != nil {
		allowed, _ = out.evaluation(a, err)
	}
	b.texts[item] = rendered{begun, len(out.buf), err == nil}
	return allowed
}

func (b *evaluationItems) write(w http.ResponseWriter, r *request) error {
	out := newOutput()
	out.begin('{')
	out.name("evaluations")
	out.begin('[')
	for _, t := range b.texts {
		out.next()
		out.buf = append(out.buf, b.text.buf[t.from:t.to]...)
	}
	out.end(']')
	out.end('}')
	return out.send(w, r, http.StatusOK, false)
}
