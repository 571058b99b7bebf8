package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gatehouse-authz/gatehouse/decisionlog"
	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// maxExplain bounds what is sent to have something explained, in bytes.
const maxExplain = 4 << 20

// decisionsTime bounds the masking of decisions that somebody looks at.
const decisionsTime = 20 * time.Second

// decisionErrors are the statuses of what goes wrong when decisions are looked at.
// The first that an error is counts; what else goes wrong is 500.
var decisionErrors = []struct {
	err    error
	status int
}{
	{tenants.ErrNotRemembered, http.StatusNotFound},
	{tenants.ErrUnknown, http.StatusNotFound},
	{decisionlog.ErrWithheld, http.StatusForbidden},
	{tenants.ErrInvalid, http.StatusBadRequest},
	{tenants.ErrEntry, http.StatusBadRequest},
	{tenants.ErrBusy, http.StatusServiceUnavailable},
	{tenants.ErrNotReady, http.StatusServiceUnavailable},
	{tenants.ErrDeadline, http.StatusServiceUnavailable},
	{context.DeadlineExceeded, http.StatusServiceUnavailable},
}

// handleDecisions serves
//
//	GET /tenants/{tenant}/decisions[?outcome=&limit=&id=]   its last decisions, masked
//	POST /tenants/{tenant}/explain[?mode=]                  how its policy decides, step by step
func handleDecisions(mux *http.ServeMux, pool *tenants.Pool) {
	mux.HandleFunc("GET /tenants/{tenant}/decisions", func(w http.ResponseWriter, r *http.Request) {
		id, err := tenants.ParseID(r.PathValue("tenant"))
		if err != nil {
			writeFault(w, http.StatusBadRequest, err)
			return
		}
		q, err := decisionsQuery(r)
		if err != nil {
			writeFault(w, http.StatusBadRequest, err)
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), decisionsTime)
		defer cancel()
		found, err := pool.Decisions(ctx, id, q)
		if err == nil && q.ID != "" && len(found.Decisions) == 0 {
			err = fmt.Errorf("%w: %q is not among the last %d of tenant %q", tenants.ErrNotRemembered, q.ID, found.Remembered, id)
			if found.Withheld > 0 {
				err = fmt.Errorf("%w: %q: %s", decisionlog.ErrWithheld, q.ID, found.Why)
			}
		}
		if err != nil {
			writeFault(w, decisionStatus(err), err)
			return
		}
		writeJSON(w, http.StatusOK, found)
	})
	mux.HandleFunc("POST /tenants/{tenant}/explain", func(w http.ResponseWriter, r *http.Request) {
		id, err := tenants.ParseID(r.PathValue("tenant"))
		if err != nil {
			writeFault(w, http.StatusBadRequest, err)
			return
		}
		q, status, err := explainQuery(w, r)
		if err != nil {
			writeFault(w, status, err)
			return
		}
		x, err := pool.Explain(r.Context(), id, q)
		if err != nil {
			writeFault(w, decisionStatus(err), err)
			return
		}
		if wantsText(r) {
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
			writeExplanation(w, x)
			return
		}
		writeJSON(w, http.StatusOK, x)
	})
}

func decisionStatus(err error) int {
	for _, e := range decisionErrors {
		if errors.Is(err, e.err) {
			return e.status
		}
	}
	return http.StatusInternalServerError
}

func writeFault(w http.ResponseWriter, status int, err error) {
	writeJSON(w, status, map[string]string{"error": err.Error()})
}

// decisionsQuery reads which decisions are wanted.
func decisionsQuery(r *http.Request) (q tenants.DecisionsQuery, err error) {
	values := r.URL.Query()
	for name := range values {
		if name != "outcome" && name != "limit" && name != "id" {
			return q, fmt.Errorf("parameter %q is not outcome, limit or id", name)
		}
	}
	q.ID = values.Get("id")
	if text := values.Get("limit"); text != "" {
		if q.Limit, err = strconv.Atoi(text); err != nil || q.Limit < 1 {
			return q, fmt.Errorf("limit %q is not a number from 1", text)
		}
	}
	known := tenants.Outcomes()
	for _, list := range values["outcome"] {
		for name := range strings.SplitSeq(list, ",") {
			name = strings.TrimSpace(name)
			if !slices.Contains(known, name) {
				return q, fmt.Errorf("outcome %q is not one of %s", name, strings.Join(known, ", "))
			}
			q.Outcomes = append(q.Outcomes, name)
		}
	}
	return q, nil
}

