package httpserve

import (
	"compress/gzip"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/decisionlog"
	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// batch answers many questions about one of the paths that the tenant names:
// {"inputs": {key: input}, "common_input": input}, as Enterprise OPA's batch API
// does. All are answered by one revision, and each is a decision of its own, with
// its own ID and its own place in the decision log.
//
// The status is 200 where all items have been answered, 207 where some have, and
// 500 where none has; an item that has not says why. An item without a result is
// one that the policy says nothing about.
//
// With Accept: application/x-ndjson each item is a line, sent as soon as it is
// answered, and the last line is what the answer has beside the items.
func (s *Server) batch(w http.ResponseWriter, r *request) error {
	start := time.Now()
	entry, ok := entryOf(r.Rest)
	if !ok || !slices.Contains(r.Offers.Data, entry) {
		return errRoute
	}
	opts, err := optionsOf(r)
	if err != nil {
		return err
	}
	body, err := s.bodyOf(r, r.Offers.Batch.Bytes)
	if err != nil {
		return err
	}
	defer body.release()
	b, err := batchOf(r, body)
	if err != nil {
		return err
	}
	b.opts, b.id = opts, tenants.NewDecisionID()
	parsed := time.Since(start)

	ctx, cancel := r.bounded(r.Offers.Batch.Time)
	defer cancel()
	var to sink = &whole{batch: b}
	if accepts(r.Header.Values("Accept"), "application/x-ndjson") {
		l := newLines(b, w, r)
		defer l.stop()
		to = l
	}
	questions, items := b.questions(r, entry)
	if len(questions) > 0 {
		err := s.pool.Decide(ctx, r.Tenant, questions, func(i int, a tenants.Answer) {
			for k, item := range items[i] {
				if a.Of == 0 || a.Of == k+1 {
					to.add(b.items[item], b.render(b.items[item], &a))
				}
			}
		})
		if err != nil {
			return err
		}
	}
	return to.end(w, r, parsed, time.Since(start))
}

// batch is one batch.
type batch struct {
	id      string
	opts    *options
	items   []*item
	common  ast.Object // nil: there is none, or it is no object
	missing bool       // there are no inputs at all
	start   time.Time
	failed  int // items that have no answer
	bytes   int // of the items that were rendered
}

// item is one question of a batch.
type item struct {
	key        string
	index      int
	decisionID string
	text       []byte
}

// maxAnswers bounds the answers of a batch, in bytes. The items that do not fit
// have none.
const maxAnswers = 64 << 20

// valueFactor is about how many times as much memory as its text a value takes.
const valueFactor = 16

// batchOf reads the body of a batch. What is wrong with a single input is for its
// own item to say.
func batchOf(r *request, body *body) (*batch, error) {
	b := &batch{start: time.Now()}
	m, err := membersOf(body.text, "inputs", "common_input")
	if err != nil {
		return nil, err
	}
	inputs := m["inputs"]
	if inputs == nil {
		b.missing = true
		return b, nil
	}
	if inputs[0] != '{' {
		return nil, invalidf("inputs is not an object")
	}
	keys := map[string]bool{}
	limit := r.Offers.Batch.Items
	for key, text := range members(inputs) {
		if len(b.items) == limit {
			return nil, faultf(http.StatusRequestEntityTooLarge, codeTooLarge, "inputs has more than %d items", limit)
		}
		if keys[key] {
			return nil, invalidf("inputs has a key twice")
		}
		keys[key] = true
		b.items = append(b.items, &item{key: key, index: len(b.items), decisionID: tenants.NewDecisionID(), text: text})
	}
	if common := m["common_input"]; common != nil {
		if err := body.grow(valueFactor * int64(len(common))); err != nil {
			return nil, err
		}
		v, err := policy.ParseJSON(common, nil)
		if err != nil {
			return nil, invalidf("common_input has an object with one key twice, or a number that is out of range")
		}
		b.common, _ = v.(ast.Object)
	}
	return b, nil
}

// questions returns what is to be asked, and which items each question answers:
// items whose texts are equal are one question.
func (b *batch) questions(r *request, entry string) ([]tenants.Question, [][]int) {
	first := make(map[string]int, len(b.items)) // :: text → index of its question
	questions := make([]tenants.Question, 0, len(b.items))
	items := make([][]int, 0, len(b.items))
	for i, it := range b.items {
		place := &decisionlog.Batch{Key: it.key, Index: i, Size: len(b.items)}
		if k, ok := first[string(it.text)]; ok {
			questions[k].Twins = append(questions[k].Twins, tenants.Twin{DecisionID: it.decisionID, Batch: place})
			items[k] = append(items[k], i)
			continue
		}
		first[string(it.text)] = len(questions)
		q := r.question(entry, &itemInput{b.common, it.text})
		q.DecisionID, q.BatchDecisionID, q.Batch = it.decisionID, b.id, place
		q.Timed, q.BodyBytes = b.opts.metrics, int64(len(it.text))
		questions = append(questions, q)
		items = append(items, []int{i})
	}
	return questions, items
}

// itemInput is the input of an item: its text, over what all items have in
// common.
type itemInput struct {
	common ast.Object
	text   []byte
}

// Input parses the text. Where both it and what is common are objects, they are
// merged.
func (in *itemInput) Input(needs tenants.Needs) (ast.Value, error) {
	v, err := parseInput(in.text, needs)
	if err != nil {
		return nil, err
	}
	if obj, ok := v.(ast.Object); ok && in.common != nil {
		return merge(in.common, obj), nil
	}
	return v, nil
}

// merge returns common with what over has put over it: objects member by member,
// anything else as a whole. Both stay as they are, and the result shares their
// terms.
func merge(common, over ast.Object) ast.Object {
	merged := ast.NewObjectWithCapacity(common.Len() + over.Len())
	common.Foreach(func(k, v *ast.Term) {
		mine := over.Get(k)
		if mine == nil {
			merged.Insert(k, v)
			return
		}
		a, isObject := v.Value.(ast.Object)
		b, wasObject := mine.Value.(ast.Object)
		if isObject && wasObject {
			mine = ast.NewTerm(merge(a, b))
		}
		merged.Insert(k, mine)
	})
	over.Foreach(func(k, v *ast.Term) {
		if common.Get(k) == nil {
			merged.Insert(k, v)
		}
	})
	return merged
}

// sink takes the answers to the items of a batch, as they come.
type sink interface {
	// add takes one that is rendered: members of an object without its braces.
	add(*item, rendered)

	// end ends the answer.
	end(w http.ResponseWriter, r *request, parsed, took time.Duration) error
}

// rendered is the answer to an item, as members of a JSON object.
type rendered struct {
	text []byte // without braces
	ok   bool
}

// The statuses of items: these two alone are known to clients.
const (
	statusOK     = "200"
	statusFailed = "500"
)

func (r rendered) status() string {
	if r.ok {
		return statusOK
	}
	return statusFailed
}

// render renders the answer to an item.
func (b *batch) render(it *item, a *tenants.Answer) rendered {
	out := newOutput()
	out.begin('{')
	out.string("decision_id", it.decisionID)
	err := errorIn(a)
	if err == nil && b.opts.provenance {
		out.provenance(a.Bundles)
	}
	if b.opts.metrics {
		out.metrics("timer_rego_query_eval_ns", a.Evaluation, "timer_server_handler_ns", time.Since(b.start))
	}
	if err == nil && a.Decision.Value != nil {
		err = out.value("result", a.Decision.Value)
		if err == nil && b.bytes+len(out.buf) > maxAnswers {
			err = errAnswers
		}
	}
	if err != nil {
		b.failed++
		out = newOutput()
		out.begin('{')
		out.string("decision_id", it.decisionID)
		f := failureOf(err)
		out.string("code", f.code)
		out.string("message", f.message)
	}
	b.bytes += len(out.buf)
	return rendered{out.buf[1:], err == nil}
}

// errAnswers: the answers of a batch are larger than they may be together.
var errAnswers = faultf(http.StatusInternalServerError, codeTooLarge, "the answers are larger than %d bytes together", maxAnswers)

// whole is an answer of one JSON text.
type whole struct {
	batch   *batch
	answers []rendered // :: index of the item → its answer
}

func (o *whole) add(it *item, r rendered) {
	if o.answers == nil {
		o.answers = make([]rendered, len(o.batch.items))
	}
	o.answers[it.index] = r
}

func (o *whole) end(w http.ResponseWriter, r *request, parsed, took time.Duration) error {
	b := o.batch
	status, mixed := http.StatusOK, b.failed > 0 && b.failed < len(b.items)
	switch {
	case mixed:
		status = http.StatusMultiStatus
	case b.failed > 0:
		status = http.StatusInternalServerError
	}
	out := &output{make([]byte, 0, b.bytes+512+64*len(b.items))}
	out.begin('{')
	if b.opts.metrics {
		out.metrics("timer_rego_input_parse_ns", parsed, "timer_server_handler_ns", took)
	}
	if len(b.items) > 0 {
		out.name("responses")
		out.begin('{')
		for i, it := range b.items {
			out.name(it.key)
			out.begin('{')
			out.buf = append(out.buf, o.answers[i].text...)
			if mixed {
				out.string("http_status_code", o.answers[i].status())
			}
			out.end('}')
		}
		out.end('}')
	}
	if b.missing {
		out.warning("'inputs' key missing from the request")
	}
	out.string("batch_decision_id", b.id)
	out.end('}')
	return out.send(w, r, status, b.opts.pretty)
}

// lines is an answer of one line for each item.
type lines struct {
	batch   *batch
	w       http.ResponseWriter
	control *http.ResponseController

	mu     sync.Mutex
	out    *output      // lines that are not sent; guarded by mu
	timer  *time.Timer  // sends them; nil: none is set; guarded by mu
	begun  bool         // the answer; guarded by mu
	zipped *gzip.Writer // before w; nil: the client takes no gzip; guarded by mu
}

// A line leaves within flushTime, sooner where there are flushBytes.
const (
	flushTime  = 20 * time.Millisecond
	flushBytes = 16 << 10
)

func newLines(b *batch, w http.ResponseWriter, r *request) *lines {
	l := &lines{batch: b, w: w, control: http.NewResponseController(w), out: newOutput()}
	if acceptsGzip(r.Request) {
		l.zipped, _ = gzip.NewWriterLevel(w, gzip.BestSpeed) // a level that there is
	}
	return l
}

func (l *lines) add(it *item, r rendered) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.out.begin('{')
	l.out.string("key", it.key)
	l.out.int("index", int64(it.index))
	l.out.string("http_status_code", r.status())
	l.out.next()
	l.out.buf = append(l.out.buf, r.text...)
	l.out.buf = append(l.out.buf, "}\n"...)
	if len(l.out.buf) >= flushBytes {
		l.flush()
	} else if l.timer == nil {
		l.timer = time.AfterFunc(flushTime, func() {
			l.mu.Lock()
			defer l.mu.Unlock()
			if l.timer != nil {
				l.flush()
			}
		})
	}
}

