// Command demo shows gatehouse at work: three tenants, an Envoy with a route for
// each, a backend that echoes. It sends requests, prints what comes of them,
// changes a policy while all run, and stays up until it is interrupted.
//
//	go run ./demo -envoy PATH [-s3 PATH] [-gatehouse PATH] [-port 10000]
//
// With -s3, which names a versitygw, the tenants' bundles are in a bucket of an S3
// server on this machine, and the change is an upload; without it they are in a
// directory.
//
// The Envoy is the one of deploy/envoy/envoy.yaml, with other ports; the tenants
// are those of deploy/demo, copied, so that the change does not touch them.
//
// With DEMO_ONCE=1 it ends when all is shown. Exit status: 0; 1 when an answer is
// not the one that it should be; 2 on bad usage.
package main

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Getenv("DEMO_ONCE") != "", os.Stdout)
	stop()
	switch {
	case err == nil || errors.Is(err, flag.ErrHelp):
	case errors.Is(err, errUsage):
		os.Exit(2)
	default:
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

var errUsage = errors.New("bad usage")

func run(ctx context.Context, args []string, once bool, stdout io.Writer) error {
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	envoyBinary := flags.String("envoy", os.Getenv("GATEHOUSE_E2E_ENVOY_1_40"), "`path` of the Envoy binary; empty: the one that fetch-envoy left")
	gatehouseBinary := flags.String("gatehouse", os.Getenv("GATEHOUSE_BIN"), "`path` of the gatehouse binary; empty: it is built")
	s3Binary := flags.String("s3", "", "`path` of the versitygw binary; empty: bundles come from a directory")
	port := flags.Int("port", 10000, "where Envoy listens on loopback; 0, or one that is taken: any")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return err
	} else if err != nil || flags.NArg() > 0 {
		return errUsage
	}
	module, err := stage.Module()
	if err != nil {
		return err
	}
	root := filepath.Dir(module)
	if *envoyBinary == "" {
		*envoyBinary = filepath.Join(root, ".cache", "envoy-1.40.0")
	}
	if _, err := os.Stat(*envoyBinary); err != nil {
		return fmt.Errorf("no Envoy, run e2e/fetch-envoy first: %w", err)
	}
	dir, err := os.MkdirTemp("", "gatehouse-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if *gatehouseBinary == "" {
		if *gatehouseBinary, err = stage.Build(ctx, dir, "../cmd/gatehouse"); err != nil {
			return err
		}
	}

	// The backend, gatehouse with the tenants, Envoy before both.
	echo, err := stage.StartEcho()
	if err != nil {
		return err
	}
	defer echo.Close()
	tenants := filepath.Join(dir, "tenants")
	if err := os.CopyFS(tenants, os.DirFS(filepath.Join(root, "deploy", "demo"))); err != nil {
		return err
	}
	config := filepath.Join(dir, "gatehouse.yaml")
	text, args := stage.Listen, []string{"-c", config}
	var env []string
	var shelf *shelf
	if *s3Binary == "" {
		args = append(args, tenants)
	} else {
		if shelf, err = newShelf(*s3Binary, dir, tenants); err != nil {
			return err
		}
		defer shelf.Stop()
		text += shelf.config()
		env = shelf.Root.Environment()
	}
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return err
	}
	gatehouse, err := stage.StartGatehouseIn(env, *gatehouseBinary, args...)
	if err != nil {
		return err
	}
	defer gatehouse.Stop()
	example, err := os.ReadFile(filepath.Join(root, "deploy", "envoy", "envoy.yaml"))
	if err != nil {
		return err
	}
	example, err = stage.Readdress(example, map[string]string{
		"127.0.0.1:10000": free(*port), "127.0.0.1:9901": "127.0.0.1:0",
		"127.0.0.1:9191": gatehouse.GRPC, "127.0.0.1:8080": echo.Addr,
	})
	if err != nil {
		return err
	}
	envoy, err := stage.StartEnvoy(*envoyBinary, dir, example)
	if err != nil {
		return err
	}
	defer envoy.Kill()

	d := &demo{out: stdout, addr: envoy.Listeners["main"], tenants: tenants, shelf: shelf}
	d.show(ctx)
	if ctx.Err() != nil {
		return nil
	}
	if d.wrong > 0 {
		return fmt.Errorf("%d answers are not what they should be", d.wrong)
	}
	if once {
		return nil
	}
	fmt.Fprintf(stdout, `
Envoy listens on http://%[1]s and gatehouse tells of its tenants on http://%[2]s/tenants:

  curl -i http://%[1]s/orders/42 -H 'x-user: alice'
  curl -i http://%[1]s/payments/7 -H 'authorization: Bearer %[4]s'
  curl -i http://%[1]s/storefront/
  curl http://%[2]s/tenants/orders

%[3]s
and ask again. Interrupt to end.
`, d.addr, gatehouse.Admin, d.change(), token("carol", 500))
	select {
	case <-ctx.Done():
		return nil
	case <-gatehouse.Done():
		return fmt.Errorf("gatehouse ended: %s", gatehouse.Output())
	case <-envoy.Done():
		return fmt.Errorf("the Envoy ended: %s", envoy.Output())
	}
}

