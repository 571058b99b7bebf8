package faults

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

// More policies and data than memory is given for: tenants come and go, and the
// process stays small.
func TestMemoryBudget(t *testing.T) {
	const count = 400
	s := newShelf(t)
	all := publishLarge(s, count)
	g := serve(t, from(s.URL)+"tenants: {memory: 64MiB}\n")
	c := dial(t, g.GRPC)
	memory := watchMemory(t, g.Pid())
	load(t, all, func(tenant string) { c.becomes(t, tenant, 1, 10*time.Second) })
	load(t, all, func(tenant string) {
		eventually(t, tenant+" decides again", func() bool { return c.revisionOf(tenant) != "" })
	})
	stop := asks(t, s.judge, 200, all[count-5:], c.ask) // those that fit are left alone
	time.Sleep(3 * time.Second)
	r := stop(t)
	before, peak := memory()
	evicted, used := metric(t, g, "gatehouse_memory_evictions_total"), metric(t, g, "gatehouse_memory_bytes")
	if evicted == 0 || used > 64<<20 {
		t.Errorf("forgotten for memory: %v, in use: %v bytes, want some and at most 64 MiB", evicted, used)
	}
	if peak > 1<<30 {
		t.Errorf("memory rose from %s to %s", mib(before), mib(peak))
	}
	if r.failed*50 > r.answers {
		t.Errorf("faults of tenants that fit: %v of %d, want at most 2 %%", r.faults, r.answers)
	}
	t.Logf("PASS: %d tenants, %v forgotten for memory, %s estimated; %s; memory %s, at most %s", count, evicted, mib(int64(used)), r, mib(before), mib(peak))
}

// The container has less memory than its tenants want: what follows from its
// limit keeps the kernel from ending the process.
func TestContainerMemory(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can make a cgroup")
	}
	const count, limit = 700, 256 << 20
	group, join := memoryGroup(t, limit)
	s := newShelf(t)
	all := publishLarge(s, count)
	script := filepath.Join(t.TempDir(), "gatehouse")
	write(t, script, fmt.Sprintf("#!/bin/sh\necho $$ >%s/%s && exec %s \"$@\"\n", group, join, built.path))
	if err := os.Chmod(script, 0o700); err != nil {
		t.Fatal(err)
	}
	saved := built.path
	built.path = script
	g := serve(t, from(s.URL))
	built.path = saved
	c := dial(t, g.GRPC)
	memory := watchMemory(t, g.Pid())
	for range 2 {
		load(t, all, func(tenant string) {
			eventually(t, tenant+" decides", func() bool { return c.revisionOf(tenant) != "" })
		})
	}
	stop := asks(t, s.judge, 200, all[count-3:], c.ask)
	time.Sleep(2 * time.Second)
	r := stop(t)
	_, peak := memory()
	evicted := metric(t, g, "gatehouse_memory_evictions_total")
	if evicted == 0 || peak > limit {
		t.Errorf("forgotten for memory: %v, memory at most %s, want some and less than %s", evicted, mib(peak), mib(limit))
	}
	t.Logf("PASS: %d tenants in %s: %v forgotten; %s; memory at most %s", count, mib(limit), evicted, r, mib(peak))
}

// publishLarge publishes tenants with much data of their own, and returns their
// names.
func publishLarge(s *shelf, count int) []string {
	all := make([]string, count)
	random := rand.New(rand.NewPCG(1, 2))
	for i := range all {
		all[i] = fmt.Sprintf("tenant-%d", i)
		var rows strings.Builder // that have nothing in common, so that they take their size
		for range 3_500 {
			fmt.Fprintf(&rows, `"%016x%016x%016x%016x",`, random.Uint64(), random.Uint64(), random.Uint64(), random.Uint64())
		}
		s.publishWith(all[i], 1, map[string]string{"rows/data.json": `{"all": [` + rows.String() + `0]}`})
	}
	return all
}

