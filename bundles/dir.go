package bundles

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
	"unicode"

	"github.com/open-policy-agent/opa/v1/bundle"
)

const (
	archiveExt = ".tar.gz"

	// maxNames bounds the entries of the directory that Names lists.
	maxNames = 100_000

	// clockTick is longer than the tick of a file system's clock (10 ms at
	// most). Two writes within one tick can leave the same times behind.
	clockTick = 20 * time.Millisecond

	// attempts bounds how often a Fetch tries to see a folder that stands still.
	attempts = 4
)

// Dir is a Source that reads bundles below one directory. Bundle "orders" is
// either the folder orders, whose files mean what they mean to "opa build -b
// orders", or the archive orders.tar.gz, not both.
//
// The ETag of a bundle is a hash over the stat of its files (path, size,
// times, inode), so a bundle that has not changed is not read. A folder should
// be changed by renaming or relinking what is complete; one that changes while
// it is read is read again, and is an error if it does not stand still.
//
// Links are followed as long as they lead to somewhere inside the bundle's
// folder, so the files of a Kubernetes ConfigMap can be read where they are
// mounted; entries whose name starts with ".." are not looked into, as it is
// where Kubernetes keeps the versions. The folder or archive may itself be a
// link to somewhere inside the directory. Any other link, and a device, socket
// or named pipe, is a refusal. Nothing outside is ever opened.
type Dir struct {
	root   string
	limits Limits
	verify *bundle.VerificationConfig // nil: no bundle may be signed
}

var _ Source = (*Dir)(nil)

// NewDir returns a source for the bundles below root. It returns an error if
// root is not a directory now. Root may be a link, and may be replaced later:
// each Fetch opens it anew.
func NewDir(root string, limits Limits) (*Dir, error) {
	abs, err := filepath.Abs(root)
	if err != nil {
		return nil, fmt.Errorf("bundle directory %q: %w", root, err)
	}
	info, err := os.Stat(abs)
	if err != nil {
		return nil, fmt.Errorf("bundle directory %q: %w", root, err)
	}
	if !info.IsDir() {
		return nil, fmt.Errorf("bundle directory %q: not a directory", root)
	}
	return &Dir{root: abs, limits: limits.orDefault()}, nil
}

// Verified returns a source of the same directory that verifies each bundle as
// ReadVerified does: the signatures file is /.signatures.json of a folder or
// archive. With nil, no bundle may be signed.
func (d *Dir) Verified(verify *bundle.VerificationConfig) *Dir {
	own := *d
	own.verify = usable(verify)
	return &own
}

