package decisionlog

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/klauspost/compress/gzip"
)

// chunk is some events as they are delivered: lines, or compressed lines, or a
// compressed array.
type chunk struct {
	body    []byte
	lens    []uint32  // of the events before they were compressed
	tickets []*ticket // of the events; empty if the log has one sink
	sealed  time.Time
	name    string // random; of an S3 object
	done    int    // bytes of body that need no other attempt; owned by the attempt
	refused int    // attempts that the sink answered with: this is no good
}

// sizeChunk is what a chunk takes beside its body and its events.
const sizeChunk = 200

// held is what the chunk takes in memory, in bytes.
func (c *chunk) held() int64 {
	return sizeChunk + int64(len(c.body)) + sizeGathered*int64(len(c.lens))
}

// separator is what follows each event in a gathering for such a sink.
func (k kind) separator() byte {
	if k == kindService {
		return ','
	}
	return '\n'
}

func newChunk(body []byte, g gathering) *chunk {
	return &chunk{
		body: body, lens: g.lens, tickets: g.tickets,
		sealed: time.Now(), name: strconv.FormatUint(rand.Uint64(), 36),
	}
}

// lines makes a chunk of a gathering as it is.
func lines(g gathering) *chunk {
	g.lens, g.tickets = slices.Clip(g.lens), slices.Clip(g.tickets)
	return newChunk(g.text(), g)
}

// pack makes chunks of a gathering, each at most limit bytes compressed. Where
// they are more, it halves them. An event that is larger alone may have most bytes:
// if need be without its nd_builtin_cache, and if it then is still larger, it is
// among those lost.
func pack(k kind, g gathering, limit, most int64) (chunks []*chunk, lost []gathering) {
	if len(g.lens) == 0 {
		return nil, nil
	}
	body := compress(k, g.blocks)
	switch {
	case int64(len(body)) <= limit, len(g.lens) == 1 && int64(len(body)) <= most:
		return []*chunk{newChunk(body, gathering{lens: slices.Clone(g.lens), tickets: slices.Clone(g.tickets)})}, nil
	case len(g.lens) > 1:
		first := g.cut(len(g.lens) / 2)
		chunks, lost = pack(k, first, limit, most)
		more, alsoLost := pack(k, g, limit, most)
		return append(chunks, more...), append(lost, alsoLost...)
	}
	if small, ok := withoutNDCache(k, g); ok {
		return pack(k, small, limit, most)
	}
	return nil, []gathering{g}
}

// split makes two chunks of one, each with half of its events. It is called when
// a service says that the chunk is too large. An event that is so alone is packed
// without its nd_builtin_cache; one that has none is lost.
func split(k kind, c *chunk) (chunks []*chunk, lost []gathering, err error) {
	text, err := expand(k, c.body)
	if err != nil {
		return nil, nil, err
	}
	g := gathering{blocks: [][]byte{text}, size: len(text), lens: c.lens, tickets: c.tickets}
	parts := []gathering{g}
	if len(g.lens) > 1 {
		first := g.cut(len(g.lens) / 2)
		parts = []gathering{first, g}
	} else if small, ok := withoutNDCache(k, g); ok {
		parts[0] = small
	} else {
		return nil, parts, nil
	}
	for _, part := range parts {
		chunk, _ := pack(k, part, math.MaxInt64, math.MaxInt64) // the service says what is too large
		chunks = append(chunks, chunk...)
	}
	return chunks, nil, nil
}

// withoutNDCache returns a gathering of one event without its nd_builtin_cache.
// It reports false where the event has none.
func withoutNDCache(k kind, g gathering) (gathering, bool) {
	text := g.blocks[0] // it has one event
	if !bytes.Contains(text, []byte(`"nd_builtin_cache"`)) {
		return g, false
	}
	body := text[:len(text)-1]
	var outcome []byte
	if k == kindRecords {
		outcome, body, _ = bytes.Cut(body, []byte{' '})
	}
	var event map[string]json.RawMessage
	if json.Unmarshal(body, &event) != nil || event["nd_builtin_cache"] == nil {
		return g, false
	}
	delete(event, "nd_builtin_cache")
	text, err := json.Marshal(event)
	if err != nil {
		return g, false
	}
	if k == kindRecords {
		text = appendRecord(nil, string(outcome), text)
	}
	small := gathering{}
	small.add(text, k.separator(), nil)
	small.tickets = g.tickets
	return small, true
}

// compressor compresses. It has large tables, and is used again.
type compressor struct {
	gzip *gzip.Writer
	out  bytes.Buffer
}

// maxCompressed is how much room for compressed bytes an unused compressor keeps.
const maxCompressed = 4 << 20

var compressors = sync.Pool{New: func() any {
	w, err := gzip.NewWriterLevel(nil, gzip.BestSpeed)
	if err != nil {
		panic(err)
	}
	return &compressor{gzip: w}
}}

// compress compresses the text of a gathering, which is not empty.
func compress(k kind, text [][]byte) []byte {
	c := compressors.Get().(*compressor)
	defer compressors.Put(c)
	c.out.Reset()
	c.gzip.Reset(&c.out) // a Buffer takes all, so that nothing below fails
	if k == kindService {
		c.gzip.Write([]byte{'['})
	}
	for i, block := range text {
		if k == kindService && i == len(text)-1 {
			block = block[:len(block)-1]
		}
		c.gzip.Write(block)
	}
	if k == kindService {
		c.gzip.Write([]byte{']'})
	}
	c.gzip.Close()
	body := bytes.Clone(c.out.Bytes())
	if c.out.Cap() > maxCompressed {
		c.out = bytes.Buffer{}
	}
	return body
}

// expand undoes compress.
func expand(k kind, body []byte) ([]byte, error) {
	r, err := gzip.NewReader(bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("reading a chunk again: %w", err)
	}
	text, err := io.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("reading a chunk again: %w", err)
	}
	if k == kindService {
		text[len(text)-1] = ','
		text = text[1:]
	}
	return text, nil
}

// shape says how large the chunks of a sink are. It adapts: compressed, they are
// to be somewhat smaller than they may be.
type shape struct {
	limit  int64 // of a chunk, compressed; less than most after the service found one too large
	most   int64 // what the tenant allows
	gather int64 // bytes of JSON that are to make a chunk
	space  int64 // most that may gather
}

func newShape(upload, buffer int64) shape {
	space := max(buffer/4, 1)
	return shape{limit: upload, most: upload, gather: min(upload, space), space: space}
}

// aim is what part of what a chunk may be it should be.
const aim = .9

// packed notes what a gathering of so many bytes came to. It is ignored if there
// was too little of it to tell.
func (s *shape) packed(text, body int) {
	if int64(text) < s.gather/2 || body == 0 {
		return
	}
	want := int64(float64(text) * aim * float64(s.limit) / float64(body))
	s.gather = min(max(want, s.gather/4, 1), 4*s.gather, s.space)
}

// tooLarge notes that a chunk of so many bytes was refused for its size.
func (s *shape) tooLarge(body int) {
	s.limit = max(minUploadBytes, min(s.limit, int64(body)/2))
	s.gather = max(s.gather/2, 1)
}

// taken notes that a chunk was not. After a while, a larger one is tried.
func (s *shape) taken() {
	s.limit = min(s.most, s.limit+s.limit/16+1)
}
