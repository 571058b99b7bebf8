package decisionlog

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

// gathered returns a gathering of events of about so many random bytes each.
func gathered(k kind, sizes ...int) gathering {
	var g gathering
	for i, n := range sizes {
		var b strings.Builder
		fmt.Fprintf(&b, `{"decision_id":"%d","nd_builtin_cache":{},"x":"`, i)
		for b.Len() < n {
			fmt.Fprintf(&b, "%016x", rand.Uint64())
		}
		text := []byte(b.String() + `"}`)
		if k == kindRecords {
			text = appendRecord(nil, "denied", text)
		}
		g.add(text, k.separator(), &ticket{left: i})
	}
	return g
}

func TestPack(t *testing.T) {
	for _, k := range []kind{kindService, kindS3, kindRecords} {
		const limit, most = 1000, 3000
		sizes := []int{100, 100, 2500, 100, 9000, 50}
		for range 100 {
			sizes = append(sizes, rand.IntN(1000))
		}
		g := gathered(k, sizes...)
		chunks, lost := pack(k, g, limit, most)
		next := 0
		check := func(c *chunk) {
			if n := len(c.body); n > limit && (len(c.lens) > 1 || n > most) {
				t.Errorf("%d events have %d bytes", len(c.lens), n)
			}
			text, err := expand(k, c.body)
			if err != nil {
				t.Fatal(err)
			}
			if len(c.lens) != len(c.tickets) {
				t.Errorf("%d events have %d tickets", len(c.lens), len(c.tickets))
			}
			for i, n := range c.lens {
				var event struct {
					ID string `json:"decision_id"`
				}
				if err := json.Unmarshal(bytes.TrimPrefix(bytes.TrimRight(text[:n], ",\n"), []byte("denied ")), &event); err != nil {
					t.Fatal(err)
				}
				if next == 4 {
					next++ // the one that is lost
				}
				if event.ID != fmt.Sprint(next) || c.tickets[i].left != next {
					t.Errorf("got event %s with ticket %d, want %d", event.ID, c.tickets[i].left, next)
				}
				text = text[n:]
				next++
			}
		}
		for _, c := range chunks {
			parts, none, err := split(k, c)
			if err != nil || len(none) > 0 && len(c.lens) > 1 {
				t.Fatalf("got %v, lost %d", err, len(none))
			}
			sum := 0
			for _, p := range parts {
				sum += len(p.lens)
			}
			if sum != len(c.lens) {
				t.Errorf("%d events were split to %d", len(c.lens), sum)
			}
			check(c)
		}
		if next != len(sizes) || len(lost) != 1 || len(lost[0].lens) != 1 || lost[0].tickets[0].left != 4 {
			t.Errorf("got %d events, lost %d", next, len(lost))
		}
	}
}

// What a gathering holds is what it would hold more for each event, and what it
// gives back when they are cut off.
func TestGathering(t *testing.T) {
	var g gathering
	held := int64(0)
	for i := range 20 {
		text := bytes.Repeat([]byte("x"), i)
		held += g.more(text)
		g.add(text, '\n', nil)
		if g.held() != held {
			t.Fatalf("holds %d, want %d", g.held(), held)
		}
	}
	first := g.cut(5)
	if len(first.lens) != 5 || len(first.text) != 0+1+2+3+4+5 || len(g.lens) != 15 || g.text[5] != '\n' {
		t.Errorf("got %q and %q", first.text, g.text)
	}
	if all := g.cut(15); g.held() != 0 || len(all.lens) != 15 {
		t.Errorf("holds %d", g.held())
	}
}