// free returns a loopback address with the port, or with none if it is taken.
func free(port int) string {
	addr := fmt.Sprintf("127.0.0.1:%d", port)
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return "127.0.0.1:0"
	}
	l.Close()
	return addr
}

// demo shows requests and what comes of them.
type demo struct {
	out     io.Writer
	addr    string // of Envoy
	tenants string // the folder
	shelf   *shelf // nil: gatehouse reads the folder
	wrong   int    // answers
}

// ask is a request, and what should come of it.
type ask struct {
	method, path string
	headers      []string
	body         string

	status int
	seen   []string // "name: value" of headers at the backend; "name:" of one that is not there
	answer []string // "name: value" of headers of the response
	text   string   // in its body
	why    string
}

func (d *demo) show(ctx context.Context) {
	d.say("Three tenants, three policies, one gatehouse. Envoy asks it about each request.")
	if d.shelf != nil {
		d.say("Their bundles are in an S3 bucket, and each is loaded when its tenant is asked for the first time.")
	}
	d.say("")

	d.say("orders: roles in the tenant's data say who may do what (deploy/demo/orders).")
	d.do(ask{method: "GET", path: "/orders/42", headers: []string{"x-user: alice"},
		status: 200, seen: []string{"x-user: alice", "x-roles: clerk,manager"}, why: "clerks read orders; the policy adds x-roles"})
	d.do(ask{method: "DELETE", path: "/orders/42", headers: []string{"x-user: alice"},
		status: 200, why: "managers delete them"})
	bob := ask{method: "DELETE", path: "/orders/42", headers: []string{"x-user: bob"},
		status: 403, text: "orders: your roles do not cover this", why: "bob is a clerk only"}
	d.do(bob)

	d.say("\npayments: nobody without a token (deploy/demo/payments).")
	d.do(ask{method: "GET", path: "/payments/7",
		status: 401, answer: []string{`www-authenticate: Bearer realm="payments"`}, text: "a valid token is needed", why: "no token"})
	token := "authorization: Bearer " + token("carol", 500)
	d.do(ask{method: "POST", path: "/payments/7", headers: []string{token, "content-type: application/json"}, body: `{"amount": 900}`,
		status: 403, text: "carol may pay at most 500", why: "the policy reads the token and the body"})
	d.do(ask{method: "POST", path: "/payments/7", headers: []string{token, "x-user: mallory", "content-type: application/json"}, body: `{"amount": 100}`,
		status: 200, seen: []string{"x-user: carol", "authorization:"}, why: "x-user is from the token, whatever the client sent"})

	d.say("\nstorefront: everybody may look, nobody may change (deploy/demo/storefront).")
	d.do(ask{method: "GET", path: "/storefront/", headers: []string{"accept-language: de-AT"},
		status: 200, seen: []string{"x-segment: german"}, answer: []string{"x-frame-options: DENY"}, why: "headers for the backend and for the client"})
	d.do(ask{method: "DELETE", path: "/storefront/", status: 405, answer: []string{"allow: GET, HEAD"}, why: "not even managers of orders"})

	d.say("\nA new version of a policy is picked up live: bob becomes a manager.")
	if err := d.promote(); err != nil {
		d.say("  %s", err)
		d.wrong++
		return
	}
	begun := time.Now()
	for ctx.Err() == nil && time.Since(begun) < 20*time.Second {
		if resp, err := stage.Do(d.addr, request(bob)); err != nil || resp.Status == http.StatusOK {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	bob.status, bob.text = 200, ""
	what := "data.json of orders changed"
	if d.shelf != nil {
		what = "the bundle of orders was uploaded"
	}
	bob.why = fmt.Sprintf("%.1f s after %s", time.Since(begun).Seconds(), what)
	d.do(bob)
}

// promote gives bob the role of a manager.
func (d *demo) promote() error {
	file := filepath.Join(d.tenants, "orders", "data.json")
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	changed := strings.Replace(string(text), `"bob": {"roles": ["clerk"]}`, `"bob": {"roles": ["clerk", "manager"]}`, 1)
	if changed == string(text) {
		return errors.New("bob is not in data.json of orders as he should be")
	}
	next := filepath.Join(d.tenants, ".data.json")
	if err := os.WriteFile(next, []byte(changed), 0o600); err != nil {
		return err
	}
	if err := os.Rename(next, file); err != nil || d.shelf == nil {
		return err
	}
	return d.shelf.upload("orders")
}

// change says how to change a policy.
func (d *demo) change() string {
	if d.shelf == nil {
		return "Change a policy in " + d.tenants
	}
	return d.shelf.change("orders")
}

func (d *demo) say(format string, args ...any) { fmt.Fprintf(d.out, format+"\n", args...) }

func request(a ask) stage.Request {
	return stage.Request{Method: a.method, Path: a.path, Headers: a.headers, Body: a.body}
}

// do sends a request, shows it, and checks what came of it.
func (d *demo) do(a ask) {
	d.say("\n  %s %s", a.method, a.path)
	for _, h := range a.headers {
		d.say("  %s", short(h))
	}
	if a.body != "" {
		d.say("  %s", a.body)
	}
	resp, err := stage.Do(d.addr, request(a))
	if err != nil {
		d.wrong++
		d.say("    → %s", err)
		return
	}
	d.say("    → %d %s   (%s)", resp.Status, http.StatusText(resp.Status), a.why)
	check := func(ok bool, format string, args ...any) {
		if !ok {
			d.wrong++
			d.say("      WRONG: "+format, args...)
		}
	}
	check(resp.Status == a.status, "the status should be %d", a.status)
	check((resp.Seen != nil) == (a.status == 200), "the backend was reached: %v", resp.Seen != nil)
	for _, h := range a.answer {
		name, value, _ := strings.Cut(h, ": ")
		d.say("      client got %s: %s", name, resp.Header.Get(name))
		check(resp.Header.Get(name) == value, "it should be %q", value)
	}
	if resp.Seen == nil {
		if body := strings.TrimSpace(resp.Body); body != "" {
			d.say("      client got %s", body)
		}
		check(strings.Contains(resp.Body, a.text), "it should say %q", a.text)
	} else {
		for _, h := range a.seen {
			name, value, _ := strings.Cut(h, ":")
			value = strings.TrimSpace(value)
			got := resp.Seen.Headers[name]
			if value == "" {
				d.say("      backend got no %s", name)
				check(len(got) == 0, "it got %q", got)
				continue
			}
			d.say("      backend got %s: %s", name, strings.Join(got, ", "))
			check(slices.Equal(got, []string{value}), "it should be %q", value)
		}
	}
}

// short cuts a long header.
func short(h string) string {
	if len(h) > 60 {
		return h[:40] + "…" + h[len(h)-8:]
	}
	return h
}

// token signs a token of payments with the secret of its data.
func token(user string, limit int) string {
	const secret = "a secret of the demo: use a key of your own, or a JWKS"
	encode := func(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }
	text := encode(`{"alg":"HS256","typ":"JWT"}`) + "." +
		encode(fmt.Sprintf(`{"sub":%q,"limit":%d,"aud":"payments","exp":%d}`, user, limit, time.Now().Add(time.Hour).Unix()))
	mac := hmac.New(sha256.New, []byte(secret))
	mac.Write([]byte(text))
	return text + "." + encode(string(mac.Sum(nil)))
}
