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
	if rest := g.text(); len(first.lens) != 5 || string(first.text()) != "\nx\nxx\nxxx\nxxxx\n" || len(g.lens) != 15 || !bytes.HasPrefix(rest, []byte("xxxxx\n")) {
		t.Errorf("got %q and %q", first.text(), rest)
	}
	if all := g.cut(15); g.held() != 0 || len(all.lens) != 15 {
		t.Errorf("holds %d", g.held())
	}
}

// However a gathering is cut, its events are there in their order, in blocks that
// have been used for others before.
func TestGatheringCut(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 0))
		var g gathering
		var want []byte
		for range 1 + r.IntN(300) {
			text := bytes.Repeat([]byte{byte('a' + r.IntN(26))}, r.IntN(1<<r.IntN(18)))
			want = append(append(want, text...), '\n')
			g.add(text, '\n', &ticket{})
		}
		whole := g
		if got := g.text(); !bytes.Equal(got, want) || g.size != len(want) {
			t.Fatalf("gathered %d bytes, want %d", len(got), len(want))
		}
		var got []byte
		for len(g.lens) > 0 {
			part := g.cut(r.IntN(len(g.lens) + 1))
			if r.IntN(2) == 0 {
				half := part.cut(len(part.lens) / 2)
				got = append(got, half.text()...)
			}
			sum := 0
			for _, n := range part.lens {
				sum += int(n)
			}
			if len(part.text()) != part.size || sum != part.size || len(part.tickets) != len(part.lens) {
				t.Fatalf("%d events of %d bytes, and %d tickets, are %d bytes", len(part.lens), part.size, len(part.tickets), sum)
			}
			got = append(got, part.text()...)
		}
		if !bytes.Equal(got, want) || g.size != 0 {
			t.Fatalf("cut to %d bytes, want %d", len(got), len(want))
		}
		freeBlocks(whole.blocks)
	}
}
