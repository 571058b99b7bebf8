package bundles

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"strings"
)

// Read reads a bundle from a gzipped tar archive, whole and within the limits,
// and gives it a name; the ETag is left empty. It is the one reader in front
// of OPA's: OPA sees a bundle only when all of the following holds.
//
// The stream is one gzip member that holds one tar archive with its end mark,
// and nothing else. Its entries are regular files and directories (and the
// comment that "git archive" writes first); there are no links, devices or
// sparse files. Paths are relative, with "/", "./" or nothing in front, each
// there once, without "..", backslashes or control characters. The archive
// holds policy or data, and is neither a delta bundle nor one with
// WebAssembly, nor one with a plan alone.
//
// Memory is taken as bytes arrive, never because a header promises them.
//
// It may not be signed: there is no key to verify it with.
//
// Where the limits have Turns, a large bundle waits for its turn.
//
// An error of r, other than io.EOF, is returned as it is. Every other error
// wraps ErrRefused.
func Read(r io.Reader, name string, limits Limits) (*Bundle, error) {
	c := newContent(limits.orDefault(), nil)
	return c.readFrom(context.Background(), r, name)
}

// readFrom reads the bundle in the archive that r supplies. Only the waiting for
// a turn heeds ctx. Before it waits, it has read all of r.
func (c *content) readFrom(ctx context.Context, r io.Reader, name string) (b *Bundle, err error) {
	defer func() { c.settle(b, err) }()
	in := &supplied{r: r, left: c.limits.Bytes, keep: c.keepArchive, place: func() error { return c.arrive(ctx) }}
	c.supplied = in.rest
	// What the archive adds to its files: per entry a header, padding, and
	// perhaps another header for a long name; then the padding of the end.
	overhead := int64(c.limits.Files)*(4<<10) + 1<<20
	out := &unpacked{left: overhead}
	err = unpack(ctx, in, out, c)
	if err == nil && in.keep {
		err = c.grow(ctx, in.n)
	}
	switch {
	case errors.Is(err, errNoTurn):
		return nil, ctx.Err()
	case in.err != nil:
		return nil, in.err
	case in.over:
		return nil, refuse("archive is larger than %s compressed", bytesText(c.limits.Bytes))
	case out.over:
		return nil, refuse("archive has more than %s of headers and padding", bytesText(overhead))
	case errors.Is(err, ErrRefused):
		return nil, err
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return nil, refuse("archive is cut short")
	case err != nil:
		return nil, refuse("archive is broken: %w", err)
	}
	if b, err = c.bundle(name, in.n); err != nil {
		return nil, err
	}
	if in.keep {
		b.Archive = in.data
	}
	return b, nil
}

// unpack puts the files of an archive into c. An error that does not wrap
// ErrRefused comes from in, or from what unpacks it.
func unpack(ctx context.Context, in *supplied, out *unpacked, c *content) error {
	buffered := bufio.NewReaderSize(in, 32<<10)
	if magic, err := buffered.Peek(2); err != nil || magic[0] != 0x1f || magic[1] != 0x8b {
		start, err := buffered.Peek(512)
		if err != nil && err != io.EOF {
			return err
		}
		return refuse("not a gzip archive%s", looks(start))
	}
	zr, err := gzip.NewReader(buffered)
	if err != nil {
		return err
	}
	zr.Multistream(false)
	out.r = zr

	tr := tar.NewReader(out)
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if err := unpackEntry(ctx, tr, h, out, c); err != nil {
			return err
		}
	}

	// The end mark is 1 KiB of zeros. Without it the archive may lack entries.
	if out.zeros < 1<<10 {
		return io.ErrUnexpectedEOF
	}
	mark := out.zeros
	n, err := io.Copy(io.Discard, out)
	if err != nil {
		return err
	}
	if out.zeros != mark+n {
		return refuse("archive has data after its end")
	}
	switch rest, err := buffered.Peek(2); {
	case err != nil && err != io.EOF:
		return err
	case len(rest) == 2 && rest[0] == 0x1f && rest[1] == 0x8b:
		return refuse("archive has more than one gzip member")
	case len(rest) > 0:
		return refuse("archive has data after its end")
	}
	return nil
}

func unpackEntry(ctx context.Context, tr *tar.Reader, h *tar.Header, out *unpacked, c *content) error {
	dir := h.Typeflag == tar.TypeDir
	what := ""
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeDir:
		for key := range h.PAXRecords {
			if strings.HasPrefix(key, "GNU.sparse.") {
				what = "a sparse file"
			}
		}
	case tar.TypeXGlobalHeader:
		// "git archive" writes the commit there. It counts, and says nothing.
		if c.entries++; c.entries > c.limits.Files {
			return refuse("it has more than %d entries", c.limits.Files)
		}
		return nil
	case tar.TypeSymlink:
		what = "a symbolic link"
	case tar.TypeLink:
		what = "a hard link"
	case tar.TypeChar, tar.TypeBlock:
		what = "a device"
	case tar.TypeFifo:
		what = "a named pipe"
	case tar.TypeGNUSparse:
		what = "a sparse file"
	default:
		what = "of an unknown type"
	}
	if what != "" {
		return refuse("entry %q is %s", brief(h.Name), what)
	}
	p, err := c.enter(h.Name, dir)
	if err != nil || dir {
		return err
	}
	keep, err := c.reserve(p, h.Size)
	if err != nil {
		return err
	}
	out.left += h.Size
	if err := c.grow(ctx, c.expanded); err != nil {
		return err
	}
	if !keep {
		return nil // tr.Next skips it
	}
	data, err := readAll(tr, h.Size)
	if err != nil {
		return err
	}
	c.add(p, data)
	return nil
}

