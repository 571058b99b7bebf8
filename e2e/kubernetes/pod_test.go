package kubernetes

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

// theirs are ConfigMaps that the chart's values name and that are the user's own.
var theirs = map[string]map[string]string{
	"my-overrides": {"orders.yaml": "limits: {evaluation_time: 50ms}\n"},
	"tenants":      {"policy.rego": "package envoy.authz\n\nallow := true\n"},
}

// pod is the pod of a rendered chart, with the files of its Gatehouse in a folder.
type pod struct {
	corev1.PodSpec
	meta      metav1.ObjectMeta
	gatehouse *corev1.Container
	configs   map[string]map[string]string // :: name of a ConfigMap → its files
	root      string                       // what is / in the container
}

// decode decodes an object strictly: what is not a field of T is a fault.
func decode[T any](t *testing.T, doc []byte) *T {
	t.Helper()
	var into T
	if err := yaml.UnmarshalStrict(doc, &into); err != nil {
		t.Fatalf("%v in\n%s", err, doc)
	}
	return &into
}

// kind returns kind and name of an object.
func kind(t *testing.T, doc []byte) (string, string) {
	t.Helper()
	var o struct {
		Kind     string
		Metadata struct{ Name string }
	}
	if err := yaml.Unmarshal(doc, &o); err != nil {
		t.Fatal(err)
	}
	return o.Kind, o.Metadata.Name
}

// podOf returns the pod of a rendered chart; in mode sidecar, one of the sidecar
// alone.
func podOf(t *testing.T, manifests []byte) *pod {
	t.Helper()
	docs, err := split(manifests)
	if err != nil {
		t.Fatal(err)
	}
	p := &pod{configs: map[string]map[string]string{}}
	for name, files := range theirs {
		p.configs[name] = files
	}
	for _, doc := range docs {
		switch kind, name := kind(t, doc); kind {
		case "Deployment":
			d := decode[appsv1.Deployment](t, doc)
			p.PodSpec, p.meta = d.Spec.Template.Spec, d.Spec.Template.ObjectMeta
		case "DaemonSet":
			d := decode[appsv1.DaemonSet](t, doc)
			p.PodSpec, p.meta = d.Spec.Template.Spec, d.Spec.Template.ObjectMeta
		case "ConfigMap":
			p.configs[name] = decode[corev1.ConfigMap](t, doc).Data
			if text, ok := p.configs[name]["pod-spec.yaml"]; ok {
				p.PodSpec = *decode[corev1.PodSpec](t, []byte(text))
			}
		}
	}
	for _, list := range [][]corev1.Container{p.InitContainers, p.Containers} {
		for i := range list {
			if list[i].Name == "gatehouse" {
				p.gatehouse = &list[i]
			}
		}
	}
	if p.gatehouse == nil {
		t.Fatalf("the chart has no container gatehouse:\n%s", manifests)
	}
	return p
}

// mount puts the files of the container into a folder, as kubelet does for ConfigMaps
// and secrets: the files are links through ..data, which an update replaces at once.
// What the configuration says is changed by edits, and its paths are those of the
// folder.
func (p *pod) mount(t *testing.T, edits ...string) {
	t.Helper()
	// A socket's path is at most 107 bytes, and t.TempDir's is long.
	root, err := os.MkdirTemp("", "gh-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(root) })
	p.root = root
	for _, m := range p.gatehouse.VolumeMounts {
		edits = append(edits, m.MountPath, root+m.MountPath)
	}
	for _, m := range p.gatehouse.VolumeMounts {
		dir := filepath.Join(root, m.MountPath)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		switch v := p.volume(t, m.Name); {
		case v.ConfigMap != nil:
			files, ok := p.configs[v.ConfigMap.Name]
			if !ok {
				t.Fatalf("volume %q: there is no ConfigMap %q", m.Name, v.ConfigMap.Name)
			}
			project(t, dir, files, edits...)
		case v.Secret != nil:
			project(t, dir, certificate(t))
		case v.EmptyDir == nil && v.HostPath == nil:
			t.Fatalf("volume %q is of a kind that the tests do not know", m.Name)
		}
	}
}

func (p *pod) volume(t *testing.T, name string) corev1.Volume {
	t.Helper()
	for _, v := range p.Volumes {
		if v.Name == name {
			return v
		}
	}
	t.Fatalf("the pod mounts volume %q, which it does not have", name)
	return corev1.Volume{}
}

// project writes files into a folder, as kubelet does.
func project(t *testing.T, dir string, files map[string]string, edits ...string) {
	t.Helper()
	fresh, err := os.MkdirTemp(dir, "..v")
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(fresh, name), []byte(strings.NewReplacer(edits...).Replace(text)), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(filepath.Join("..data", name), filepath.Join(dir, name)); err != nil && !os.IsExist(err) {
			t.Fatal(err)
		}
	}
	next := filepath.Join(dir, "..data_tmp")
	if err := os.Symlink(filepath.Base(fresh), next); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(next, filepath.Join(dir, "..data")); err != nil {
		t.Fatal(err)
	}
}

// args are the container's arguments, with the paths of the folder.
func (p *pod) args() (args []string) {
	for _, arg := range p.gatehouse.Args {
		for _, m := range p.gatehouse.VolumeMounts {
			if at := strings.Index(arg, m.MountPath); at == 0 || at > 0 && arg[at-1] == '=' {
				arg = arg[:at] + p.root + arg[at:]
				break
			}
		}
		if arg == "/tenants" { // the parent of a mount
			arg = p.root + arg
		}
		args = append(args, arg)
	}
	return args
}

// env is the container's environment; what comes from a secret is something. A role
// of AWS is what EKS adds for an annotation of the service account.
func (p *pod) env() (env []string) {
	env = []string{"AWS_ROLE_ARN=arn:aws:iam::123456789012:role/gatehouse", "AWS_WEB_IDENTITY_TOKEN_FILE=/var/run/secrets/eks.amazonaws.com/serviceaccount/token"}
	for _, e := range p.gatehouse.Env {
		if e.ValueFrom != nil {
			e.Value = "a-secret-of-the-tests"
		}
		env = append(env, e.Name+"="+e.Value)
	}
	return env
}

// start starts the container's Gatehouse and waits until it is ready.
func (p *pod) start(t *testing.T) *stage.Gatehouse {
	t.Helper()
	args := p.args()
	if args[0] != "serve" {
		t.Fatalf("got arguments %q, want serve first", args)
	}
	g, err := stage.StartGatehouseIn(p.env(), gatehouse(t), args[1:]...)
	if err != nil {
		t.Fatal(err)
	}
	stopped(t, g.Process)
	return g
}

// stopped stops a process when the test ends, and shows what it printed where the
// test failed.
func stopped(t *testing.T, p *stage.Process) {
	t.Cleanup(func() {
		p.Stop()
		if out := p.Output(); t.Failed() {
			t.Logf("output of %s:\n%s", p.Name, out[max(0, len(out)-8<<10):])
		} else if strings.Contains(out, "panic") {
			t.Errorf("%s printed a panic:\n%s", p.Name, out)
		}
	})
}

// certificate returns the files of a secret of cert-manager.
func certificate(t *testing.T) map[string]string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "gatehouse"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, DNSNames: []string{"localhost"},
		URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/ns/gatehouse/sa/gatehouse"}},
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	crt := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}))
	return map[string]string{
		"tls.crt": crt, "ca.crt": crt,
		"tls.key": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})),
	}
}
