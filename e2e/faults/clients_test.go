package faults

import (
	"context"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// hostile is a connection that speaks HTTP/2 as it likes.
type hostile struct {
	net.Conn
	*http2.Framer
}

// connect opens a connection, with the preface unless it is to be left out.
func connect(addr string) (*hostile, error) {
	conn, err := net.DialTimeout("tcp", addr, 5*time.Second)
	if err != nil {
		return nil, err
	}
	h := &hostile{conn, http2.NewFramer(conn, conn)}
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		return nil, err
	}
	return h, h.WriteSettings()
}

// open opens a stream of a check, and does not end it.
func (h *hostile) open(stream uint32, buf *hpackBuffer) error {
	return h.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: buf.block, EndHeaders: true})
}

type hpackBuffer struct{ block []byte }

func (b *hpackBuffer) Write(p []byte) (int, error) {
	b.block = append(b.block, p...)
	return len(p), nil
}

func headersOfCheck() *hpackBuffer {
	b := new(hpackBuffer)
	enc := hpack.NewEncoder(b)
	for _, f := range [][2]string{
		{":method", "POST"}, {":scheme", "http"}, {":path", authv3.Authorization_Check_FullMethodName}, {":authority", "x"},
		{"content-type", "application/grpc"}, {"te", "trailers"},
	} {
		_ = enc.WriteField(hpack.HeaderField{Name: f[0], Value: f[1], Sensitive: true}) // not indexed: the block may be sent again
	}
	return b
}

// until returns how long it takes until the server ends a connection; 0: it did
// not within that time.
func (h *hostile) until(atMost time.Duration) time.Duration {
	begun := time.Now()
	_ = h.SetReadDeadline(begun.Add(atMost))
	_, err := io.Copy(io.Discard, h.Conn)
	if ne, ok := err.(net.Error); ok && ne.Timeout() {
		return 0
	}
	return time.Since(begun)
}

// Clients that only mean to hurt: those that ask are answered all the while.
func TestHostileClients(t *testing.T) {
	s := newShelf(t)
	s.publish("orders", 1)
	g := serve(t, from(s.URL))
	c := dial(t, g.GRPC)
	c.becomes(t, "orders", 1, 5*time.Second)
	stop := asks(t, s.judge, 300, []string{"orders"}, c.ask)
	time.Sleep(2 * time.Second)
	alone := stop(t)
	goroutines, open := metric(t, g, "go_goroutines"), metric(t, g, "process_open_fds")

	for _, attack := range []struct {
		name string
		run  func(t *testing.T) string
	}{
		{"slow preface", func(t *testing.T) string {
			const count = 200
			var reaped atomic.Int64
			var slowest atomic.Int64
			var wg sync.WaitGroup
			for range count {
				wg.Go(func() {
					conn, err := net.Dial("tcp", g.GRPC)
					if err != nil {
						t.Error(err)
						return
					}
					defer conn.Close()
					begun := time.Now()
					go func() { // one byte a second
						for i := range len(http2.ClientPreface) {
							if _, err := conn.Write([]byte(http2.ClientPreface[i : i+1])); err != nil {
								return
							}
							time.Sleep(time.Second)
						}
					}()
					if (&hostile{Conn: conn}).until(14*time.Second) > 0 {
						reaped.Add(1)
						slowest.Store(max(slowest.Load(), int64(time.Since(begun))))
					}
				})
			}
			wg.Wait()
			if reaped.Load() < count {
				t.Errorf("%d of %d connections were ended, want all", reaped.Load(), count)
			}
			return fmt.Sprintf("%d connections ended after at most %s", reaped.Load(), time.Duration(slowest.Load()).Round(10*time.Millisecond))
		}},
		{"idle streams", func(t *testing.T) string {
			const conns, streams = 10, 1000
			block := headersOfCheck()
			for range conns {
				h, err := connect(g.GRPC)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { h.Close() })
				go func() { _, _ = io.Copy(io.Discard, h.Conn) }()
				for i := range uint32(streams) {
					if err := h.open(2*i+1, block); err != nil {
						t.Fatal(err)
					}
				}
			}
			time.Sleep(3 * time.Second)
			return fmt.Sprintf("%d streams on %d connections are open, goroutines %v", conns*streams, conns, metric(t, g, "go_goroutines"))
		}},
		{"RST flood", func(t *testing.T) string {
			block := headersOfCheck()
			return flood(t, g.GRPC, func(h *hostile, i uint32) error {
				if err := h.open(2*i+1, block); err != nil {
					return err
				}
				return h.WriteRSTStream(2*i+1, http2.ErrCodeCancel)
			})
		}},
		{"PING flood", func(t *testing.T) string {
			return flood(t, g.GRPC, func(h *hostile, i uint32) error { return h.WritePing(false, [8]byte{byte(i)}) })
		}},
		{"SETTINGS flood", func(t *testing.T) string {
			return flood(t, g.GRPC, func(h *hostile, i uint32) error { return h.WriteSettings() })
		}},
	} {
		t.Run(attack.name, func(t *testing.T) {
			memory := watchMemory(t, g.Pid())
			stop := asks(t, s.judge, 300, []string{"orders"}, c.ask)
			what := attack.run(t)
			r := stop(t)
			before, peak := memory()
			if r.failed > 0 {
				t.Errorf("faults of others: %v, want none", r.faults)
			}
			if r.p99 > time.Second {
				t.Errorf("p99 of others: %s, want at most 1 s", r.p99)
			}
			if peak-before > 256<<20 {
				t.Errorf("memory rose by %s", mib(peak-before))
			}
			t.Logf("PASS %s: %s; others: %s; p99 alone %s; memory rose by %s", attack.name, what, r, alone.p99.Round(10*time.Microsecond), mib(peak-before))
		})
	}
	took := eventually(t, "nothing is left of the hostile clients", func() bool {
		return metric(t, g, "go_goroutines") <= goroutines+30 && metric(t, g, "process_open_fds") <= open+10
	})
	t.Logf("PASS all: goroutines and files are as before after %s", took)
}