// Names returns the names of the bundles there are, sorted: the folders, and
// the archives without their suffix. It skips what begins with a dot. It
// returns an error if the directory holds more than 100,000 entries.
func (d *Dir) Names() ([]string, error) {
	root, err := os.OpenRoot(d.root)
	if err != nil {
		return nil, fmt.Errorf("listing bundles: %w", err)
	}
	defer root.Close()
	entries, err := readDir(root, ".", maxNames)
	if err == errTooMany {
		return nil, fmt.Errorf("listing bundles: %q has more than %d entries", d.root, maxNames)
	}
	if err != nil {
		return nil, fmt.Errorf("listing bundles: %w", err)
	}
	var names []string
	for _, e := range entries {
		mode := e.Type()
		if mode&fs.ModeSymlink != 0 {
			info, err := root.Stat(e.Name())
			if err != nil {
				continue // it leads nowhere or out of here, and Fetch says so
			}
			mode = info.Mode()
		}
		name := e.Name()
		if mode.IsRegular() {
			var ok bool
			if name, ok = strings.CutSuffix(name, archiveExt); !ok {
				continue
			}
		} else if !mode.IsDir() {
			continue
		}
		if validName(name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

// validName reports whether a name is that of an entry which may be a bundle.
func validName(name string) bool {
	return name != "" && len(name) <= 255 && name[0] != '.' && !strings.ContainsAny(name, `/\`) &&
		!strings.ContainsFunc(name, unicode.IsControl)
}

// Fetch implements Source. The name is one path segment that does not begin
// with a dot; with any other, it returns ErrNotFound.
func (d *Dir) Fetch(ctx context.Context, name, etag string) (*Bundle, error) {
	b, err := d.fetch(ctx, name, etag)
	if err != nil && err != ErrNotModified {
		return nil, fmt.Errorf("fetching bundle %q: %w", brief(name), err)
	}
	return b, err
}

// errChanging says that a bundle does not stand still. It may well be that
// what was read of it cannot be used, which then means nothing.
var errChanging = errors.New("the bundle changes while it is read")

func (d *Dir) fetch(ctx context.Context, name, etag string) (*Bundle, error) {
	if !validName(name) {
		return nil, fmt.Errorf("%w: not a name", ErrNotFound)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	var err error
	for range attempts {
		var b *Bundle
		if b, err = d.try(ctx, name, etag); err != errChanging {
			return b, err
		}
	}
	return nil, err
}

// try reads the bundle once. It returns errChanging if that may not have been
// one state of it.
func (d *Dir) try(ctx context.Context, name, etag string) (*Bundle, error) {
	root, err := os.OpenRoot(d.root)
	if err != nil {
		return nil, err
	}
	defer root.Close()

	folder, err := stat(root, name)
	if err != nil {
		return nil, err
	}
	archive, err := stat(root, name+archiveExt)
	if err != nil {
		return nil, err
	}
	var w walk
	switch isFolder := folder != nil && folder.IsDir(); {
	case isFolder && archive != nil:
		return nil, refuse("there are both a folder %q and an archive %q", name, name+archiveExt)
	case isFolder:
		if w.root, err = root.OpenRoot(name); err != nil {
			return nil, gone(err)
		}
		defer w.root.Close()
	case archive != nil:
		w.root, w.archive = root, name+archiveExt
	default:
		return nil, ErrNotFound
	}

	before, err := w.scan(ctx, d)
	if err != nil {
		return nil, gone(err)
	}
	if etag != "" && before.etag == etag {
		return nil, ErrNotModified
	}
	// What was written a moment ago may be written again within the same tick
	// of the clock, unseen. A time in the future is some other clock's.
	if age := time.Since(before.newest); age >= 0 && age < clockTick {
		timer := time.NewTimer(clockTick - age)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		return nil, errChanging
	}

	b, err := w.read(ctx, name, before)
	good := false
	defer func() {
		if b != nil && !good {
			b.Done()
		}
	}()
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	after, scanErr := w.scan(ctx, d)
	if scanErr != nil {
		return nil, gone(scanErr)
	}
	if after.etag != before.etag {
		return nil, errChanging
	}
	if err != nil {
		return nil, gone(err)
	}
	b.ETag = before.etag
	good = true
	return b, nil
}

// walk sees one bundle: the folder at root, or an archive in it.
type walk struct {
	root    *os.Root
	archive string // empty: the whole folder
}

// state is what a walk sees without reading.
type state struct {
	etag    string
	newest  time.Time
	files   []found // sorted by path
	content *content
}

type found struct {
	name string // relative to the walk's root
	path string // in the bundle
	info fs.FileInfo
	keep bool
}

// scan visits the files, checks what can be checked of them unread, and
// fingerprints them.
func (w *walk) scan(ctx context.Context, d *Dir) (*state, error) {
	s := &state{content: newContent(d.limits, d.verify)}
	s.content.noDelta = "a directory has no earlier bundle that it may change"
	if w.archive != "" {
		info, err := stat(w.root, w.archive)
		if err != nil {
			return nil, err
		}
		if info == nil {
			return nil, fs.ErrNotExist
		}
		if !info.Mode().IsRegular() {
			return nil, refuse("%q is not a regular file", w.archive)
		}
		s.files = []found{{name: w.archive, path: "archive", info: info}}
	} else if err := w.folder(ctx, s, "."); err != nil {
		return nil, err
	}

	h := sha256.New()
	for _, f := range s.files {
		inode, device, changed := identity(f.info)
		fmt.Fprintf(h, "%q %d %d %d %d %d\n", f.path, f.info.Size(), f.info.ModTime().UnixNano(), changed.UnixNano(), inode, device)
		for _, t := range []time.Time{f.info.ModTime(), changed} {
			if t.After(s.newest) {
				s.newest = t
			}
		}
	}
	s.etag = `"` + hex.EncodeToString(h.Sum(nil)[:16]) + `"`
	return s, nil
}

// folder adds a folder's files to s. A link may lead to a folder around it;
// the bounds on depth and entries end that, and os.Root's on links in a path.
func (w *walk) folder(ctx context.Context, s *state, dir string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	c := s.content
	entries, err := readDir(w.root, dir, c.limits.Files-c.entries)
	if err == errTooMany {
		return refuse("it has more than %d entries", c.limits.Files)
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "..") {
			continue
		}
		name := path.Join(dir, e.Name())
		info, err := w.root.Lstat(name)
		if err != nil {
			return err
		}
		if info.Mode()&fs.ModeSymlink != 0 {
			if info, err = stat(w.root, name); err != nil {
				return err
			}
			if info == nil {
				return refuse("%q is a link that leads nowhere", name)
			}
		}
		p, err := c.enter(name, info.IsDir())
		if err != nil {
			return err
		}
		switch {
		case info.IsDir():
			if err := w.folder(ctx, s, name); err != nil {
				return err
			}
		case info.Mode().IsRegular():
			keep, err := c.reserve(p, info.Size())
			if err != nil {
				return err
			}
			s.files = append(s.files, found{name: name, path: p, info: info, keep: keep})
		default:
			return refuse("%q is neither a file nor a folder", name)
		}
	}
	return nil
}

// read reads what scan has seen. Whoever drops the bundle is done with it.
func (w *walk) read(ctx context.Context, name string, s *state) (*Bundle, error) {
	if w.archive != "" {
		f, err := w.open(s.files[0])
		if err != nil {
			return nil, err
		}
		defer f.Close()
		return s.content.readFrom(ctx, untilDone{ctx, f}, name)
	}
	return w.readFolder(ctx, name, s)
}

func (w *walk) readFolder(ctx context.Context, name string, s *state) (b *Bundle, err error) {
	defer func() { s.content.settle(b, err) }()
	if s.content.grow(ctx, s.content.expanded) != nil {
		return nil, ctx.Err()
	}
	for _, f := range s.files {
		if !f.keep {
			continue
		}
		data, err := w.readFile(ctx, f)
		if err != nil {
			return nil, err
		}
		s.content.add(f.path, data)
	}
	return s.content.bundle(name, s.content.expanded)
}

func (w *walk) readFile(ctx context.Context, f found) ([]byte, error) {
	file, err := w.open(f)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	data, err := readAll(untilDone{ctx, file}, f.info.Size())
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return nil, errChanging // it has become shorter
	}
	return data, err
}

// open opens a file that scan has seen, and no other. It does not wait, should
// a named pipe have taken its place.
func (w *walk) open(f found) (*os.File, error) {
	file, err := w.root.OpenFile(f.name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err == nil && (!info.Mode().IsRegular() || !os.SameFile(info, f.info)) {
		err = errChanging
	}
	if err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}

// stat follows links. It returns nil if there is nothing, and refuses a link
// that leads out of root or in a circle.
func stat(root *os.Root, name string) (fs.FileInfo, error) {
	info, err := root.Stat(name)
	switch {
	case err == nil:
		return info, nil
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
		return nil, nil
	}
	// The error of a link that leads out has no name, and is none of the
	// operating system's.
	var errno syscall.Errno
	if !errors.As(err, &errno) || errno == syscall.ELOOP {
		return nil, refuse("%q is a link that leads out of the folder, or in a circle", name)
	}
	return nil, err
}

// gone makes of an error that something is no longer there errChanging: it was
// there a moment ago.
func gone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return errChanging
	}
	return err
}

var errTooMany = errors.New("too many entries")

// readDir returns the entries of a folder, sorted by name, or errTooMany.
func readDir(root *os.Root, dir string, limit int) ([]fs.DirEntry, error) {
	f, err := root.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	entries, err := f.ReadDir(max(limit, 0) + 1)
	if err != nil && err != io.EOF {
		return nil, err
	}
	if len(entries) > limit {
		return nil, errTooMany
	}
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return cmp.Compare(a.Name(), b.Name()) })
	return entries, nil
}

// untilDone reads until the context is done.
type untilDone struct {
	ctx context.Context
	r   io.Reader
}

func (u untilDone) Read(p []byte) (int, error) {
	if err := u.ctx.Err(); err != nil {
		return 0, err
	}
	return u.r.Read(p)
}
