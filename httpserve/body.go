package httpserve

import (
	"compress/gzip"
	"errors"
	"io"
	"mime"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
)

// content says which bodies a route takes by their type.
type content int

const (
	anyContent    content = iota // whatever it is called
	jsonOrInvalid                // JSON, or 400
	jsonOnly                     // JSON, or 415
)

// check returns an error for a body of a type that the route does not take.
// Without a body there is no type.
func (c content) check(r *request) error {
	if c == anyContent || !hasBody(r.Request) || isJSON(r.Header.Values("Content-Type")) {
		return nil
	}
	if c == jsonOrInvalid {
		return invalidf("content-type is not application/json")
	}
	return faultf(http.StatusUnsupportedMediaType, codeContent, "content-type is not application/json")
}

func hasBody(r *http.Request) bool {
	return r.ContentLength != 0 && r.Body != nil && r.Body != http.NoBody
}

// isJSON reports whether the values of a Content-Type are one that is JSON.
func isJSON(types []string) bool {
	if len(types) != 1 {
		return false
	}
	kind, params, err := mime.ParseMediaType(types[0])
	if err != nil || kind != "application/json" && !(strings.HasPrefix(kind, "application/") && strings.HasSuffix(kind, "+json")) {
		return false
	}
	charset, ok := params["charset"]
	return !ok || strings.EqualFold(charset, "utf-8")
}

// memory bounds the bodies that are being answered.
type memory struct {
	limit int64
	used  atomic.Int64
}

// reserve takes n bytes, or returns errMemory.
func (m *memory) reserve(n int64) error {
	if used := m.used.Add(n); used > m.limit {
		m.used.Add(-n)
		return errMemory
	}
	return nil
}

func (m *memory) release(n int64) { m.used.Add(-n) }

// body is the body of a request, and what it takes of the server's memory.
type body struct {
	text   []byte
	size   int64 // that was reserved
	memory *memory
}

// release gives back what the body takes. Its text must not be used any more.
func (b *body) release() { b.memory.release(b.size) }

// grow takes n bytes more of the server's memory, or returns errMemory.
func (b *body) grow(n int64) error {
	if err := b.memory.reserve(n); err != nil {
		return err
	}
	b.size += n
	return nil
}

// step is what a body grows by when its size is not known, in bytes.
const step = 64 << 10

// bodyOf reads the body of a request, which is at most limit bytes, also after it
// was expanded. The caller releases it when it is answered.
func (s *Server) bodyOf(r *request, limit int64) (*body, error) {
	b := &body{memory: &s.memory}
	if !hasBody(r.Request) {
		return b, nil
	}
	if r.ContentLength > limit {
		return nil, tooLarge(limit)
	}
	var from io.Reader = http.MaxBytesReader(nil, r.Body, limit)
	switch encoding := r.Header.Values("Content-Encoding"); {
	case len(encoding) == 0 || len(encoding) == 1 && strings.EqualFold(encoding[0], "identity"):
	case len(encoding) == 1 && strings.EqualFold(encoding[0], "gzip"):
		zipped, err := gzip.NewReader(from)
		if err != nil {
			return nil, bodyError(err, limit)
		}
		from = zipped
	default:
		return nil, faultf(http.StatusUnsupportedMediaType, codeContent, "content-encoding is not gzip")
	}
	text, size, err := b.read(from, r.ContentLength, limit)
	if err != nil {
		s.memory.release(size)
		return nil, bodyError(err, limit)
	}
	b.text, b.size = text, size
	return b, nil
}

// read reads all that there is, and says what it has reserved for that.
func (b *body) read(from io.Reader, expected, limit int64) (text []byte, size int64, err error) {
	first := min(max(expected, 512), limit, step) + 1
	if err := b.memory.reserve(first); err != nil {
		return nil, 0, err
	}
	text, size = make([]byte, 0, first), first
	for {
		n, err := from.Read(text[len(text):cap(text)])
		text = text[:len(text)+n]
		switch {
		case int64(len(text)) > limit:
			return nil, size, errTooLarge
		case errors.Is(err, io.EOF):
			return text, size, nil
		case err != nil:
			return nil, size, err
		}
		if len(text) == cap(text) {
			more := min(max(int64(len(text)), step), limit+1-int64(len(text)))
			if err := b.memory.reserve(more); err != nil {
				return nil, size, err
			}
			size += more
			text = slices.Grow(text, int(more))
		}
	}
}

func tooLarge(limit int64) error {
	return faultf(http.StatusRequestEntityTooLarge, codeTooLarge, "body is larger than %d bytes", limit)
}

// bodyError says what is wrong with a body that could not be read.
func bodyError(err error, limit int64) error {
	var tooMany *http.MaxBytesError
	switch {
	case errors.As(err, &tooMany), errors.Is(err, errTooLarge):
		return tooLarge(limit)
	case errors.Is(err, errMemory):
		return err
	}
	return invalidf("body cannot be read")
}
