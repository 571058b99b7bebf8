package httpserve

import (
	"bytes"
	"compress/gzip"
	"hash/maphash"
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
					it := &b.items[item]
					to.add(it, b.render(it, &a))
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
	items   []item
	common  ast.Object // nil: there is none, or it is no object
	missing bool       // there are no inputs at all
	start   time.Time
	failed  int    // items that have no answer
	text    output // the items that were rendered, one after the other
	bytes   int    // of these
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
	keys := map[string]struct{}{}
	limit := r.Offers.Batch.Items
	for key, text := range members(inputs) {
		if len(b.items) == limit {
			return nil, faultf(http.StatusRequestEntityTooLarge, codeTooLarge, "inputs has more than %d items", limit)
		}
		if keys[key] = struct{}{}; len(keys) == len(b.items) {
			return nil, invalidf("inputs has a key twice")
		}
		b.items = append(b.items, item{key: key, index: len(b.items), decisionID: tenants.NewDecisionID(), text: text})
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
	var (
		n         = len(b.items)
		seed      = maphash.MakeSeed()
		first     = make(map[uint64]int, n) // :: hash of a text → index of its question
		questions = make([]tenants.Question, 0, n)
		items     = make([][]int, 0, n)
		inputs    = make([]itemInput, n)
		own       = make([]int, n) // :: item → itself, of which items has a part
		asked     = r.question(entry, nil)
	)
	for i := range b.items {
		it := &b.items[i]
		place := &decisionlog.Batch{Key: it.key, Index: i, Size: n} // by itself: the log may keep one of many
		hash := maphash.Bytes(seed, it.text)
		k, known := first[hash]
		if known && bytes.Equal(b.items[items[k][0]].text, it.text) {
			questions[k].Twins = append(questions[k].Twins, tenants.Twin{DecisionID: it.decisionID, Batch: place})
			items[k] = append(items[k], i)
			continue
		}
		first[hash] = len(questions)
		inputs[i] = itemInput{b.common, it.text}
		q := asked
		q.DecisionID, q.BatchDecisionID, q.Batch, q.Input = it.decisionID, b.id, place, &inputs[i]
		q.Timed, q.BodyBytes = b.opts.metrics, int64(len(it.text))
		questions = append(questions, q)
		own[i] = i
		items = append(items, own[i:i+1:i+1])
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
	if over.Len() == 0 {
		return common
	}
	var few [16][2]*ast.Term
	members := few[:0]
	common.Foreach(func(k, v *ast.Term) {
		if mine := over.Get(k); mine != nil {
			a, isObject := v.Value.(ast.Object)
			b, wasObject := mine.Value.(ast.Object)
			if v = mine; isObject && wasObject {
				v = ast.NewTerm(merge(a, b))
			}
		}
		members = append(members, [2]*ast.Term{k, v})
	})
	over.Foreach(func(k, v *ast.Term) {
		if common.Get(k) == nil {
			members = append(members, [2]*ast.Term{k, v})
		}
	})
	return ast.NewObject(members...)
}

// sink takes the answers to the items of a batch, as they come.
type sink interface {
	// add takes one that is rendered.
	add(*item, rendered)

	// end ends the answer.
	end(w http.ResponseWriter, r *request, parsed, took time.Duration) error
}

// rendered is the answer to an item, as members of a JSON object without braces:
// a part of what the batch has rendered.
type rendered struct {
	from, to int
	ok       bool
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
	out := &b.text
	begun := len(out.buf)
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
		if err == nil && b.bytes+len(out.buf)-begun > maxAnswers {
			err = errAnswers
		}
	}
	if err != nil {
		b.failed++
		out.buf = out.buf[:begun]
		out.begin('{')
		out.string("decision_id", it.decisionID)
		f := failureOf(err)
		out.string("code", f.code)
		out.string("message", f.message)
	}
	b.bytes += len(out.buf) - begun
	return rendered{begun + 1, len(out.buf), err == nil}
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
		for i := range b.items {
			out.name(b.items[i].key)
			out.begin('{')
			out.buf = append(out.buf, b.text.buf[o.answers[i].from:o.answers[i].to]...)
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
	l.out.buf = append(l.out.buf, l.batch.text.buf[r.from:r.to]...)
	l.out.buf = append(l.out.buf, "}\n"...)
	l.batch.text.buf = l.batch.text.buf[:0]
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
