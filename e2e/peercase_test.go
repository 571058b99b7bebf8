package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"go.yaml.in/yaml/v3"
	"golang.org/x/tools/txtar"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
	"github.com/gatehouse-authz/gatehouse/e2e/traffic"
)

var (
	peerBinary = flag.String("peer", os.Getenv("PEER"), "opa-envoy-plugin, to compare with the recordings; default $PEER")
	peerUpdate = flag.Bool("update", false, "with -peer, write the recordings anew")
)

// peerCase is one file of testdata/peer; its README says what is in it.
type peerCase struct {
	file     string
	archive  *txtar.Archive
	config   object // of OPA, without the address of the recorder
	requests []*authv3.CheckRequest
	answers  map[string]routeAnswer
}

// routeAnswer is how a path of the recorder is answered instead.
type routeAnswer struct {
	Status  int
	Text    string
	Partial bool
}

// peerRecord is what came of a case.
type peerRecord struct {
	answers  []string          // to the checks, in their order
	events   []json.RawMessage // in the order of their time
	statuses []json.RawMessage // the last one of each phase
	posts    []string          // "path header: value ...", each once and sorted
}

func readPeerCase(t *testing.T, file string) *peerCase {
	t.Helper()
	archive, err := txtar.ParseFile(file)
	if err != nil {
		t.Fatal(err)
	}
	c := &peerCase{file: file, archive: archive}
	if err := yaml.Unmarshal([]byte(c.text("opa.yaml")), &c.config); err != nil {
		t.Fatalf("opa.yaml: %v", err)
	}
	if err := yaml.Unmarshal([]byte(c.text("answers.yaml")), &c.answers); err != nil {
		t.Fatalf("answers.yaml: %v", err)
	}
	var list []json.RawMessage
	if err := json.Unmarshal([]byte(c.text("requests.json")), &list); err != nil {
		t.Fatalf("requests.json: %v", err)
	}
	for i, raw := range list {
		req := &authv3.CheckRequest{}
		if err := protojson.Unmarshal(raw, req); err != nil {
			t.Fatalf("requests.json: %d: %v", i, err)
		}
		c.requests = append(c.requests, req)
	}
	return c
}

// name is the name of the file without its ending.
func (c *peerCase) name() string { return strings.TrimSuffix(filepath.Base(c.file), ".txtar") }

// text returns a file of the archive, or "".
func (c *peerCase) text(name string) string {
	for _, f := range c.archive.Files {
		if f.Name == name {
			return string(f.Data)
		}
	}
	return ""
}

// folders returns the files below a folder of the archive, by its subfolders.
func (c *peerCase) folders(under string) map[string]map[string]string {
	all := map[string]map[string]string{} // :: subfolder → path → text
	for _, f := range c.archive.Files {
		rest, ok := strings.CutPrefix(f.Name, under+"/")
		if !ok {
			continue
		}
		name, path, _ := strings.Cut(rest, "/")
		if all[name] == nil {
			all[name] = map[string]string{}
		}
		all[name][path] = string(f.Data)
	}
	return all
}

// hasThen reports whether there is a second phase.
func (c *peerCase) hasThen() bool { return len(c.folders("then")) > 0 }

// recorder starts a recorder that has what the first phase needs.
func (c *peerCase) recorder(t *testing.T) *stage.Recorder {
	t.Helper()
	r, err := stage.StartRecorder()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	r.LongPolls(true)
	for name, files := range c.folders("bundles") {
		r.Put("/bundles/"+name+".tar.gz", stage.Bundle(c.addressed(files, r)))
	}
	for path, a := range c.answers {
		if a.Text != "" {
			r.Put(path, []byte(a.Text))
		}
		if a.Status != 0 || a.Partial {
			r.Ail(path, stage.Fault{Status: a.Status, Partial: a.Partial})
		}
	}
	return r
}

// then puts what the second phase needs.
func (c *peerCase) then(r *stage.Recorder) {
	deltas := c.folders("then/deltas")
	for name, files := range c.folders("then/bundles") {
		path, data := "/bundles/"+name+".tar.gz", stage.Bundle(c.addressed(files, r))
		if delta, ok := deltas[name]; ok {
			r.PutDelta(path, data, stage.Bundle(delta))
		} else {
			r.Put(path, data)
		}
	}
}

// placeholder stands for the address of the recorder in a case.
const placeholder = "http://recorder"

func (c *peerCase) addressed(files map[string]string, r *stage.Recorder) map[string]string {
	files = maps.Clone(files)
	for name, text := range files {
		files[name] = strings.ReplaceAll(text, placeholder, r.URL)
	}
	return files
}

