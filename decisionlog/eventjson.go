package decisionlog

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
)

// constants are the members of events that are the same for many, as JSON.
type constants struct {
	labels []byte // the member's value

	bundles     *Bundle // the first of those encoded last
	bundleCount int
	bundlesText []byte // the member's value; empty if there are none
}

func newConstants(labels map[string]string) constants {
	text, err := json.Marshal(labels)
	if err != nil {
		panic(err) // strings always have JSON
	}
	return constants{labels: text}
}

// of returns bundles as JSON.
func (c *constants) of(bundles []Bundle) []byte {
	if len(bundles) == 0 {
		return nil
	}
	if c.bundles == &bundles[0] && c.bundleCount == len(bundles) {
		return c.bundlesText
	}
	sorted := slices.SortedFunc(slices.Values(bundles), func(a, b Bundle) int { return cmp.Compare(a.Name, b.Name) })
	text := []byte{'{'}
	for i, b := range sorted {
		if i > 0 {
			text = append(text, ',')
		}
		text = append(appendString(text, b.Name), ":{"...)
		if b.Revision != "" {
			text = appendString(append(text, `"revision":`...), b.Revision)
		}
		text = append(text, '}')
	}
	c.bundles, c.bundleCount, c.bundlesText = &bundles[0], len(bundles), append(text, '}')
	return c.bundlesText
}

// event writes an event as OPA's logs.EventV1 is written; p has its masked parts.
// The encoder must have been reset.
func (e *encoder) event(ev *Event, p *parts, c *constants) {
	e.buf = append(append(e.buf, `{"labels":`...), c.labels...)
	e.common(ev, p, c)
	if ev.Error != nil {
		e.buf = append(append(e.buf, `,"error":`...), errorJSON(ev.Error)...)
	}
	e.buf = append(e.buf, `,"timestamp":"`...)
	e.buf = ev.Timestamp.AppendFormat(e.buf, time.RFC3339Nano)
	e.buf = append(e.buf, '"', '}')
}

// consoleLine writes an event as OPA's console logger does, at the time now.
func (e *encoder) consoleLine(ev *Event, p *parts, c *constants, now time.Time) {
	e.buf = append(e.buf, `{"level":"info","msg":"Decision Log","time":"`...)
	e.buf = now.AppendFormat(e.buf, time.RFC3339)
	e.buf = append(e.buf, `","type":"openpolicyagent.org/decision_logs"`...)
	if len(c.labels) > len("{}") && c.labels[0] == '{' {
		e.buf = append(append(e.buf, `,"labels":`...), c.labels...)
	}
	e.common(ev, p, c)
	if ev.Error != nil {
		e.text(`,"error":`, ev.Error.Error())
	}
	e.buf = append(e.buf, `,"timestamp":"`...)
	e.buf = ev.Timestamp.UTC().AppendFormat(e.buf, time.RFC3339Nano)
	e.buf = append(e.buf, '"', '}')
}

// common writes the members that an event and a line of the console have alike.
func (e *encoder) common(ev *Event, p *parts, c *constants) {
	e.buf = appendString(append(e.buf, `,"decision_id":`...), ev.DecisionID)
	e.text(`,"batch_decision_id":`, ev.BatchDecisionID)
	e.text(`,"trace_id":`, ev.TraceID)
	e.text(`,"span_id":`, ev.SpanID)
	if bundles := c.of(ev.Bundles); len(bundles) > 0 {
		e.buf = append(append(e.buf, `,"bundles":`...), bundles...)
	}
	e.text(`,"path":`, ev.Path)
	e.text(`,"query":`, ev.Query)
	if p.document != nil {
		e.document(p.document)
	} else {
		e.part("input", p.input)
	}
	e.part("result", p.result)
	e.part("nd_builtin_cache", p.ndCache)
	e.headers(ev.Headers)
	if custom := ev.custom(); custom != nil {
		e.part("custom", custom)
	}
	e.list("erased", p.erased)
	if len(p.masked) > 0 {
		e.masked = slices.DeleteFunc(e.masked, func(s string) bool { return slices.Contains(p.masked, s) })
	}
	e.list("masked", p.masked, e.masked...)
	e.text(`,"requested_by":`, ev.RequestedBy)
	e.metrics = ev.appendMetrics(e.metrics[:0])
	if len(e.metrics) > 0 {
		e.buf = append(e.buf, `,"metrics":{`...)
		for _, m := range e.metrics {
			e.name(m.Name)
			e.buf = strconv.AppendInt(e.buf, m.Value, 10)
		}
		e.buf = append(e.buf, '}')
	}
	if ev.RequestID != 0 {
		e.buf = strconv.AppendUint(append(e.buf, `,"req_id":`...), ev.RequestID, 10)
	}
	if len(ev.RuleLabels) > 0 {
		e.buf = append(e.buf, `,"rule_labels":[`...)
		for _, v := range ev.RuleLabels {
			e.value(v)
		}
		e.buf = append(e.buf, ']')
	}
}