// memoryGroup makes a cgroup with a limit of memory, and returns it with the
// name of the file that takes its processes. It is removed when the test ends.
func memoryGroup(t *testing.T, limit int) (group, join string) {
	t.Helper()
	parent, file, join := "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "cgroup.procs"
	if _, err := os.Stat(parent); err != nil {
		parent, file = "/sys/fs/cgroup", "memory.max"
	}
	group = filepath.Join(parent, fmt.Sprintf("gatehouse-test-%d", os.Getpid()))
	if err := os.Mkdir(group, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for range 100 { // until its processes are gone
			if os.Remove(group) == nil {
				return
			}
			time.Sleep(50 * time.Millisecond)
		}
	})
	if err := os.WriteFile(filepath.Join(group, file), fmt.Append(nil, limit), 0o600); err != nil {
		t.Fatal(err)
	}
	return group, join
}

// nameServer is a DNS server that is as ill as it is told to be.
type nameServer struct{ mode atomic.Value } // "well", "unknown", "silent" or "failing"

func startNameServer(t *testing.T, addr string) *nameServer {
	t.Helper()
	conn, err := net.ListenPacket("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	s := &nameServer{}
	s.mode.Store("well")
	go func() {
		buf := make([]byte, 4096)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(buf[:n]) != nil || len(m.Questions) != 1 {
				continue
			}
			m.Response, m.RecursionAvailable, m.Additionals = true, true, nil
			switch s.mode.Load() {
			case "silent":
				continue
			case "unknown":
				m.RCode = dnsmessage.RCodeNameError
			case "failing":
				m.RCode = dnsmessage.RCodeServerFailure
			default:
				if q := m.Questions[0]; q.Type == dnsmessage.TypeA {
					m.Answers = []dnsmessage.Resource{{
						Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 1},
						Body:   &dnsmessage.AResource{A: [4]byte{127, 0, 0, 1}},
					}}
				}
			}
			if out, err := m.Pack(); err == nil {
				_, _ = conn.WriteTo(out, from)
			}
		}
	}()
	return s
}

// The name of the source does not resolve: what is loaded decides, and when it
// does again, the newest revision does.
func TestNames(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can give gatehouse a resolver of its own")
	}
	const resolver = "127.0.0.77"
	names := startNameServer(t, resolver+":53")
	s := newShelf(t)
	toxiproxy, err := stage.StartToxiproxy(tool(t, "toxiproxy"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(toxiproxy.Kill)
	link, err := toxiproxy.Link("bundles", strings.TrimPrefix(s.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(link.Addr)
	if err != nil {
		t.Fatal(err)
	}
	s.publish("orders", 1)

	withResolver(t, resolver)
	g := serve(t, from("http://bundles.stage.test:"+port))
	c := dial(t, g.GRPC)
	c.becomes(t, "orders", 1, 5*time.Second)

	n := 1
	for _, mode := range []string{"unknown", "failing", "silent"} {
		t.Run(mode, func(t *testing.T) {
			stop := asks(t, s.judge, 200, []string{"orders"}, c.ask)
			names.mode.Store(mode)
			if err := link.Down(); err != nil { // so that a new connection is needed
				t.Fatal(err)
			}
			if err := link.Up(); err != nil {
				t.Fatal(err)
			}
			n++
			s.publish("orders", n)
			fresh := "fresh-" + mode
			s.publish(fresh, 1)
			begun := time.Now()
			if a := c.ask(fresh, 0); a.allowed || a.status != 503 || time.Since(begun) > time.Second {
				t.Errorf("a tenant that cannot be loaded: got %+v after %s, want 503 within 1 s", a, time.Since(begun))
			}
			told := eventually(t, "the status tells of the name", func() bool { return statusOf(t, g, "orders").Error != "" })
			what := statusOf(t, g, "orders").Error
			names.mode.Store("well")
			back := c.becomes(t, "orders", n, 15*time.Second)
			c.becomes(t, fresh, 1, 30*time.Second)
			r := stop(t)
			if r.failed > 0 {
				t.Errorf("faults: %v, want none", r.faults)
			}
			t.Logf("PASS %s: %s; told of after %s (%s); current %s after the name is back", mode, r, told, what[max(0, strings.LastIndex(what, "lookup")):], back)
		})
	}
}
