package kubernetes

import (
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/pod-security-admission/api"
	"k8s.io/pod-security-admission/policy"
	kyaml "sigs.k8s.io/yaml"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

var update = flag.Bool("update", false, "rewrite the tables of the chart's README, and the example of a sidecar")

// eachValues runs a test with each file of values.
func eachValues(t *testing.T, test func(t *testing.T, name string)) {
	t.Helper()
	for _, name := range values(t) {
		t.Run(name, func(t *testing.T) { test(t, name) })
	}
}

func TestChartLint(t *testing.T) {
	eachValues(t, func(t *testing.T, name string) {
		if out, err := helm(t, "lint", "--strict", "--quiet", chart, "--values", filepath.Join(chart, "ci", name+"-values.yaml")); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	})
}

func TestChartManifests(t *testing.T) {
	eachValues(t, func(t *testing.T, name string) {
		for _, wrong := range conform(t, render(t, name)) {
			t.Error(wrong)
		}
	})
}

// What a configuration of the chart says is a configuration of Gatehouse, where its
// files are as the pod mounts them.
func TestChartConfig(t *testing.T) {
	eachValues(t, func(t *testing.T, name string) {
		p := podOf(t, render(t, name))
		p.mount(t)
		args := p.args()
		at := slices.IndexFunc(args, func(s string) bool { return strings.HasPrefix(s, "-c=") })
		if at < 0 {
			t.Fatalf("got arguments %q, want one of -c=FILE", args)
		}
		cmd := exec.Command(gatehouse(t), "validate", args[at])
		cmd.Env = append(os.Environ(), p.env()...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("gatehouse validate: %v\n%s", err, out)
		}
	})
}

// Who installs the chart is told where to ask, and that the example's server of
// bundles is none.
func TestChartNotes(t *testing.T) {
	eachValues(t, func(t *testing.T, name string) {
		out, err := helm(t, "install", "gatehouse", chart, "--namespace", "gatehouse", "--dry-run=client", "--values", filepath.Join(chart, "ci", name+"-values.yaml"))
		if err != nil {
			t.Fatal(err)
		}
		manifests, notes, _ := strings.Cut(string(out), "\nNOTES:\n")
		if example := strings.Contains(manifests, "bundles.example.com"); example != strings.Contains(notes, "still come from the address of the example") {
			t.Errorf("with bundles of the example %v, the notes are\n%s", example, notes)
		}
		where := map[string]string{"sidecar": "-sidecar", "daemonset-socket": "unix:///run/gatehouse/gatehouse.sock", "daemonset-hostport": "port 9191"}[name]
		if where == "" {
			where = ".gatehouse.svc.cluster.local:9191"
		}
		if !strings.Contains(notes, where) {
			t.Errorf("the notes do not say %q:\n%s", where, notes)
		}
	})
}

// The chart's own checks and the schema of its values name what is wrong.
func TestChartRefuses(t *testing.T) {
	for _, c := range []struct {
		values string
		set    []string
		want   string
	}{
		{"default", []string{"replica=3"}, "replica"},
		{"default", []string{"mode=cluster"}, "mode"},
		{"default", []string{"config.tenant.default=x"}, "tenant"},
		{"default", []string{"networkPolicy.enable=true"}, "enable"},
		{"default", []string{"config.drain.delay=soon"}, "delay"},
		{"default", []string{"overrides.Orders.on_error=deny"}, "Orders"},
		{"default", []string{"config.grpc.listen=127.0.0.1:9191"}, "proxies of other pods"},
		{"default", []string{"config.admin.listen=127.0.0.1:8282"}, "probes.type http"},
		{"default", []string{"config.admin.tls.client_ca=/ca.crt"}, "client_ca"},
		{"directory", []string{"config.overrides_dir=/x"}, "overrides_dir"},
		{"default", []string{"config.persist.directory=/x"}, "persistence.mountPath"},
		{"default", []string{"tls.certificate.enabled=true"}, "tls.secretName"},
		{"default", []string{"serviceMonitor.enabled=true,service.headless=false"}, "serviceMonitor"},
		{"tls", []string{"probes.type=grpc"}, "kubelet does not speak TLS"},
		{"directory", []string{"overrides.orders.on_error=deny"}, "exclude each other"},
		{"directory", []string{"podMonitor.enabled=true"}, "podMonitor"},
		{"daemonset-socket", []string{"config.grpc.listen=:9191"}, "daemonset.reach socket"},
		{"sidecar", []string{"config.grpc.listen=:9191"}, "mode sidecar"},
		{"sidecar", []string{"podMonitor.matchLabels=null"}, "matchLabels"},
	} {
		t.Run(c.values+" "+strings.Join(c.set, " "), func(t *testing.T) {
			args := []string{"template", "gatehouse", chart, "--values", filepath.Join(chart, "ci", c.values+"-values.yaml")}
			for _, s := range c.set {
				args = append(args, "--set", s)
			}
			if out, err := helm(t, args...); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want a fault that names %q\n%s", err, c.want, out[:min(200, len(out))])
			}
		})
	}
}

