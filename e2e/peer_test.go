package e2e

import (
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

// The recordings are those of the real thing. With -peer the cases are run with
// it; -update writes them anew.
func TestPeerRecordings(t *testing.T) {
	if *peerBinary == "" {
		t.Skip("no opa-envoy-plugin: the recordings stand (-peer or PEER names one)")
	}
	eachPeerCase(t, func(t *testing.T, c *peerCase) {
		rec := runPeer(t, c)
		if *peerUpdate {
			if err := c.write(rec); err != nil {
				t.Fatal(err)
			}
			return
		}
		compareLists(t, "events", normaliseAll(rec.events), c.recordedList("events.json"))
		compareLists(t, "status", normaliseAll(rec.statuses), c.recordedList("status.json"))
		equal(t, "answers", strings.Join(rec.answers, "\n")+"\n", c.text("answers.txt"))
		equal(t, "posts", strings.Join(rec.posts, "\n")+"\n", c.text("posts.txt"))
	})
}

// runPeer runs a case with opa-envoy-plugin.
func runPeer(t *testing.T, c *peerCase) *peerRecord {
	t.Helper()
	r := c.recorder(t)
	addr, err := stage.FreeAddr()
	if err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(t.TempDir(), "opa.yaml")
	text := strings.ReplaceAll(c.text("opa.yaml"), placeholder, r.URL)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(*peerBinary, "run", "--server", "--addr=127.0.0.1:0", "--disable-telemetry",
		"--config-file", config, "--set=plugins.envoy_ext_authz_grpc.addr="+addr)
	cmd.Env = []string{"STAGE=test"} // policies can read it, and events may have it
	p, err := stage.Start("opa-envoy-plugin", cmd)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Kill()
		t.Logf("output of %s:\n%s", p.Name, tail(p.Output(), 4<<10))
	})
	eventually(t, "opa-envoy-plugin listens", func() bool {
		conn, err := net.Dial("tcp", addr)
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	rec := c.run(t, r, p, addr)
	logRecord(t, rec)
	return rec
}

// logRecord shows what came, as it came but for the metrics of the process.
func logRecord(t *testing.T, rec *peerRecord) {
	t.Helper()
	for _, list := range []struct {
		what  string
		texts []json.RawMessage
	}{{"event", rec.events}, {"status", rec.statuses}} {
		for _, text := range list.texts {
			var v map[string]json.RawMessage
			if json.Unmarshal(text, &v) == nil && list.what == "status" {
				delete(v, "metrics")
			}
			t.Logf("%s: %s", list.what, compact(v))
		}
	}
	t.Logf("answers: %s; posts: %s", strings.Join(rec.answers, ", "), slices.Clip(rec.posts))
}

// The same configuration, bundles and requests give the events and status
// messages that opa-envoy-plugin was recorded with, but for what deliberate
// lists.
func TestPeer(t *testing.T) {
	eachPeerCase(t, func(t *testing.T, c *peerCase) {
		r := c.recorder(t)
		config := c.gatehouse(t, r)
		g := serve(t, stage.Listen+config)
		rec := c.run(t, r, g.Process, g.GRPC)
		logRecord(t, rec)

		got, want := normaliseAll(rec.events), c.recordedList("events.json")
		posts, wantPosts := strings.Join(rec.posts, "\n")+"\n", c.text("posts.txt")
		switch {
		case slices.Contains(unloaded, c.name()):
			posts, wantPosts = withoutLogs(posts), withoutLogs(wantPosts)
		case c.name() == "logs-413":
			// What a service finds too large alone does not become smaller: it is
			// dropped, and counted, and what comes after it is delivered.
			compareLists(t, "events", got, nil)
		default:
			adjust(c, "event", got, want)
			compareLists(t, "events", got, want)
		}
		got, want = normaliseAll(rec.statuses), c.recordedList("status.json")
		adjust(c, "status", got, want)
		compareLists(t, "status", got, want)
		equal(t, "posts", posts, wantPosts)
		for _, req := range r.Requests("/logs") {
			if limit := c.uploadLimit(); req.Wire > limit {
				t.Errorf("an upload has %d bytes, want at most %d", req.Wire, limit)
			}
		}
	})
}

// peerTenant is the only tenant there.
const peerTenant = "orders"

// gatehouse returns the case as a configuration of gatehouse.
func (c *peerCase) gatehouse(t *testing.T, r *stage.Recorder) string {
	t.Helper()
	text, err := yaml.Marshal(object{
		"tenants": object{"default": peerTenant, "preload": []string{peerTenant}},
		"redact":  "none",
		"opa":     c.config,
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.ReplaceAll(string(text), placeholder, r.URL)
}

// uploadLimit returns the bytes that an upload of the case may have.
func (c *peerCase) uploadLimit() int {
	var config struct {
		Logs struct {
			Reporting struct {
				Limit int `yaml:"upload_size_limit_bytes"`
			}
		} `yaml:"decision_logs"`
	}
	if yaml.Unmarshal([]byte(c.text("opa.yaml")), &config) != nil || config.Logs.Reporting.Limit == 0 {
		return 32768
	}
	return config.Logs.Reporting.Limit
}

// unloaded are cases in which a tenant has not all of its bundles. The plugin
// evaluates what it has, which may be nothing; gatehouse answers that the tenant
// is not ready, which is no decision of a policy, or that there is none: that is
// not logged, since anybody may invent a name.
var unloaded = []string{
	"status-404", "status-500", "status-corrupt", "status-compile-error", "status-parse-error", "status-data-error",
	"status-roots", "status-overlap", "status-two-bundles",
}

// withoutLogs leaves out of posts those of events.
func withoutLogs(posts string) string {
	var rest strings.Builder
	for line := range strings.Lines(posts) {
		if !strings.HasPrefix(line, "/logs") {
			rest.WriteString(line)
		}
	}
	return rest.String()
}

// deliberate are the differences that are meant. Each makes what is got and what
// is wanted alike where they differ as they should, and only there.
var deliberate = []struct {
	what  string
	why   string
	of    string   // event or status
	cases []string // all, if there are none
	alike func(got, want object)
}{
	{
		what: "labels.tenant", of: "event", alike: tenantLabel,
		why: "many tenants share a process, and perhaps a log",
	},
	{
		what: "labels.tenant", of: "status", alike: tenantLabel,
		why: "as for events",
	},
	{
		what: "decision_id in the metadata of the input", of: "event",
		why: "a policy can hand it on; it is where Skipper has it",
		alike: func(got, _ object) {
			if got, ok := at(got, "input", "attributes", "metadataContext", "filterMetadata", "open_policy_agent"); ok {
				delete(got, "decision_id")
			}
			// Parents that were made only for it go too, as far as the request had none.
			for _, path := range [][]string{
				{"input", "attributes", "metadataContext", "filterMetadata", "open_policy_agent"},
				{"input", "attributes", "metadataContext", "filterMetadata"},
			} {
				removeEmpty(got, path...)
			}
		},
	},
	{
		what: "no metadataContext, attributes", of: "event", cases: []string{"empty-request"},
		why: "they were made only for the decision_id",
		alike: func(got, _ object) {
			removeEmpty(got, "input", "attributes", "metadataContext")
			removeEmpty(got, "input", "attributes")
		},
	},
	{
		what: "input.version", of: "event",
		why: "it is what the policy saw, so that the event can be replayed",
		alike: func(got, want object) {
			g, _ := at(got, "input")
			w, _ := at(want, "input")
			if compact(g["version"]) == `{"encoding":"protojson","ext_authz":"v3"}` && strings.HasPrefix(compact(w["version"]), `[[{"type":"string"`) {
				w["version"] = g["version"]
			}
		},
	},
	{
		what: "input of a request that cannot be parsed", of: "event", cases: []string{"bad-request", "mask-bad-request"},
		why: "what was read of it may be logged, or null",
		alike: func(got, want object) {
			if _, failed := want["error"]; failed && want["input"] == nil {
				delete(got, "input")
				delete(want, "input")
			}
		},
	},
	{
		what: "error.message of a request that cannot be parsed, or of an ill-typed result", of: "event",
		cases: []string{"bad-request", "mask-bad-request", "ill-typed"},
		why:   "it is the text of a parser, or names a Go type",
		alike: messages,
	},
	{
		what: "error.message of a conflict", of: "event", cases: []string{"conflict", "nd-builtin-cache"},
		why: "a newer OPA says which rule it was",
		alike: func(got, want object) {
			if e, ok := at(want, "error"); ok && e["code"] == "eval_conflict_error" {
				messages(got, want)
			}
		},
	},
	{
		what: "rule_labels", of: "event", cases: []string{"rule-labels"},
		why: "they are of a newer OPA",
		alike: func(got, want object) {
			severity := map[bool]string{true: "low", false: "high"}
			if result, ok := want["result"].(bool); ok {
				want["rule_labels"] = []any{object{"severity": severity[result]}}
			}
		},
	},
	{
		what: "metrics.timer_rego_query_compile_ns", of: "event",
		why:   "queries are compiled before a bundle is activated, not by the first check",
		alike: func(_, want object) { without(want, "metrics", "timer_rego_query_compile_ns") },
	},
	{
		what: "metrics.timer_rego_external_resolve_ns", of: "event",
		why: "data is read without a store's resolver",
		alike: func(got, want object) {
			without(got, "metrics", "timer_rego_external_resolve_ns")
			without(want, "metrics", "timer_rego_external_resolve_ns")
		},
	},
	{
		what: "masks of elements of paths, queries and forms", of: "event", cases: []string{"mask-lists"},
		why: "a mask is of the input as the policy sees it",
		alike: func(_, want object) {
			input, _ := at(want, "input")
			input["parsed_path"] = []any{"orders"}
			input["parsed_query"] = object{"a": []any{"2"}}
			input["parsed_body"] = object{"b": []any{"1"}}
			want["erased"] = []any{"/input/parsed_body/password", "/input/parsed_path/1", "/input/parsed_query/a/0", "/input/parsed_query/token"}
		},
	},
	{
		what: "what a mask sees", of: "event", cases: []string{"mask-sees"},
		why: "a newer OPA shows it the metrics too",
		alike: func(_, want object) {
			seen, _ := want["result"].([]any)
			if i := slices.Index(seen, any("nd_builtin_cache")); i >= 0 {
				want["result"] = slices.Insert(slices.Clone(seen), i, any("metrics"))
			}
		},
	},
	{
		what: "metrics of the process", of: "status",
		why: "they are not a tenant's",
		alike: func(got, want object) {
			delete(got, "metrics")
			delete(want, "metrics")
		},
	},
	{
		what: "custom.dry_run", of: "event", cases: []string{"dry-run"},
		why: "it says that a denial was let through",
		alike: func(got, _ object) {
			if compact(got["custom"]) == `{"dry_run":true}` {
				delete(got, "custom")
			}
		},
	},
	{
		what: "error.location.file", of: "event",
		why: "files of a bundle are named as opa build does, however the archive names them",
		alike: func(got, _ object) {
			if location, ok := at(got, "error", "location"); ok {
				withoutSlash(location)
			}
		},
	},
	{
		what: "bundles.NAME.errors.location.file", of: "status",
		why: "as for events",
		alike: func(got, _ object) {
			eachBundle(got, got, func(b, _ object) {
				errors, _ := b["errors"].([]any)
				for _, e := range errors {
					if e, ok := e.(object); ok {
						if location, ok := at(e, "location"); ok {
							withoutSlash(location)
						}
					}
				}
			})
		},
	},
	{
		what: "bundles.NAME.metrics", of: "status",
		why: "a bundle is read as it comes, and what another tenant has read or compiled is used again",
		alike: func(got, want object) {
			eachBundle(got, want, func(got, want object) {
				g, _ := got["metrics"].(object)
				w, _ := want["metrics"].(object)
				for _, name := range []string{"timer_rego_load_bundles_ns", "timer_rego_module_parse_ns"} {
					delete(w, name)
				}
				if got["code"] != nil { // they are of the last one that was well
					clear(g)
					clear(w)
				}
				if len(g) == 0 && len(w) == 0 {
					delete(got, "metrics")
					delete(want, "metrics")
				}
			})
		},
	},
	{
		what: "bundles.NAME of a bundle that is refused as it is read", of: "status", cases: []string{"status-roots", "status-data-error", "status-corrupt"},
		why: "it is checked before it counts as downloaded, and the message says where it was from",
		alike: func(got, want object) {
			eachBundle(got, want, func(got, want object) {
				if message, _ := got["message"].(string); !strings.Contains(message, "bundle refused: ") {
					return
				}
				for _, name := range []string{"message", "type", "last_successful_download", "last_successful_request"} {
					delete(got, name)
					delete(want, name)
				}
			})
		},
	},
	{
		what: "bundles.NAME beside one that is missing", of: "status", cases: []string{"status-two-bundles", "status-overlap"},
		why: "bundles decide together or not at all",
		alike: func(got, want object) {
			eachBundle(got, want, func(got, want object) {
				if got["code"] != nil {
					return
				}
				for _, name := range []string{
					"active_revision", "last_request", "last_successful_activation", "last_successful_download", "last_successful_request", "metrics", "size", "type",
				} {
					delete(got, name)
					delete(want, name)
				}
			})
		},
	},
	{
		what: "bundles.NAME of those that overlap", of: "status", cases: []string{"status-overlap"},
		why: "bundles decide together or not at all",
		alike: func(got, want object) {
			eachBundle(got, want, func(got, want object) {
				message, _ := got["message"].(string)
				if message != `bundles "main" and "more" overlap: roots "envoy" and "envoy/authz"` || got["code"] != "bundle_error" {
					return
				}
				for _, name := range []string{"code", "message", "active_revision", "last_successful_activation", "size"} {
					delete(got, name)
					delete(want, name)
				}
			})
		},
	},
	{
		what: "discovery.message", of: "status", cases: []string{"discovery-update-broken", "discovery-changes-service", "discovery-broken"},
		why: "it names the keys at fault",
		alike: func(got, want object) {
			g, _ := at(got, "discovery")
			w, _ := at(want, "discovery")
			if message, _ := g["message"].(string); strings.HasPrefix(message, "discovery.") && w["message"] != nil {
				w["message"] = message
			}
		},
	},
	{
		what: "decision_logs", of: "status", cases: []string{"logs-413"},
		why:   "what is too large was dropped",
		alike: func(got, want object) { want["decision_logs"] = object{} },
	},
}

// adjust applies the deliberate differences.
func adjust(c *peerCase, of string, got, want []object) {
	for _, d := range deliberate {
		if d.of != of || len(d.cases) > 0 && !slices.Contains(d.cases, c.name()) {
			continue
		}
		for i := range min(len(got), len(want)) {
			d.alike(got[i], want[i])
		}
	}
}

// at returns the object at a path.
func at(v object, path ...string) (object, bool) {
	for _, name := range path {
		next, ok := v[name].(object)
		if !ok {
			return nil, false
		}
		v = next
	}
	return v, true
}

// without removes what is at a path.
func without(v object, path ...string) {
	if parent, ok := at(v, path[:len(path)-1]...); ok {
		delete(parent, path[len(path)-1])
	}
}

// removeEmpty removes an object at a path that has nothing in it.
func removeEmpty(v object, path ...string) {
	if o, ok := at(v, path...); ok && len(o) == 0 {
		without(v, path...)
	}
}

// eachBundle calls f with each bundle that two status messages have.
func eachBundle(got, want object, f func(got, want object)) {
	all, _ := at(got, "bundles")
	for name := range all {
		g, _ := at(got, "bundles", name)
		if w, ok := at(want, "bundles", name); ok && g != nil {
			f(g, w)
		}
	}
}

// withoutSlash has the file of a location begin without a slash.
func withoutSlash(location object) {
	if file, ok := location["file"].(string); ok {
		location["file"] = strings.TrimPrefix(file, "/")
	}
}

func tenantLabel(_, want object) {
	if labels, ok := at(want, "labels"); ok {
		labels["tenant"] = peerTenant
	}
}

// messages makes messages of errors alike, if there is one on both sides.
func messages(got, want object) {
	g, _ := at(got, "error")
	w, _ := at(want, "error")
	if text, ok := g["message"].(string); ok && text != "" && w["message"] != nil {
		w["message"] = text
	}
}

// The normaliser blanks what differs from run to run, and leaves what does not.
func TestPeerNormalise(t *testing.T) {
	got := compact(normalise(json.RawMessage(`{
		"decision_id": "4f1d", "timestamp": "2024-01-02T03:04:05Z", "labels": {"id": "1", "version": "1.15.2", "app": "shop"},
		"metrics": {"timer_server_handler_ns": 12}, "nd_builtin_cache": {"time.now_ns": {"[]": 17}}, "input": {"timestamp": "2024-01-02T03:04:05Z"}
	}`)))
	equal(t, "event", got, `{"decision_id":"ID","input":{"timestamp":"2024-01-02T03:04:05Z"},"labels":{"app":"shop","id":"ID","version":"VERSION"},`+
		`"metrics":{"timer_server_handler_ns":0},"nd_builtin_cache":{"time.now_ns":{"[]":"VALUE"}},"timestamp":"TIME"}`)
	got = compact(normalise(json.RawMessage(`{
		"labels": {"id": "1"}, "metrics": {"prometheus": {"go_goroutines": {}}},
		"bundles": {"main": {"last_request": "2024-01-02T03:04:05Z", "last_successful_download": "0001-01-01T00:00:00Z", "size": 7, "metrics": {"timer_bundle_request_ns": 9}}}
	}`)))
	equal(t, "status", got, `{"bundles":{"main":{"last_request":"TIME","last_successful_download":"0001-01-01T00:00:00Z","metrics":{"timer_bundle_request_ns":0},"size":0}},`+
		`"labels":{"id":"ID"},"metrics":{"prometheus":{}}}`)
}