// readAll reads size bytes, and takes memory as they come: an archive of a few
// bytes can promise any size.
func readAll(r io.Reader, size int64) ([]byte, error) {
	data := make([]byte, 0, min(size, 256<<10))
	for {
		n, err := io.ReadFull(r, data[len(data):cap(data)])
		data = data[:len(data)+n]
		if err != nil {
			return nil, err
		}
		if int64(len(data)) == size {
			return data, nil
		}
		grown := make([]byte, len(data), min(size, 2*int64(cap(data))))
		copy(grown, data)
		data = grown
	}
}

// looks says what something that is not a gzip archive looks like.
func looks(start []byte) string {
	text := bytes.TrimLeft(bytes.TrimPrefix(start, []byte("\xef\xbb\xbf")), " \t\r\n")
	switch {
	case len(start) == 0:
		return ": it is empty"
	case len(start) > 262 && string(start[257:262]) == "ustar":
		return ": it looks like a tar archive that is not compressed"
	case bytes.HasPrefix(start, []byte("PK\x03\x04")):
		return ": it looks like a zip archive"
	case bytes.HasPrefix(start, []byte("\x28\xb5\x2f\xfd")):
		return ": it looks like a zstd archive"
	case bytes.HasPrefix(text, []byte("<")):
		return ": it looks like HTML or XML"
	case bytes.HasPrefix(text, []byte("{")), bytes.HasPrefix(text, []byte("[")):
		return ": it looks like JSON"
	}
	return ""
}

// errOver: there is more than the bound.
var errOver = errors.New("more than the bound")

// supplied bounds and counts what is read from the caller's reader, and
// remembers its error: what decodes the stream may replace it by its own.
type supplied struct {
	r    io.Reader
	left int64
	n    int64 // bytes read from r
	over bool  // there was more than the bound
	err  error // of r, other than io.EOF

	keep  bool         // all of it is kept
	data  []byte       // what is kept, or read ahead
	pos   int          // what of that has been read on
	ahead bool         // data has all that is left of r
	place func() error // is called before much is in data
	large bool         // place has been called
}

func (s *supplied) Read(p []byte) (int, error) {
	switch {
	case s.pos < len(s.data):
		n := copy(p, s.data[s.pos:])
		s.pos += n
		return n, nil
	case s.ahead:
		return 0, s.end()
	}
	n, err := s.pull(p)
	if s.keep {
		if err := s.append(p[:n]); err != nil {
			return 0, err
		}
		s.pos = len(s.data)
	}
	return n, err
}

// end is the error after the last byte.
func (s *supplied) end() error {
	switch {
	case s.over:
		return errOver
	case s.err != nil:
		return s.err
	}
	return io.EOF
}

// pull reads from r within the bound.
func (s *supplied) pull(p []byte) (int, error) {
	if s.over || s.err != nil {
		return 0, s.end()
	}
	if int64(len(p)) > s.left+1 {
		p = p[:s.left+1]
	}
	n, err := s.r.Read(p)
	if int64(n) > s.left {
		s.over = true
		n, err = int(s.left), errOver
	} else if err != nil && err != io.EOF {
		s.err = err
	}
	s.left -= int64(n)
	s.n += int64(n)
	return n, err
}

func (s *supplied) append(p []byte) error {
	if !s.large && len(s.data)+len(p) > largeBytes {
		if err := s.place(); err != nil {
			return err
		}
		s.large = true
	}
	s.data = append(s.data, p...)
	return nil
}

// rest reads all that is left of r.
func (s *supplied) rest() error {
	chunk := make([]byte, 32<<10)
	for !s.ahead {
		n, err := s.pull(chunk)
		if err := s.append(chunk[:n]); err != nil {
			return err
		}
		s.ahead = err != nil
	}
	if err := s.end(); err != io.EOF {
		return err
	}
	return nil
}

// unpacked bounds what is unpacked, headers and skipped files too, and counts
// the zeros it ends with so far.
type unpacked struct {
	r     io.Reader
	left  int64 // grows by the size of each file that is allowed
	over  bool
	zeros int64
}

func (u *unpacked) Read(p []byte) (int, error) {
	if u.left <= 0 {
		u.over = true
		return 0, errOver
	}
	if int64(len(p)) > u.left {
		p = p[:u.left]
	}
	n, err := u.r.Read(p)
	u.left -= int64(n)
	if kept := len(bytes.TrimRight(p[:n], "\x00")); kept > 0 {
		u.zeros = int64(n - kept)
	} else {
		u.zeros += int64(n)
	}
	return n, err
}