// standards are the Pod Security Standards that the modes fit.
var standards = map[string]api.Level{
	"default": api.LevelRestricted, "istio": api.LevelRestricted, "envoy-gateway": api.LevelRestricted, "s3": api.LevelRestricted,
	"tls": api.LevelRestricted, "sidecar": api.LevelRestricted, "daemonset": api.LevelRestricted,
	// A port and a folder of the node are more than the baseline allows.
	"daemonset-hostport": api.LevelPrivileged, "daemonset-socket": api.LevelPrivileged,
	// Its own init container says nothing of its rights.
	"directory": api.LevelBaseline,
}

func TestChartPodSecurity(t *testing.T) {
	evaluator, err := policy.NewEvaluator(policy.DefaultChecks(), nil)
	if err != nil {
		t.Fatal(err)
	}
	eachValues(t, func(t *testing.T, name string) {
		p := podOf(t, render(t, name))
		got := api.LevelPrivileged
		var why []string
		for _, level := range []api.Level{api.LevelRestricted, api.LevelBaseline} {
			results := evaluator.EvaluatePod(api.LevelVersion{Level: level, Version: api.LatestVersion()}, &p.meta, &p.PodSpec)
			if len(results) == 0 {
				t.Fatalf("nothing was checked at level %s", level)
			}
			if sum := policy.AggregateCheckResults(results); sum.Allowed {
				got = level
				break
			} else {
				why = append(why, sum.ForbiddenDetail())
			}
		}
		if want, ok := standards[name]; !ok || got != want {
			t.Errorf("fits level %q, want %q: %s", got, want, why)
		}
		for _, c := range slices.Concat(p.InitContainers, p.Containers) {
			if c.Name == "wait" {
				continue // theirs
			}
			if c.SecurityContext == nil || c.SecurityContext.ReadOnlyRootFilesystem == nil || !*c.SecurityContext.ReadOnlyRootFilesystem {
				t.Errorf("container %s can write to its root", c.Name)
			}
			if _, ok := c.Resources.Limits[corev1.ResourceMemory]; !ok {
				t.Errorf("container %s has no limit of memory", c.Name)
			}
		}
	})
}

// A pod has the time that its drain may take.
func TestChartGrace(t *testing.T) {
	eachValues(t, func(t *testing.T, name string) {
		p := podOf(t, render(t, name))
		config := struct {
			Drain struct{ Delay, Timeout time.Duration }
		}{}
		config.Drain.Delay, config.Drain.Timeout = 2*time.Second, 10*time.Second
		if err := yaml.Unmarshal([]byte(p.configs["gatehouse"]["gatehouse.yaml"]+p.configs["gatehouse-authz"]["gatehouse.yaml"]), &config); err != nil {
			t.Fatal(err)
		}
		if p.TerminationGracePeriodSeconds == nil { // the pod that has the sidecar says it
			if !strings.HasPrefix(name, "sidecar") {
				t.Error("the pod says nothing of its grace period")
			}
			return
		}
		grace := time.Duration(*p.TerminationGracePeriodSeconds) * time.Second
		// Decisions have half a second more to be delivered.
		if least := config.Drain.Delay + config.Drain.Timeout + time.Second; grace < least || grace > least+10*time.Second {
			t.Errorf("got a grace period of %s, want about %s", grace, least)
		}
	})
}