// flush sends the lines that there are. The first time it begins the answer.
// l.mu is held. A client that is gone is noticed by whoever evaluates.
func (l *lines) flush() {
	if l.timer != nil {
		l.timer.Stop()
		l.timer = nil
	}
	if !l.begun {
		l.begun = true
		h := l.w.Header()
		h.Set("Content-Type", "application/x-ndjson")
		h.Set("Cache-Control", "no-store")
		h.Set("X-Accel-Buffering", "no")
		h.Add("Vary", "Accept-Encoding")
		if l.zipped != nil {
			h.Set("Content-Encoding", "gzip")
		}
		l.w.WriteHeader(http.StatusOK)
	}
	if l.zipped != nil {
		_, _ = l.zipped.Write(l.out.buf)
		_ = l.zipped.Flush()
	} else {
		_, _ = l.w.Write(l.out.buf)
	}
	l.out.buf = l.out.buf[:0]
	_ = l.control.Flush() // where it cannot be, it is sent at the end
}

// stop has nothing sent any more.
func (l *lines) stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.timer != nil {
		l.timer.Stop()
		l.timer = nil
	}
}

func (l *lines) end(_ http.ResponseWriter, _ *request, parsed, took time.Duration) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	b := l.batch
	l.out.begin('{')
	if b.opts.metrics {
		l.out.metrics("timer_rego_input_parse_ns", parsed, "timer_server_handler_ns", took)
	}
	if b.missing {
		l.out.warning("'inputs' key missing from the request")
	}
	l.out.string("batch_decision_id", b.id)
	l.out.int("size", int64(len(b.items)))
	l.out.int("failed", int64(b.failed))
	l.out.buf = append(l.out.buf, "}\n"...)
	l.flush()
	if l.zipped != nil {
		_ = l.zipped.Close()
	}
	return nil
}