// run asks the requests of a case, at an address where a subject answers that is
// managed by the recorder, and ends the subject, which sends what it has kept.
// Events and status messages that do not come are waited for in vain, for a
// bounded time.
func (c *peerCase) run(t *testing.T, r *stage.Recorder, subject *stage.Process, addr string) *peerRecord {
	t.Helper()
	client, err := traffic.New(traffic.Config{Target: addr, Requests: []*authv3.CheckRequest{{}}})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	rec := &peerRecord{}
	wantEvents := len(c.recordedList("events.json"))
	phase := func(share int) {
		settled(t, r, last(rec.statuses))
		for _, req := range c.requests {
			resp, err := client.Check(context.Background(), req)
			rec.answers = append(rec.answers, traffic.OutcomeOf(resp, err))
		}
		waitFor(3*time.Second, func() bool {
			events, err := r.Events("/logs")
			return err == nil && len(events) > 0 && len(events) >= wantEvents*share/2
		})
		rec.statuses = append(rec.statuses, settled(t, r, last(rec.statuses)))
	}
	if c.hasThen() {
		phase(1)
		c.then(r)
		phase(2)
	} else {
		phase(2)
	}
	for path := range c.answers {
		r.Heal(path) // so that what was kept arrives
	}
	if err := subject.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if _, err := subject.Wait(15 * time.Second); err != nil {
		t.Error(err)
	}
	if rec.events, err = r.Events("/logs"); err != nil {
		t.Error(err)
	}
	for i, e := range rec.events {
		rec.events[i] = c.placed(r, e)
	}
	for i, s := range rec.statuses {
		rec.statuses[i] = c.placed(r, s)
	}
	slices.SortStableFunc(rec.events, func(a, b json.RawMessage) int { return timeOf(a).Compare(timeOf(b)) })
	rec.posts = postsOf(r)
	return rec
}

// placed undoes addressed.
func (c *peerCase) placed(r *stage.Recorder, text json.RawMessage) json.RawMessage {
	return bytes.ReplaceAll(bytes.ReplaceAll(text, []byte(r.URL), []byte(placeholder)), []byte(r.Addr()), []byte("recorder"))
}

func timeOf(event json.RawMessage) time.Time {
	var e struct{ Timestamp time.Time }
	_ = json.Unmarshal(event, &e) // without a time it comes first, and is told of as different
	return e.Timestamp
}

func last[T any](list []T) (zero T) {
	if len(list) == 0 {
		return zero
	}
	return list[len(list)-1]
}

// settled returns the last status message once bundles and discovery have come
// to an end, it differs from the one before, and nothing more has come for a
// while. It returns what there is when that takes too long.
func settled(t *testing.T, r *stage.Recorder, before json.RawMessage) json.RawMessage {
	t.Helper()
	const quiet = 500 * time.Millisecond
	var now json.RawMessage
	var same string
	since := time.Now()
	ok := waitFor(6*time.Second, func() bool {
		all, err := r.Statuses("/status")
		if err != nil {
			t.Fatal(err)
		}
		now = last(all)
		text := pretty(normalise(now))
		if text != same {
			same, since = text, time.Now()
		}
		return ended(now) && time.Since(since) > quiet && (before == nil || text != pretty(normalise(before)))
	})
	if !ok {
		t.Logf("status did not settle; the last one is %s", now)
	}
	return now
}

// ended reports whether each bundle and discovery of a status message is active,
// or one is at fault.
func ended(status json.RawMessage) bool {
	type one struct {
		Activation time.Time `json:"last_successful_activation"`
		Code       string
	}
	var s struct {
		Bundles   map[string]*one
		Discovery *one
	}
	if json.Unmarshal(status, &s) != nil || s.Discovery == nil && len(s.Bundles) == 0 {
		return false
	}
	waits := false
	for _, b := range append(slices.Collect(maps.Values(s.Bundles)), s.Discovery) {
		switch {
		case b == nil:
		case b.Code != "":
			return true
		case b.Activation.IsZero():
			waits = true
		}
	}
	return !waits
}

func waitFor(atMost time.Duration, ok func() bool) bool {
	for end := time.Now().Add(atMost); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			return false
		}
	}
	return true
}

// postsOf returns how logs and status messages were posted.
func postsOf(r *stage.Recorder) []string {
	seen := map[string]bool{}
	for _, req := range r.Requests("/") {
		if req.Method != http.MethodPost {
			continue
		}
		line := req.Path
		for _, name := range []string{"Authorization", "Content-Encoding", "Content-Type", "X-Team"} {
			if v := req.Header.Get(name); v != "" {
				line += " " + strings.ToLower(name) + "=" + v
			}
		}
		seen[line] = true
	}
	return slices.Sorted(maps.Keys(seen))
}

