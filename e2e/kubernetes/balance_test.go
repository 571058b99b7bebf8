package kubernetes

import (
	"bytes"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

// names is a small DNS server that has one name, as a cluster has that of a headless
// Service: its addresses are those of the pods that are ready.
type names struct {
	conn net.PacketConn
	done chan struct{}

	mu    sync.Mutex
	addrs [][4]byte // guarded by mu
}

const headlessName = "gatehouse-headless.gatehouse.svc.cluster.local"

func startNames(t *testing.T, addrs ...[4]byte) *names {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n := &names{conn: conn, done: make(chan struct{}), addrs: addrs}
	go n.serve()
	t.Cleanup(func() {
		_ = conn.Close()
		<-n.done
	})
	return n
}

func (n *names) set(addrs ...[4]byte) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.addrs = addrs
}

func (n *names) serve() {
	defer close(n.done)
	buf := make([]byte, 1500)
	for {
		size, from, err := n.conn.ReadFrom(buf)
		if err != nil {
			return // closed
		}
		var m dnsmessage.Message
		if m.Unpack(buf[:size]) != nil || len(m.Questions) != 1 {
			continue
		}
		q := m.Questions[0]
		answer := dnsmessage.Message{Header: dnsmessage.Header{ID: m.ID, Response: true, Authoritative: true}, Questions: m.Questions}
		n.mu.Lock()
		if q.Type == dnsmessage.TypeA && strings.EqualFold(strings.TrimSuffix(q.Name.String(), "."), headlessName) {
			for _, a := range n.addrs {
				answer.Answers = append(answer.Answers, dnsmessage.Resource{
					Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class, TTL: 1}, Body: &dnsmessage.AResource{A: a},
				})
			}
		}
		n.mu.Unlock()
		if out, err := answer.Pack(); err == nil {
			_, _ = n.conn.WriteTo(out, from) // it asks again
		}
	}
}

// An Envoy with the name of the headless Service asks all pods; a pod that comes is
// asked, too, and one that ends is left alone in time, without a check lost. Its health
// check tells it before the name does: until then a pod is asked that the name has
// no more.
func TestHeadless(t *testing.T) {
	// All pods have the same port, at addresses of their own.
	_, port, err := net.SplitHostPort(func() string {
		addr, err := stage.FreeAddr()
		if err != nil {
			t.Fatal(err)
		}
		return addr
	}())
	if err != nil {
		t.Fatal(err)
	}
	pods := make([]*stage.Gatehouse, 3)
	for i, ip := range []string{"127.0.0.1", "127.0.0.2", "127.0.0.3"} {
		config := plain()
		config["drain"] = object{"delay": "15s"} // more than the interval of Envoy's health check
		config["grpc"] = object{"listen": net.JoinHostPort(ip, port)}
		pods[i] = serve(t, config)
	}
	t.Cleanup(func() { // before they are told to stop, which takes them as long as they drain
		for _, pod := range pods {
			pod.Kill()
		}
	})
	dns := startNames(t, [4]byte{127, 0, 0, 1}, [4]byte{127, 0, 0, 2})

	config, err := os.ReadFile(deploy + "/envoy/envoy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	host, dnsPort, err := net.SplitHostPort(dns.conn.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	resolver := "name: gatehouse\n    type: STRICT_DNS\n" +
		"    dns_refresh_rate: 0.2s\n    dns_lookup_family: V4_ONLY\n" +
		"    typed_dns_resolver_config: {name: envoy.network.dns_resolver.cares, typed_config: {\"@type\": type.googleapis.com/envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig," +
		" resolvers: [{socket_address: {address: " + host + ", port_value: " + dnsPort + "}}]}}"
	config = bytes.Replace(config, []byte("name: gatehouse\n    type: STRICT_DNS"), []byte(resolver), 1)
	n := startStatic(t, config, map[string]string{"127.0.0.1:9191": net.JoinHostPort(headlessName, port)})

	checks := func() []float64 {
		t.Helper()
		counts := make([]float64, len(pods))
		for i, pod := range pods {
			if counts[i], err = pod.Metric(`gatehouse_checks_total{outcome="allowed",tenant="orders"}`); err != nil {
				t.Fatal(err)
			}
		}
		return counts
	}
	ask := func() []float64 {
		t.Helper()
		before := checks()
		for range 60 {
			n.allowed(t, n.get(t, "main", "/orders/1", "x-user: alice"))
		}
		after := checks()
		for i := range after {
			after[i] -= before[i]
		}
		return after
	}
	endpoints := func(want ...string) func() bool {
		return func() bool {
			text, err := n.Get("/clusters")
			if err != nil {
				return false
			}
			var got []string
			for line := range strings.Lines(text) {
				if addr, ok := strings.CutSuffix(strings.TrimSpace(line), "::health_flags::healthy"); ok {
					if addr, ok := strings.CutPrefix(addr, "gatehouse::"); ok {
						got = append(got, addr)
					}
				}
			}
			slices.Sort(got)
			return slices.Equal(got, want)
		}
	}
	a, b := net.JoinHostPort("127.0.0.1", port), net.JoinHostPort("127.0.0.2", port)
	eventually(t, "Envoy knows both pods", endpoints(a, b))
	if got := ask(); got[0] == 0 || got[1] == 0 || got[2] != 0 || got[0]+got[1] != 60 {
		t.Errorf("two pods: got %v checks, want all of 60 at the first two", got)
	}
	dns.set([4]byte{127, 0, 0, 1}, [4]byte{127, 0, 0, 2}, [4]byte{127, 0, 0, 3})
	eventually(t, "Envoy asks the pod that came", func() bool { return !slices.Contains(ask(), 0) })
	if err := pods[0].Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	dns.set([4]byte{127, 0, 0, 2}, [4]byte{127, 0, 0, 3})
	eventually(t, "Envoy leaves the pod that ends alone", func() bool {
		n.allowed(t, n.get(t, "main", "/orders/1", "x-user: alice"))
		text, err := n.Get("/clusters")
		return err == nil && !strings.Contains(text, "gatehouse::"+a+"::")
	})
	eventually(t, "Envoy asks the other two alone", func() bool {
		got := ask()
		return got[0] == 0 && got[1] > 0 && got[2] > 0
	})
	if resp := n.get(t, "main", "/orders/1"); resp.Status != http.StatusForbidden {
		t.Errorf("got status %d without a user, want 403", resp.Status)
	}
}