// portEdits have a pod's listeners choose their ports, on all addresses still.
var portEdits = []string{"listen: :9191", "listen: :0", "listen: :8181", "listen: :0", "listen: :8282", "listen: :0", "delay: 10s", "delay: 0s"}

// The pod as it is by default starts, its probes are answered, what is not for
// others is not, and it is read again when its ConfigMap changes.
func TestChartRuns(t *testing.T) {
	bundles, err := stage.StartBundleServer()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(bundles.Close)
	bundles.Put("orders", stage.Bundle(map[string]string{"p.rego": "package envoy.authz\n\nallow := true\n"}))
	p := podOf(t, render(t, "default",
		"--set", "bundlesURL="+bundles.URL,
		"--set", "config.tenants.required={orders}",
		"--set", "overrides.orders.limits.evaluation_time=100ms"))
	p.mount(t, portEdits...)
	g := p.start(t)

	get := func(path string) int {
		t.Helper()
		resp, err := http.Get("http://" + g.Admin + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		return resp.StatusCode
	}
	for what, probe := range map[string]*corev1.Probe{"startup": p.gatehouse.StartupProbe, "readiness": p.gatehouse.ReadinessProbe, "liveness": p.gatehouse.LivenessProbe} {
		if probe == nil || probe.HTTPGet == nil || probe.HTTPGet.Port.StrVal != "admin" {
			t.Fatalf("%s probe: got %+v, want one of HTTP at port admin", what, probe)
		}
		if got := get(probe.HTTPGet.Path); got != http.StatusOK {
			t.Errorf("%s probe, %s: got status %d, want 200", what, probe.HTTPGet.Path, got)
		}
	}
	if got := get("/metrics"); got != http.StatusOK {
		t.Errorf("/metrics: got status %d, want 200", got)
	}
	if got := get("/tenants"); got != http.StatusNotFound {
		t.Errorf("/tenants, off loopback: got status %d, want 404", got)
	}
	if files, err := filepath.Glob(p.root + "/var/lib/gatehouse/*"); err != nil || len(files) == 0 {
		t.Errorf("got %v (%v) in the volume for bundles, want the one of orders", files, err)
	}

	// kubelet replaces ..data.
	project(t, p.root+"/etc/gatehouse/overrides", map[string]string{"orders.yaml": "limits: {evaluation_time: 70ms}\n"})
	eventually(t, "the changed ConfigMap is applied", func() bool {
		n, err := g.Metric(`gatehouse_config_reloads_total{outcome="applied"}`)
		return err == nil && n >= 1
	})
	project(t, p.root+"/etc/gatehouse/overrides", map[string]string{"orders.yaml": "limits: {evaluation_tim: 70ms}\n"})
	eventually(t, "the ConfigMap with a fault is refused", func() bool {
		n, err := g.Metric(`gatehouse_config_reloads_total{outcome="refused"}`)
		return err == nil && n >= 1
	})
	if got := get("/readyz"); got != http.StatusOK {
		t.Errorf("after a ConfigMap with a fault: got status %d, want 200", got)
	}

	if err := g.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if code, err := g.Wait(time.Duration(*p.TerminationGracePeriodSeconds) * time.Second); err != nil || code != 0 {
		t.Errorf("after SIGTERM: got exit code %d and %v, want 0 within the grace period", code, err)
	}
}

// Proxies of a pod with the sidecar, or of a node with the DaemonSet, ask through
// the socket that the chart puts there.
func TestChartSocket(t *testing.T) {
	for _, name := range []string{"sidecar", "daemonset-socket"} {
		t.Run(name, func(t *testing.T) {
			bundles, err := stage.StartBundleServer()
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(bundles.Close)
			bundles.Put("orders", stage.Bundle(map[string]string{"p.rego": rego["orders"]}))
			p := podOf(t, render(t, name, "--set", "bundlesURL="+bundles.URL))
			p.mount(t, portEdits...)
			p.start(t)
			config, err := os.ReadFile(deploy + "/envoy/envoy.yaml")
			if err != nil {
				t.Fatal(err)
			}
			// As the file's comment says.
			text := string(config)
			for old, next := range map[string]string{
				"name: gatehouse\n    type: STRICT_DNS":                  "name: gatehouse\n    type: STATIC",
				"socket_address: {address: 127.0.0.1, port_value: 9191}": "pipe: {path: " + p.root + "/run/gatehouse/gatehouse.sock}",
			} {
				if strings.Count(text, old) != 1 {
					t.Fatalf("envoy.yaml does not have one %q", old)
				}
				text = strings.Replace(text, old, next, 1)
			}
			n := startStatic(t, []byte(text), map[string]string{})
			n.allowed(t, n.get(t, "main", "/orders/1", "x-user: alice"))
			n.denied(t, n.get(t, "main", "/orders/1", "x-user: bob"), http.StatusForbidden)
		})
	}
}

// The worked example of a sidecar has what the chart makes.
func TestSidecarExample(t *testing.T) {
	file := filepath.Join(chart, "examples", "sidecar.yaml")
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, wrong := range conform(t, text) {
		t.Error(wrong)
	}
	want := podOf(t, render(t, "sidecar"))
	got := podOf(t, text)
	if !reflect.DeepEqual(got.gatehouse, want.gatehouse) {
		t.Errorf("container: got\n%s\nwant\n%s", yamlOf(t, got.gatehouse), yamlOf(t, want.gatehouse))
	}
	for _, v := range want.Volumes {
		if !reflect.DeepEqual(got.volume(t, v.Name), v) {
			t.Errorf("volume %s differs from\n%s", v.Name, yamlOf(t, v))
		}
	}
}

func yamlOf(t *testing.T, v any) string {
	t.Helper()
	text, err := kyaml.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// The template gatehouse.sidecar puts the sidecar into the pods of another chart.
func TestSidecarTemplate(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("Chart.yaml", "apiVersion: v2\nname: shop\nversion: 1.0.0\ndependencies: [{name: gatehouse, version: 0.1.0}]\n")
	write("templates/pod.yaml", `apiVersion: v1
kind: Pod
metadata: {name: shop}
spec:
  containers: [{name: shop, image: "example.com/shop:1"}]
  {{- include "gatehouse.sidecar" .Subcharts.gatehouse | nindent 2 }}
`)
	own, err := os.ReadFile(filepath.Join(chart, "ci", "sidecar-values.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	write("values.yaml", "gatehouse:\n"+regexp.MustCompile(`(?m)^`).ReplaceAllString(string(own), "  ")+"\n")
	if err := os.CopyFS(filepath.Join(dir, "charts", "gatehouse"), os.DirFS(chart)); err != nil {
		t.Fatal(err)
	}
	out, err := helm(t, "template", "shop", dir, "--kube-version", "1.36.3")
	if err != nil {
		t.Fatal(err)
	}
	for _, wrong := range conform(t, out) {
		t.Error(wrong)
	}
	docs, err := split(out)
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, doc := range docs {
		if kind, _ := kind(t, doc); kind == "Pod" {
			spec := decode[corev1.Pod](t, doc).Spec
			found = len(spec.InitContainers) == 1 && spec.InitContainers[0].Name == "gatehouse" &&
				spec.InitContainers[0].RestartPolicy != nil && *spec.InitContainers[0].RestartPolicy == corev1.ContainerRestartPolicyAlways
		}
	}
	if !found {
		t.Errorf("the pod has no sidecar:\n%s", out)
	}
}

// The keys of config that the schema of the values knows are those of the
// operator's file.
func TestChartConfigKeys(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "../../cmd/gatehouse/config.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.TypeSpec)
		if !ok || spec.Name.Name != "Config" {
			return true
		}
		for _, f := range spec.Type.(*ast.StructType).Fields.List {
			tag := reflect.StructTag(strings.Trim(f.Tag.Value, "`"))
			want = append(want, tag.Get("yaml"))
		}
		return false
	})
	text, err := os.ReadFile(filepath.Join(chart, "values.schema.json"))
	if err != nil {
		t.Fatal(err)
	}
	var schema struct {
		Properties struct {
			Config struct{ Properties map[string]any }
		}
	}
	if err := kyaml.Unmarshal(text, &schema); err != nil {
		t.Fatal(err)
	}
	var got []string
	for key := range schema.Properties.Config.Properties {
		got = append(got, key)
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("config of values.schema.json: got %q, want %q", got, want)
	}
}

// The alerts of the chart are those that are tested.
func TestChartRules(t *testing.T) {
	want, err := os.ReadFile(deploy + "/prometheus/rules.yaml")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(chart, "files", "rules.yaml")
	if *update {
		if err := os.WriteFile(file, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != string(want) {
		t.Errorf("%s differs from deploy/prometheus/rules.yaml: go test -run TestChartRules -update copies it", file)
	}

	var rules, rendered any
	if err := kyaml.UnmarshalStrict(want, &rules); err != nil {
		t.Fatal(err)
	}
	docs, err := split(render(t, "s3"))
	if err != nil {
		t.Fatal(err)
	}
	for _, doc := range docs {
		if kind, _ := kind(t, doc); kind == "PrometheusRule" {
			rendered = (*decode[object](t, doc))["spec"]
		}
	}
	if !reflect.DeepEqual(rendered, rules) {
		t.Errorf("PrometheusRule: got %s, want what rules.yaml has", yamlOf(t, rendered))
	}
}

// Each key of the values has a comment, and the README a table of them.
func TestChartValuesDocumented(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(chart, "values.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var root yaml.Node
	if err := yaml.Unmarshal(text, &root); err != nil {
		t.Fatal(err)
	}
	var table strings.Builder
	table.WriteString("| key | default | |\n|---|---|---|\n")
	rows(t, &table, root.Content[0], "")
	const begin, end = "<!-- values, made by the tests of e2e/kubernetes -->\n", "<!-- end of values -->\n"
	file := filepath.Join(chart, "README.md")
	readme, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(readme), begin)
	got, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no place for the table", file)
	}
	if *update {
		if err := os.WriteFile(file, []byte(before+begin+table.String()+end+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if got != table.String() {
		t.Errorf("the table of %s is not that of values.yaml: go test -run TestChartValuesDocumented -update makes it", file)
	}
}

// whole are keys whose value is one thing, not a group of keys.
var whole = []string{"config.", "podSecurityContext", "securityContext", "resources", "autoscaling.behavior", "probes.startup", "probes.readiness", "probes.liveness"}

func rows(t *testing.T, table *strings.Builder, n *yaml.Node, prefix string) {
	t.Helper()
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		name := prefix + key.Value
		comment := strings.TrimSpace(regexp.MustCompile(`(?m)^# ?`).ReplaceAllString(key.HeadComment, ""))
		if i == 0 && prefix == "" { // the file's own comment comes first
			if at := strings.LastIndex(comment, "\n\n"); at >= 0 {
				comment = comment[at+2:]
			}
		}
		comment = strings.ReplaceAll(strings.Join(strings.Fields(comment), " "), "|", `\|`)
		one := slices.ContainsFunc(whole, func(w string) bool {
			return name == w || strings.HasSuffix(w, ".") && strings.HasPrefix(name, w)
		})
		if value.Kind == yaml.MappingNode && len(value.Content) > 0 && !one {
			if comment != "" {
				fmt.Fprintf(table, "| `%s` | | %s |\n", name, comment)
			}
			rows(t, table, value, name+".")
			continue
		}
		short := *value
		flow(&short)
		text, err := yaml.Marshal(&short)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(table, "| `%s` | `%s` | %s |\n", name, strings.ReplaceAll(strings.Join(strings.Fields(string(text)), " "), "|", `\|`), comment)
	}
}

// flow has a value written on one line, without comments.
func flow(n *yaml.Node) {
	n.Style |= yaml.FlowStyle
	if n.Kind == yaml.ScalarNode {
		n.Style &^= yaml.FlowStyle
	}
	n.HeadComment, n.LineComment, n.FootComment = "", "", ""
	n.Content = slices.Clone(n.Content)
	for i, c := range n.Content {
		copied := *c
		flow(&copied)
		n.Content[i] = &copied
	}
}
