// Command demo shows gatehouse at work: three tenants, an Envoy with a route for
// each, a backend that echoes. It sends requests, prints what comes of them,
// changes a policy while all run, opens the order desk of deploy/demo/web behind
// an Envoy of its own, and stays up until it is interrupted.
//
//	go run ./demo -envoy PATH [-s3 PATH] [-gatehouse PATH] [-port 10000] [-desk 10080]
//
// With -s3, which names a versitygw, the tenants' bundles are in a bucket of an S3
// server on this machine, and a change is an upload; without it they are in a
// directory.
//
// The Envoys are those of deploy/envoy/envoy.yaml and deploy/demo/web/envoy.yaml,
// with other ports, and gatehouse has deploy/demo/web/gatehouse.yaml; the tenants
// are those of deploy/demo, copied, so that no change touches them.
//
// Its parts run alone, too, as the containers of deploy/compose do:
//
//	demo desk -listen ADDR -s3 URL [-root DIR]    the server of the order desk
//	demo echo -listen ADDR                        the backend
//	demo upload -s3 URL [-root DIR]               fills the bucket, and ends
//
// With DEMO_ONCE=1 it ends when all is shown. Exit status: 0; 1 when an answer is
// not the one that it should be; 2 on bad usage.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
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

// options are the flags.
type options struct {
	envoy, gatehouse, s3 string // paths of binaries
	port, desk           int    // where the Envoys listen on loopback
}

func run(ctx context.Context, args []string, once bool, stdout io.Writer) error {
	if len(args) > 0 && services[args[0]] != nil {
		return runService(ctx, args[0], args[1:], stdout)
	}
	var o options
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	flags.StringVar(&o.envoy, "envoy", os.Getenv("GATEHOUSE_E2E_ENVOY_1_40"), "`path` of the Envoy binary; empty: the one that fetch-envoy left")
	flags.StringVar(&o.gatehouse, "gatehouse", os.Getenv("GATEHOUSE_BIN"), "`path` of the gatehouse binary; empty: it is built")
	flags.StringVar(&o.s3, "s3", "", "`path` of the versitygw binary; empty: bundles come from a directory")
	flags.IntVar(&o.port, "port", 10000, "where Envoy listens on loopback; 0, or one that is taken: any")
	flags.IntVar(&o.desk, "desk", 10080, "where the order desk is, likewise")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return err
	} else if err != nil || flags.NArg() > 0 {
		return errUsage
	}
	s, err := build(ctx, o)
	if err != nil {
		return err
	}
	defer s.Stop()

	d := &demo{out: stdout, addr: s.envoy.Listeners["main"], desk: s.DeskURL(), teams: s.teams}
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
The order desk is at %[5]s, a page that shows what its user may do.
Envoy listens on http://%[1]s and gatehouse tells of its tenants on http://%[2]s/tenants:

  curl -i http://%[1]s/orders/42 -H 'x-user: alice'
  curl -i http://%[1]s/payments/7 -H 'authorization: Bearer %[4]s'
  curl -i http://%[1]s/storefront/
  curl http://%[2]s/tenants/orders

%[3]s
and ask again. Interrupt to end.
`, d.addr, s.gatehouse.Admin, s.teams.change("orders"), token("carol", 500), d.desk)
	select {
	case <-ctx.Done():
		return nil
	case <-s.gatehouse.Done():
		return fmt.Errorf("gatehouse ended: %s", s.gatehouse.Output())
	case <-s.envoy.Done():
		return fmt.Errorf("the Envoy ended: %s", s.envoy.Output())
	case <-s.web.Done():
		return fmt.Errorf("the Envoy of the order desk ended: %s", s.web.Output())
	}
}

// demo shows requests and what comes of them.
type demo struct {
	out   io.Writer
	addr  string // of Envoy
	desk  string // URL of the order desk
	teams *teams
	wrong int // answers
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
	if d.teams.shelf != nil {
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
	d.change(ctx, bob, true)
	d.say("\nAnd no longer is one.")
	d.change(ctx, bob, false)

	d.say("\nThe order desk, a page for both teams, asks what its user may do (deploy/demo/web).")
	d.list("bob", "orders", `{"order":["create","list","ship"]}`)
}

// change makes bob a manager, or ends that, and shows what comes of his request.
func (d *demo) change(ctx context.Context, bob ask, manager bool) {
	bob.status, bob.text = http.StatusForbidden, "your roles do not cover this"
	if manager {
		bob.status, bob.text = http.StatusOK, ""
	}
	if err := d.teams.grant("orders", "bob", "manager", manager); err != nil {
		d.say("  %s", err)
		d.wrong++
		return
	}
	begun := time.Now()
	for ctx.Err() == nil && time.Since(begun) < 20*time.Second {
		if resp, err := stage.Do(d.addr, request(bob)); err != nil || resp.Status == bob.status {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	what := "data.json of orders changed"
	if d.teams.shelf != nil {
		what = "the bundle of orders was uploaded"
	}
	bob.why = fmt.Sprintf("%.1f s after %s", time.Since(begun).Seconds(), what)
	d.do(bob)
}

// list logs a user in at the order desk, and shows the permission list that a
// team's policy gives.
func (d *demo) list(user, team, want string) {
	addr := strings.TrimPrefix(d.desk, "http://")
	path := "/t/" + team + "/v1/me/permissions"
	login := stage.Request{Method: "POST", Path: "/session", Headers: []string{"content-type: application/json"}, Body: fmt.Sprintf(`{"user": %q}`, user)}
	d.say("\n  POST %s\n  %s", login.Path, login.Body)
	resp, err := stage.Do(addr, login)
	if err == nil {
		d.say("    → %d %s", resp.Status, http.StatusText(resp.Status))
		cookie, _, _ := strings.Cut(resp.Header.Get("Set-Cookie"), ";")
		d.say("\n  GET %s\n  %s", path, short("cookie: "+cookie))
		resp, err = stage.Do(addr, stage.Request{Path: path, Headers: []string{"cookie: " + cookie}})
	}
	if err != nil {
		d.wrong++
		d.say("    → %s", err)
		return
	}
	d.say("    → %d %s", resp.Status, http.StatusText(resp.Status))
	d.say("      client got %s", strings.TrimSpace(resp.Body))
	if resp.Status != http.StatusOK || !strings.Contains(resp.Body, `"permissions":`+want) {
		d.wrong++
		d.say("      WRONG: the permissions should be %s", want)
	}
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

// token returns a token of payments.
func token(user string, limit int) string {
	return sign(map[string]any{"sub": user, "limit": limit, "aud": "payments", "exp": time.Now().Add(time.Hour).Unix()})
}
