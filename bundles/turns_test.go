package bundles_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gatehouse-authz/gatehouse/bundles"
)

// expanding is large only once it is expanded, bulky also before.
func expanding() files {
	return orders.with("limits/long/data.json", `"`+strings.Repeat("x", 2<<20)+`"`)
}

var bulky = sync.OnceValue(func() files {
	noise := make([]byte, 1600<<10)
	rand.NewChaCha8([32]byte{}).Read(noise)
	for i := range noise {
		noise[i] = '#' + noise[i]%57 // up to the bracket: no quote, no backslash
	}
	return orders.with("limits/noise/data.json", `"`+string(noise)+`"`)
})

// Large bundles are read as many at once as there are turns; small ones always.
func TestTurns(t *testing.T) {
	t.Parallel()
	for name, large := range map[string]files{"expanding": expanding(), "bulky": bulky()} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			limits := bundles.Limits{Turns: bundles.NewTurns(2)}
			archive, small := large.tarball(t), orders.tarball(t)
			var held []*bundles.Bundle
			for range 2 {
				b, err := bundles.Read(bytes.NewReader(archive), "orders", limits)
				if err != nil {
					t.Fatal(err)
				}
				held = append(held, b)
			}
			for range 10 {
				if _, err := bundles.Read(bytes.NewReader(small), "orders", limits); err != nil {
					t.Fatal(err)
				}
			}

			server := newServer(t, func(w http.ResponseWriter, r *http.Request) { w.Write(archive) })
			h := bundles.NewHTTP(bundles.HTTPConfig{URL: server, Limits: limits, Timeout: 5 * time.Second})
			root := t.TempDir()
			large.writeTo(t, filepath.Join(root, "orders"))
			dir, err := bundles.NewDir(root, limits)
			if err != nil {
				t.Fatal(err)
			}
			for _, source := range []bundles.Source{h, dir} {
				ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
				_, err := source.Fetch(ctx, "orders", "")
				cancel()
				if !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, bundles.ErrRefused) {
					t.Errorf("%T, no turn: got %v, want context.DeadlineExceeded", source, err)
				}
			}

			time.AfterFunc(50*time.Millisecond, held[0].Done)
			for _, source := range []bundles.Source{h, dir} {
				b, err := source.Fetch(t.Context(), "orders", "")
				if err != nil {
					t.Fatal(err)
				}
				if b.Archive != nil {
					t.Error("got the archive, which nobody asked for")
				}
				b.Done()
				b.Done() // gives back no more than one
			}
			runtime.KeepAlive(held)
		})
	}
}

// Whatever becomes of many large bundles, at most so many are there at once, and
// afterwards each turn is free again.
func TestTurnsMany(t *testing.T) {
	t.Parallel()
	const k = 3
	limits := bundles.Limits{Turns: bundles.NewTurns(k)}
	good := bulky().tarball(t)
	cut := good[:len(good)-10]
	refused := bulky().with("orders/rule.rego", "package").tarball(t)
	var turn atomic.Int32
	server := newServer(t, func(w http.ResponseWriter, r *http.Request) {
		switch turn.Add(1) % 4 {
		case 0:
			w.Write(cut)
		case 1:
			w.Write(refused)
		default:
			w.Write(good)
		}
	})
	h := bundles.NewHTTP(bundles.HTTPConfig{URL: server, Limits: limits, KeepArchive: true})
	var now, most atomic.Int32
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			b, err := h.Fetch(t.Context(), "orders", "")
			if err != nil {
				if !errors.Is(err, bundles.ErrRefused) {
					t.Error(err)
				}
				return
			}
			if !bytes.Equal(b.Archive, good) {
				t.Error("got another archive than was supplied")
			}
			n := now.Add(1)
			for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
			}
			time.Sleep(5 * time.Millisecond)
			now.Add(-1)
			b.Done()
		})
	}
	group.Wait()
	if got := most.Load(); got < 1 || got > k {
		t.Errorf("got %d at once, want at most %d", got, k)
	}
	var held []*bundles.Bundle
	for range k {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		b, err := h.ReadContext(ctx, bytes.NewReader(good), "orders")
		cancel()
		if err != nil {
			t.Fatalf("a turn was not given back: %v", err)
		}
		held = append(held, b)
	}
	runtime.KeepAlive(held)
}

// An archive that does not go on arriving takes nobody's turn.
func TestTurnsStalled(t *testing.T) {
	t.Parallel()
	limits := bundles.Limits{Turns: bundles.NewTurns(1)}
	archive := bulky().tarball(t)
	server := newServer(t, func(w http.ResponseWriter, r *http.Request) {
		w.Write(archive[:len(archive)-100])
		http.NewResponseController(w).Flush()
		<-r.Context().Done()
	})
	h := bundles.NewHTTP(bundles.HTTPConfig{URL: server, Limits: limits})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 3)
	for range cap(ended) {
		go func() {
			_, err := h.Fetch(ctx, "orders", "")
			ended <- err
		}()
	}
	for range 3 {
		b, err := bundles.Read(bytes.NewReader(archive), "orders", limits)
		if err != nil {
			t.Fatal(err)
		}
		b.Done()
	}
	cancel()
	for range cap(ended) {
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("stalled: got %v, want context.Canceled", err)
		}
	}
}

// The turn of a bundle that nobody was done with is free once it is collected.
func TestTurnsDropped(t *testing.T) {
	t.Parallel()
	limits := bundles.Limits{Turns: bundles.NewTurns(1)}
	archive := expanding().tarball(t)
	read := func() {
		if _, err := bundles.Read(bytes.NewReader(archive), "orders", limits); err != nil {
			t.Error(err)
		}
	}
	read()
	done := make(chan struct{})
	go func() {
		read()
		close(done)
	}()
	for deadline := time.After(20 * time.Second); ; {
		runtime.GC()
		select {
		case <-done:
			return
		case <-deadline:
			t.Fatal("the turn was not given back")
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// An archive is bounded as it arrives, and one that is none is not waited for.
func TestSupply(t *testing.T) {
	t.Parallel()
	endless := io.MultiReader(strings.NewReader("<html>"), zeros{})
	if _, err := bundles.Read(endless, "orders", bundles.Limits{}); !errors.Is(err, bundles.ErrRefused) || !strings.Contains(err.Error(), "HTML") {
		t.Errorf("got %v, want HTML refused", err)
	}
	archive := bulky().tarball(t)
	for _, limit := range []int{len(archive) - 1, 1 << 20, 1<<20 - 1, 1<<20 + 1} {
		_, err := bundles.Read(bytes.NewReader(archive), "orders", bundles.Limits{Bytes: int64(limit)})
		if !errors.Is(err, bundles.ErrRefused) || !strings.Contains(err.Error(), "compressed") {
			t.Errorf("limit %d: got %v, want it refused", limit, err)
		}
	}
	if _, err := bundles.Read(bytes.NewReader(archive), "orders", bundles.Limits{Bytes: int64(len(archive))}); err != nil {
		t.Errorf("at the limit: got %v", err)
	}
}