// text writes a member that is a string, unless it is empty. The name is as it
// stands in the text, between a comma and a colon.
func (e *encoder) text(name, value string) {
	if value != "" {
		e.buf = appendString(append(e.buf, name...), value)
	}
}

// part writes a member that is a value, unless it is nil.
func (e *encoder) part(name string, v ast.Value) {
	if v == nil {
		return
	}
	e.beginPart(name)
	if name == "nd_builtin_cache" {
		e.ndCache(v)
	} else {
		e.value(v)
	}
	e.endPart()
}

func (e *encoder) beginPart(name string) {
	e.buf = append(appendString(append(e.buf, ','), name), ':')
	if e.hide {
		e.frames = append(e.frames[:0], frame{key: name})
	}
}

func (e *encoder) endPart() { e.frames = e.frames[:0] }

// list writes a member that is a list of strings, unless it is empty.
func (e *encoder) list(name string, values []string, more ...string) {
	if len(values)+len(more) == 0 {
		return
	}
	e.buf = append(appendString(append(e.buf, ','), name), ':')
	open := byte('[')
	for _, part := range [...][]string{values, more} {
		for _, v := range part {
			e.buf = appendString(append(e.buf, open), v)
			open = ','
		}
	}
	e.buf = append(e.buf, ']')
}

// headers writes the request_context, unless it has no headers.
func (e *encoder) headers(headers map[string][]string) {
	if len(headers) == 0 {
		return
	}
	e.buf = append(e.buf, `,"request_context":{"http":{"headers":{`...)
	for _, name := range slices.Sorted(maps.Keys(headers)) {
		e.name(name)
		if e.hide && secretHeader(name) {
			e.noted([]byte("/request_context/http/headers/" + url.PathEscape(name)))
			e.buf = append(appendString(append(e.buf, '['), Redacted), ']')
			continue
		}
		open := byte('[')
		for _, v := range headers[name] {
			e.buf = appendString(append(e.buf, open), v)
			open = ','
		}
		if open == '[' {
			e.buf = append(e.buf, '[')
		}
		e.buf = append(e.buf, ']')
	}
	e.buf = append(e.buf, "}}}"...)
}

// appendMetrics appends all metrics of the event, sorted by name, to an empty
// slice.
func (ev *Event) appendMetrics(all []Metric) []Metric {
	if ev.QueryEval != 0 {
		all = append(all, Metric{"timer_rego_query_eval_ns", int64(ev.QueryEval)})
	}
	if ev.ServerHandler != 0 {
		all = append(all, Metric{"timer_server_handler_ns", int64(ev.ServerHandler)})
	}
	if len(ev.Metrics) > 0 {
		all = append(all, ev.Metrics...)
		slices.SortStableFunc(all, func(a, b Metric) int { return cmp.Compare(a.Name, b.Name) })
	}
	return all
}

// custom returns the member custom, nil if there is none.
func (ev *Event) custom() ast.Object {
	if ev.Batch == nil {
		if ev.Custom == nil || ev.Custom.Len() == 0 {
			return nil
		}
		return ev.Custom
	}
	batch := ast.NewObject(
		ast.Item(ast.InternedTerm("key"), ast.StringTerm(ev.Batch.Key)),
		ast.Item(ast.InternedTerm("index"), ast.InternedTerm(ev.Batch.Index)),
		ast.Item(ast.InternedTerm("size"), ast.InternedTerm(ev.Batch.Size)))
	if ev.Custom == nil {
		return ast.NewObject(ast.Item(ast.InternedTerm("batch"), ast.NewTerm(batch)))
	}
	return with(ev.Custom, ast.InternedTerm("batch"), batch)
}

