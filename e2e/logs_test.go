package e2e

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Decisions go to S3, to a file and to standard output at once, the same to
// each, and what is buffered when the server ends is there too. Secrets are not.
func TestLogsToS3AndFile(t *testing.T) {
	const secret = "the-secret-of-a-client"
	s3 := startS3(t)
	upload(t, s3, "orders", version("v1"))
	file := filepath.Join(t.TempDir(), "decisions.jsonl")
	config := s3Config(s3, filepath.Join(t.TempDir(), "bundles")) + fmt.Sprintf(`
  decision_logs:
    console: true
    file: {path: %q}
    s3: {service: s3, prefix: "decisions/{{ .tenant }}"}
    reporting: {min_delay_seconds: 0.5, max_delay_seconds: 0.5}
`, file)
	g := as(t, s3.Root, config)
	n := s3Envoy(t, g, "orders")

	var ids []string
	for i := range 20 {
		resp := n.get(t, "main", fmt.Sprintf("/orders/%d", i), "authorization: Bearer "+secret, "cookie: session="+secret)
		ids = append(ids, n.logged(t, resp)["decision_id"].(string))
		if i == 10 {
			eventually(t, "decisions in the bucket", func() bool { return len(logObjects(t, s3.List)) > 0 })
		}
	}
	if err := g.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if code, err := g.Wait(10 * time.Second); err != nil || code != 0 {
		t.Fatalf("exit %d, %v", code, err)
	}

	sources := map[string][]byte{"console": []byte(g.Output())}
	var err error
	if sources["file"], err = os.ReadFile(file); err != nil {
		t.Fatal(err)
	}
	for _, key := range logObjects(t, s3.List) {
		_, body, err := s3.Get(s3.Root, bucket, key)
		if err != nil {
			t.Fatal(err)
		}
		r, err := gzip.NewReader(bytes.NewReader(body))
		if err != nil {
			t.Fatalf("%s: %v", key, err)
		}
		var text bytes.Buffer
		if _, err := text.ReadFrom(r); err != nil {
			t.Fatalf("%s: %v", key, err)
		}
		sources["s3"] = append(sources["s3"], text.Bytes()...)
	}
	for name, text := range sources {
		if bytes.Contains(text, []byte(secret)) {
			t.Errorf("%s: has the secret", name)
		}
		var got []string
		lines := bufio.NewScanner(bytes.NewReader(text))
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			var event struct {
				DecisionID string `json:"decision_id"`
				Labels     map[string]string
				Bundles    map[string]struct{ Revision string }
				Result     any
				Masked     []string
			}
			if json.Unmarshal(lines.Bytes(), &event) != nil || event.Labels == nil {
				continue // a line of the program's own log
			}
			got = append(got, event.DecisionID)
			if event.Labels["tenant"] != "orders" || event.Result == nil || len(event.Bundles) != 1 ||
				!strings.Contains(strings.Join(event.Masked, " "), "/input/attributes/request/http/headers/authorization") {
				t.Errorf("%s: got event %s", name, lines.Bytes())
			}
		}
		equal(t, "decisions in "+name, got, ids)
	}
}

// logObjects are the keys of the logged decisions, oldest first.
func logObjects(t *testing.T, list func(bucket string) ([]string, error)) []string {
	t.Helper()
	keys, err := list(bucket)
	if err != nil {
		t.Fatal(err)
	}
	var logs []string
	for _, key := range keys {
		if strings.HasPrefix(key, "decisions/orders/2") && strings.HasSuffix(key, ".jsonl.gz") {
			logs = append(logs, key)
		}
	}
	return logs
}