// explainQuery reads what is to be explained. The status is that of its error.
func explainQuery(w http.ResponseWriter, r *http.Request) (q tenants.ExplainQuery, status int, err error) {
	q.Mode = policy.TraceMode(cmp.Or(r.URL.Query().Get("mode"), string(policy.TraceRules)))
	if !slices.Contains(policy.TraceModes, q.Mode) {
		return q, http.StatusBadRequest, fmt.Errorf("mode %q is not one of %v", q.Mode, policy.TraceModes)
	}
	text, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxExplain))
	if tooLarge, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return q, http.StatusRequestEntityTooLarge, fmt.Errorf("body is larger than %d bytes", tooLarge.Limit)
	} else if err != nil {
		return q, http.StatusBadRequest, errors.New("body cannot be read")
	}
	var body struct {
		DecisionID string          `json:"decision_id"`
		Input      json.RawMessage `json:"input"`
		Path       string          `json:"path"`
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&body); err != nil || d.More() {
		return q, http.StatusBadRequest, errors.New(`body is not {"decision_id": "..."} or {"input": {...}, "path": "envoy/authz/allow"}`)
	}
	q.DecisionID, q.Input, q.Path = body.DecisionID, body.Input, body.Path
	switch {
	case q.DecisionID == "" && len(q.Input) == 0:
		return q, http.StatusBadRequest, errors.New("body has neither decision_id nor input")
	case q.DecisionID != "" && (len(q.Input) > 0 || q.Path != ""):
		return q, http.StatusBadRequest, errors.New("body has decision_id, which says what was asked, and input or path")
	}
	return q, 0, nil
}

// wantsText reports whether the answer is to be read by people.
func wantsText(r *http.Request) bool {
	for _, accept := range r.Header.Values("Accept") {
		for kind := range strings.SplitSeq(accept, ",") {
			kind, _, _ = strings.Cut(kind, ";")
			switch strings.TrimSpace(kind) {
			case "text/plain", "text/*":
				return true
			case "application/json", "*/*":
				return false
			}
		}
	}
	return false
}

// writeExplanation writes what people read: what it came to, and each step with
// its place.
func writeExplanation(w io.Writer, x *tenants.Explanation) {
	var b strings.Builder
	if x.DecisionID != "" {
		fmt.Fprintf(&b, "decision %s of tenant %s\n", x.DecisionID, x.Tenant)
	} else {
		fmt.Fprintf(&b, "an input to tenant %s\n", x.Tenant)
	}
	if t := x.Then; t != nil {
		by := "by what decides now"
		if !t.Same {
			by = "by " + revisions(t.Bundles) + ", which is not what decides now"
		}
		fmt.Fprintf(&b, "then: %s at %s, %s\n", t.Outcome, t.Time.UTC().Format("2006-01-02T15:04:05.000Z"), by)
	}
	if x.Outcome != "" {
		fmt.Fprintf(&b, "now: %s, by %s, asked for %s of the %s's policy\n", x.Outcome, revisions(x.Bundles), x.Path, x.Policy)
	}
	if len(x.Result) > 0 {
		fmt.Fprintf(&b, "result: %s\n", x.Result)
	}
	if len(x.Error) > 0 {
		fmt.Fprintf(&b, "error: %s\n", x.Error)
	}
	for _, n := range x.Notes {
		fmt.Fprintf(&b, "note: %s\n", n)
	}
	width := 0
	places := make([]string, len(x.Trace))
	for i, s := range x.Trace {
		if s.Line > 0 {
			places[i] = fmt.Sprintf("%s:%d", s.File, s.Line)
		}
		width = max(width, len(places[i]))
	}
	if len(places) > 0 {
		b.WriteByte('\n')
	}
	for i, s := range x.Trace {
		fmt.Fprintf(&b, "%-*s  %s%-5s %s", width, places[i], strings.Repeat("| ", s.Depth), s.Op, s.Text)
		if s.Times > 1 {
			fmt.Fprintf(&b, "  (%d times)", s.Times)
		}
		b.WriteByte('\n')
	}
	if len(x.Prints) > 0 {
		b.WriteString("\nprinted:\n")
	}
	for _, p := range x.Prints {
		fmt.Fprintf(&b, "%s:%d  %s\n", p.File, p.Line, p.Text)
	}
	_, _ = io.WriteString(w, b.String()) // the client is gone
}

// revisions names bundles and their revisions.
func revisions(bundles map[string]string) string {
	var list []string
	for _, name := range slices.Sorted(maps.Keys(bundles)) {
		if bundles[name] == "" {
			list = append(list, fmt.Sprintf("bundle %s", name))
			continue
		}
		list = append(list, fmt.Sprintf("bundle %s at revision %q", name, bundles[name]))
	}
	if len(list) == 0 {
		return "nothing"
	}
	return strings.Join(list, ", ")
}