// errorJSON returns an error as an object of JSON.
func errorJSON(err error) []byte {
	if text := messageObject(err); text != nil {
		return text
	}
	return append(appendString([]byte(`{"message":`), err.Error()), '}')
}

// messageObject returns the JSON of the first error in err's tree that is an
// object with a message; nil if there is none.
func messageObject(err error) []byte {
	text, failed := json.Marshal(err)
	if failed == nil && bytes.HasPrefix(text, []byte(`{"`)) {
		var object struct{ Message string }
		if json.Unmarshal(text, &object) == nil && object.Message != "" {
			return text
		}
	}
	if inner := errors.Unwrap(err); inner != nil {
		return messageObject(inner)
	}
	if several, ok := err.(interface{ Unwrap() []error }); ok {
		for _, inner := range several.Unwrap() {
			if text := messageObject(inner); text != nil {
				return text
			}
		}
	}
	return nil
}

// value returns the event as the drop and mask rules see it: as EventV1.AST of
// OPA. The encoder's state stays as it is.
func (ev *Event) value(labels map[string]string, e *encoder) (ast.Value, error) {
	members := make([][2]*ast.Term, 0, 20)
	add := func(name string, v ast.Value) {
		members = append(members, ast.Item(ast.InternedTerm(name), ast.NewTerm(v)))
	}
	text := func(name, value string) {
		if value != "" {
			add(name, ast.String(value))
		}
	}
	add("labels", labelsValue(labels))
	add("decision_id", ast.String(ev.DecisionID))
	text("batch_decision_id", ev.BatchDecisionID)
	text("trace_id", ev.TraceID)
	text("span_id", ev.SpanID)
	if len(ev.Bundles) > 0 {
		bundles := ast.NewObject()
		for _, b := range ev.Bundles {
			info := ast.NewObject()
			if b.Revision != "" {
				info.Insert(ast.InternedTerm("revision"), ast.StringTerm(b.Revision))
			}
			bundles.Insert(ast.StringTerm(b.Name), ast.NewTerm(info))
		}
		add("bundles", bundles)
	}
	text("path", ev.Path)
	text("query", ev.Query)
	if ev.Input != nil {
		add("input", ev.Input)
	}
	if ev.Result != nil {
		add("result", e.jsonValue(ev.Result))
	}
	if ev.NDBuiltinCache != nil {
		add("nd_builtin_cache", e.jsonValue(ev.NDBuiltinCache))
	}
	if ev.Error != nil {
		v, err := ast.ValueFromReader(bytes.NewReader(errorJSON(ev.Error)))
		if err != nil {
			return nil, err
		}
		add("error", v)
	}
	text("requested_by", ev.RequestedBy)
	if len(ev.RuleLabels) > 0 {
		terms := make([]*ast.Term, len(ev.RuleLabels))
		for i, v := range ev.RuleLabels {
			terms[i] = ast.NewTerm(v)
		}
		add("rule_labels", ast.NewArray(terms...))
	}
	add("timestamp", ast.String(ev.Timestamp.Format(time.RFC3339Nano)))
	if metrics := ev.appendMetrics(nil); len(metrics) > 0 {
		m := ast.NewObject()
		for _, x := range metrics {
			m.Insert(ast.StringTerm(x.Name), ast.NewTerm(ast.Number(strconv.FormatInt(x.Value, 10))))
		}
		add("metrics", m)
	}
	if ev.RequestID > 0 {
		add("req_id", ast.Number(strconv.FormatUint(ev.RequestID, 10)))
	}
	if len(ev.Headers) > 0 {
		headers := ast.NewObject()
		for name, values := range ev.Headers {
			terms := make([]*ast.Term, len(values))
			for i, v := range values {
				terms[i] = ast.StringTerm(v)
			}
			headers.Insert(ast.StringTerm(name), ast.ArrayTerm(terms...))
		}
		add("request_context", ast.NewObject(ast.Item(ast.InternedTerm("http"),
			ast.ObjectTerm(ast.Item(ast.InternedTerm("headers"), ast.NewTerm(headers))))))
	}
	if custom := ev.custom(); custom != nil {
		add("custom", e.jsonValue(custom))
	}
	return ast.NewObject(members...), nil
}

func labelsValue(labels map[string]string) ast.Value {
	if labels == nil {
		return ast.NullValue
	}
	obj := ast.NewObject()
	for k, v := range labels {
		obj.Insert(ast.StringTerm(k), ast.StringTerm(v))
	}
	return obj
}