// normalise blanks what no two runs have alike, and nothing else:
//
//   - decision_id, labels.id and labels.version are "ID" and "VERSION";
//   - times (timestamp, last_request, last_successful_*) are "TIME", but for
//     the zero time, which says that something never happened;
//   - values of metrics are 0, their names stay; of the metrics of the process
//     in a status message the names of their providers stay;
//   - the size of a bundle is 0;
//   - results in nd_builtin_cache are "VALUE", their names and arguments stay.
func normalise(text json.RawMessage) object {
	var v object
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	if d.Decode(&v) != nil {
		return nil
	}
	if _, ok := v["decision_id"]; ok {
		v["decision_id"] = "ID"
	}
	if labels, ok := v["labels"].(object); ok {
		for name, blank := range map[string]string{"id": "ID", "version": "VERSION"} {
			if _, ok := labels[name]; ok {
				labels[name] = blank
			}
		}
	}
	normaliseTimes(v)
	if _, event := v["decision_id"]; event {
		normaliseMetrics(v)
	} else if metrics, ok := v["metrics"].(object); ok {
		for provider := range metrics {
			metrics[provider] = object{}
		}
	}
	bundles, _ := v["bundles"].(object)
	for _, b := range append(slices.Collect(maps.Values(bundles)), v["discovery"], v["decision_logs"]) {
		if b, ok := b.(object); ok {
			normaliseTimes(b)
			normaliseMetrics(b)
			if _, ok := b["size"]; ok {
				b["size"] = 0
			}
		}
	}
	if cache, ok := v["nd_builtin_cache"].(object); ok {
		for _, calls := range cache {
			if calls, ok := calls.(object); ok {
				for arguments := range calls {
					calls[arguments] = "VALUE"
				}
			}
		}
	}
	return v
}

func normaliseTimes(v object) {
	for _, name := range []string{"timestamp", "last_request", "last_successful_request", "last_successful_download", "last_successful_activation"} {
		if s, ok := v[name].(string); ok && !strings.HasPrefix(s, "0001-01-01T") {
			v[name] = "TIME"
		}
	}
}

func normaliseMetrics(v object) {
	if metrics, ok := v["metrics"].(object); ok {
		for name := range metrics {
			metrics[name] = 0
		}
	}
}

func normaliseAll(texts []json.RawMessage) []object {
	all := []object{}
	for _, text := range texts {
		all = append(all, normalise(text))
	}
	return all
}

// recordedList returns a recorded file of the case.
func (c *peerCase) recordedList(name string) []object {
	var list []object
	d := json.NewDecoder(strings.NewReader(c.text(name)))
	d.UseNumber()
	_ = d.Decode(&list) // without a recording it is empty
	return list
}

// write puts what came of the case into its file.
func (c *peerCase) write(rec *peerRecord) error {
	next := &txtar.Archive{Comment: c.archive.Comment}
	recorded := []string{"answers.txt", "events.json", "status.json", "posts.txt"}
	for _, f := range c.archive.Files {
		if !slices.Contains(recorded, f.Name) {
			next.Files = append(next.Files, f)
		}
	}
	for i, text := range []string{
		strings.Join(rec.answers, "\n") + "\n", pretty(normaliseAll(rec.events)), pretty(normaliseAll(rec.statuses)), strings.Join(rec.posts, "\n") + "\n",
	} {
		next.Files = append(next.Files, txtar.File{Name: recorded[i], Data: []byte(text)})
	}
	return os.WriteFile(c.file, txtar.Format(next), 0o644)
}

func pretty(v any) string {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(v); err != nil {
		return err.Error()
	}
	return b.String()
}

// differences returns where two JSON values differ, one line each: the place,
// what is there and what should be.
func differences(place string, got, want any) []string {
	if g, ok := got.(object); ok {
		if w, ok := want.(object); ok {
			names := object{}
			maps.Copy(names, g)
			maps.Copy(names, w)
			var all []string
			for _, name := range slices.Sorted(maps.Keys(names)) {
				gv, gok := g[name]
				wv, wok := w[name]
				switch at := place + "/" + name; {
				case !gok:
					all = append(all, fmt.Sprintf("%s: missing, want %s", at, compact(wv)))
				case !wok:
					all = append(all, fmt.Sprintf("%s: got %s, want none", at, compact(gv)))
				default:
					all = append(all, differences(at, gv, wv)...)
				}
			}
			return all
		}
	}
	if g, ok := got.([]any); ok {
		if w, ok := want.([]any); ok && len(g) == len(w) {
			var all []string
			for i := range g {
				all = append(all, differences(fmt.Sprintf("%s/%d", place, i), g[i], w[i])...)
			}
			return all
		}
	}
	if g, w := compact(got), compact(want); g != w {
		return []string{fmt.Sprintf("%s: got %s, want %s", place, g, w)}
	}
	return nil
}

func compact(v any) string {
	text, err := json.Marshal(v)
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// compareLists reports the differences of events or status messages.
func compareLists(t *testing.T, what string, got, want []object) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("%s: got %d, want %d: %s", what, len(got), len(want), tail(compact(got), 4<<10))
		return
	}
	for i := range got {
		for _, d := range differences(fmt.Sprintf("%s/%d", what, i), got[i], want[i]) {
			t.Error(d)
		}
	}
}

// eachPeerCase runs a test for each case.
func eachPeerCase(t *testing.T, test func(t *testing.T, c *peerCase)) {
	t.Helper()
	files, err := filepath.Glob("testdata/peer/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no cases: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			t.Parallel()
			test(t, readPeerCase(t, file))
		})
	}
}