// flood sends what it is told on 4 connections for 3 seconds, 5,000 a second on
// each: more would measure who gets the CPUs of this machine. A connection that
// the server ends is opened again.
func flood(t *testing.T, addr string, send func(h *hostile, i uint32) error) string {
	var sent, ended atomic.Int64
	stop := time.Now().Add(3 * time.Second)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for time.Now().Before(stop) {
				h, err := connect(addr)
				if err != nil {
					t.Error(err)
					return
				}
				go func() { _, _ = io.Copy(io.Discard, h.Conn) }()
				_ = h.SetWriteDeadline(stop.Add(time.Second))
				for i := uint32(0); time.Now().Before(stop); i++ {
					if send(h, i) != nil {
						ended.Add(1)
						break
					}
					sent.Add(1)
					if i%50 == 49 {
						time.Sleep(10 * time.Millisecond)
					}
				}
				h.Close()
			}
		})
	}
	wg.Wait()
	return fmt.Sprintf("%d sent, the server ended %d connections", sent.Load(), ended.Load())
}

// Many proxies connect again at the same time, as after a restart of them all.
func TestReconnectStorm(t *testing.T) {
	const proxies = 200
	s := newShelf(t)
	good := []string{"orders", "payments"}
	for _, tenant := range good {
		s.publish(tenant, 1)
	}
	g := serve(t, from(s.URL))
	c := dial(t, g.GRPC)
	for _, tenant := range good {
		c.becomes(t, tenant, 1, 5*time.Second)
	}
	stop := asks(t, s.judge, 300, good, c.ask)
	var first atomic.Int64 // the slowest of the first answers
	begun := time.Now()
	rounds := 0
	for time.Since(begun) < 4*time.Second {
		rounds++
		var wg sync.WaitGroup
		for i := range proxies {
			wg.Go(func() {
				conn, err := grpc.NewClient(g.GRPC, grpc.WithTransportCredentials(insecure.NewCredentials()))
				if err != nil {
					t.Error(err)
					return
				}
				defer conn.Close()
				begun := time.Now()
				q := i % len(questions)
				ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
				defer cancel()
				a := answerOf(authv3.NewAuthorizationClient(conn).Check(ctx, questions[q].check("orders")))
				s.judge.hear("orders", q, a, time.Since(begun))
				first.Store(max(first.Load(), int64(time.Since(begun))))
			})
		}
		wg.Wait()
	}
	r := stop(t)
	storm := s.judge.sentence(t)
	if r.failed > 0 || storm.failed > 0 {
		t.Errorf("faults: %v, %v, want none", r.faults, storm.faults)
	}
	if loads := s.Answers("orders", 200) + s.Answers("payments", 200); loads != 2 {
		t.Errorf("bundles were loaded %d times, want twice", loads)
	}
	t.Logf("PASS: %d proxies connected %d times within %s: %s; others: %s; no tenant was loaded again",
		proxies, rounds, time.Since(begun).Round(10*time.Millisecond), storm, r)
}
