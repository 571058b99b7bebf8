package bundles

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Store keeps the last good bundles in a directory, one file for each key, for
// a start while their sources are away. It may be shared by processes, though
// one that starts can break off what another is saving just then.
//
// A file is written whole beside its place, synced, and then renamed to it. It
// is named by the SHA-256 of its key in hex, and reads:
//
//	magic     "gatehouse bundle 1\n"
//	sum       32 bytes: SHA-256 of all that follows
//	length    4 bytes, big-endian: of the metadata
//	metadata  JSON: {"name", "etag", "digest", "size", "saved"}
//	archive   the bundle as it was supplied
//
// Its modification time is when the bundle was last known to be that of its
// source. Other files in the directory are left alone, and links not followed.
//
// The sum tells of faults, not of an author: who may write to the directory
// can put any bundle there that passes the verification of its reader.
type Store struct {
	dir    string
	bounds Bounds

	// Between two listings of the directory: what was there, and what has been
	// saved since, replaced files too.
	bytes, files atomic.Int64

	pruning sync.Mutex
	locks   [64]sync.Mutex // for writing; by the first byte of a name
}

// Bounds bound what a Store keeps. A field that is not positive means its
// default.
type Bounds struct {
	Bytes int64 // of all files together; default 10 GiB
	Files int   // default 100,000
}

func (b Bounds) orDefault() Bounds {
	if b.Bytes <= 0 {
		b.Bytes = 10 << 30
	}
	if b.Files <= 0 {
		b.Files = 100_000
	}
	return b
}

// Errors that a Store returns, wrapped.
var (
	ErrNotSaved = errors.New("no bundle is saved")
	ErrCorrupt  = errors.New("saved bundle is corrupt")
)

// Saved is a bundle from a Store.
type Saved struct {
	*Bundle // with the ETag it had at its source

	// SavedAt is when it was saved, and ConfirmedAt when it was last known to
	// be that of its source. Neither is in the future.
	SavedAt, ConfirmedAt time.Time
}

// The file format.
const (
	storeMagic  = "gatehouse bundle 1\n"
	storeHeader = len(storeMagic) + sha256.Size + 4
	maxMetadata = 8 << 10 // bytes
)

type metadata struct {
	Name   string    `json:"name"` // of the file: it has not been moved to another key
	ETag   string    `json:"etag"`
	Digest string    `json:"digest"` // hex
	Size   int64     `json:"size"`   // of the archive
	Saved  time.Time `json:"saved"`
}

var (
	storeName = regexp.MustCompile(`^[0-9a-f]{64}$`)
	storeTemp = regexp.MustCompile(`^[0-9a-f]{64}\.[0-9a-f]{16}\.tmp$`)
)

// NewStore returns a store in dir, which is made with mode 0700 if it is not
// there, and removes what an interrupted Save has left. It returns an error only
// if dir can be no directory; one that cannot be read or written is reported by
// what is asked of the store, each time.
func NewStore(dir string) (*Store, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("bundle store %q: %w", dir, err)
	}
	info, err := os.Stat(abs)
	if errors.Is(err, syscall.ENOTDIR) || err == nil && !info.IsDir() {
		return nil, fmt.Errorf("bundle store %q: not a directory", dir)
	}
	s := &Store{dir: abs, bounds: Bounds{}.orDefault()}
	root, err := s.open(true)
	if err != nil {
		return s, nil
	}
	defer root.Close()
	entries, _ := s.list(root, func(name string) {
		if storeTemp.MatchString(name) {
			root.Remove(name)
		}
	})
	s.count(entries)
	return s, nil
}

// open opens the directory. Whoever cleared it away may have taken it along.
func (s *Store) open(create bool) (*os.Root, error) {
	root, err := os.OpenRoot(s.dir)
	if create && errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(s.dir, 0o700); err != nil {
			return nil, err
		}
		root, err = os.OpenRoot(s.dir)
	}
	return root, err
}

func nameOf(key string) string {
	sum := sha256.Sum256([]byte(key))
	return hex.EncodeToString(sum[:])
}

// lock keeps others of this process from writing the file of that name.
func (s *Store) lock(name string) (unlock func()) {
	first, _ := hex.DecodeString(name[:2])
	mu := &s.locks[first[0]%uint8(len(s.locks))]
	mu.Lock()
	return mu.Unlock
}

// Save keeps a bundle, which must have its Archive and be no delta, under a key. Either the file
// is replaced, and will be there after a crash, or an error is returned and it
// is as it was. If there is then more than a Store's default Bounds, it prunes.
func (s *Store) Save(key string, b *Bundle) error {
	if err := s.save(nameOf(key), b); err != nil {
		return fmt.Errorf("saving bundle %q: %w", brief(withoutQuery(b.Name)), err)
	}
	s.bytes.Add(int64(len(b.Archive)))
	s.files.Add(1)
	if s.bytes.Load() > s.bounds.Bytes || s.files.Load() > int64(s.bounds.Files) {
		// With some room, so that not every Save lists the directory.
		s.Prune(Bounds{Bytes: s.bounds.Bytes / 10 * 9, Files: s.bounds.Files / 10 * 9})
	}
	return nil
}

func (s *Store) save(name string, b *Bundle) (err error) {
	if b.Archive == nil {
		return errors.New("it has no archive")
	}
	if b.Delta {
		return errors.New("it is a delta, which is nothing without the bundle that it changes")
	}
	meta, err := json.Marshal(metadata{
		Name: name, ETag: b.ETag, Digest: hex.EncodeToString(b.Digest[:]),
		Size: int64(len(b.Archive)), Saved: time.Now().UTC(),
	})
	if err != nil {
		return err
	}
	if len(meta) > maxMetadata {
		return fmt.Errorf("its metadata is %d bytes, limit %s", len(meta), bytesText(maxMetadata))
	}
	meta = append(binary.BigEndian.AppendUint32(nil, uint32(len(meta))), meta...)
	h := sha256.New()
	h.Write(meta)
	h.Write(b.Archive)

	root, err := s.open(true)
	if err != nil {
		return err
	}
	defer root.Close()
	var random [8]byte
	rand.Read(random[:])
	temp := name + "." + hex.EncodeToString(random[:]) + ".tmp"
	f, err := root.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			root.Remove(temp)
		}
	}()
	defer f.Close() // a second Close is an error that nobody sees
	for _, part := range [][]byte{[]byte(storeMagic), h.Sum(nil), meta, b.Archive} {
		if _, err := f.Write(part); err != nil {
			return err
		}
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	defer s.lock(name)()
	if err := root.Rename(temp, name); err != nil {
		return err
	}
	return syncDir(root)
}

// syncDir has the directory itself written: the names in it.
func syncDir(root *os.Root) error {
	d, err := root.Open(".")
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// Confirm notes that the bundle that is saved under a key was that of its
// source at a time. It returns ErrNotSaved if there is none.
func (s *Store) Confirm(key string, at time.Time) error {
	name := nameOf(key)
	root, err := s.open(false)
	if err != nil {
		return notSaved(err)
	}
	defer root.Close()
	defer s.lock(name)()
	if _, err := lstat(root, name); err != nil {
		return fmt.Errorf("confirming a saved bundle: %w", err)
	}
	if err := root.Chtimes(name, at, at); err != nil {
		return fmt.Errorf("confirming a saved bundle: %w", notSaved(err))
	}
	return nil
}

// lstat returns ErrNotSaved unless there is a regular file.
func lstat(root *os.Root, name string) (fs.FileInfo, error) {
	info, err := root.Lstat(name)
	if err != nil {
		return nil, notSaved(err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: %q is not a regular file", ErrNotSaved, name)
	}
	return info, nil
}

func notSaved(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return ErrNotSaved
	}
	return err
}

// Load has read, which should be that of the bundle's source (see HTTP.Read),
// read the archive that is saved under a key. The bundle is as saved: it has
// the same content and, with the source's keys, a signature that is good now.
//
// It returns ErrNotSaved if there is none; an error wrapping ErrCorrupt if it is
// not as it was saved, and then the file has been removed if that was possible;
// the error of read, such as ErrRefused, if it is as saved and cannot be used;
// and any other error when the directory cannot be read.
func (s *Store) Load(key string, read func(io.Reader) (*Bundle, error)) (*Saved, error) {
	saved, err := s.load(nameOf(key), read)
	if err != nil {
		return nil, fmt.Errorf("loading a saved bundle: %w", err)
	}
	return saved, nil
}

func (s *Store) load(name string, read func(io.Reader) (*Bundle, error)) (*Saved, error) {
	root, err := s.open(false)
	if err != nil {
		return nil, notSaved(err)
	}
	defer root.Close()
	f, info, err := s.openFile(root, name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	saved, err := decode(f, name, info, read)
	if errors.Is(err, ErrCorrupt) {
		s.discard(root, name, info)
	}
	return saved, err
}

// openFile opens the regular file of that name, and nothing that a link there
// leads to. The lock keeps a Save from replacing it between the two looks.
func (s *Store) openFile(root *os.Root, name string) (*os.File, fs.FileInfo, error) {
	defer s.lock(name)()
	seen, err := lstat(root, name)
	if err != nil {
		return nil, nil, err
	}
	f, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, notSaved(err)
	}
	info, err := f.Stat()
	if err == nil && !os.SameFile(seen, info) {
		err = fmt.Errorf("%q was replaced while it was opened", name)
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, info, nil
}

// discard removes a file, unless another has taken its place.
func (s *Store) discard(root *os.Root, name string, seen fs.FileInfo) bool {
	defer s.lock(name)()
	now, err := root.Lstat(name)
	if err != nil || !os.SameFile(now, seen) || !now.ModTime().Equal(seen.ModTime()) || now.Size() != seen.Size() {
		return false
	}
	return root.Remove(name) == nil
}

// decode reads a file once, in constant memory but for what read takes. Nothing
// of it is believed before the sum is right, at the end.
func decode(f io.Reader, name string, info fs.FileInfo, read func(io.Reader) (*Bundle, error)) (*Saved, error) {
	corrupt := func(format string, args ...any) (*Saved, error) {
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, fmt.Errorf(format, args...))
	}
	in := &tracked{r: f}
	header := make([]byte, storeHeader)
	if _, err := io.ReadFull(in, header); err != nil {
		if in.err != nil {
			return nil, in.err
		}
		return corrupt("it is cut short")
	}
	rest, ok := bytes.CutPrefix(header, []byte(storeMagic))
	if !ok {
		return corrupt("it does not begin with %q", storeMagic)
	}
	want, length := rest[:sha256.Size], rest[sha256.Size:]
	n := binary.BigEndian.Uint32(length)
	if n > maxMetadata {
		return corrupt("its metadata is %d bytes, limit %s", n, bytesText(maxMetadata))
	}
	h := sha256.New()
	h.Write(length)
	text := make([]byte, n)
	if _, err := io.ReadFull(in, text); err != nil {
		if in.err != nil {
			return nil, in.err
		}
		return corrupt("it is cut short")
	}
	h.Write(text)
	var meta metadata
	if err := json.Unmarshal(text, &meta); err != nil {
		return corrupt("its metadata: %w", err)
	}
	if meta.Name != name {
		return corrupt("it is that of another key")
	}
	if size := info.Size() - int64(storeHeader) - int64(n); meta.Size != size {
		return corrupt("its archive is %d bytes, not %d", size, meta.Size)
	}

	archive := io.TeeReader(io.LimitReader(in, meta.Size), h)
	b, readErr := read(archive)
	if in.err == nil {
		io.Copy(io.Discard, archive) // what read has left, for the sum
	}
	switch {
	case in.err != nil:
		return nil, in.err
	case !bytes.Equal(h.Sum(nil), want):
		return corrupt("its SHA-256 is not as saved")
	case readErr != nil:
		return nil, readErr
	case hex.EncodeToString(b.Digest[:]) != meta.Digest:
		return corrupt("its content is not as saved")
	}
	b.ETag = meta.ETag
	now := time.Now()
	saved := &Saved{Bundle: b, SavedAt: earlier(meta.Saved, now), ConfirmedAt: earlier(info.ModTime(), now)}
	return saved, nil
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// tracked remembers the error of a reader, other than io.EOF.
type tracked struct {
	r   io.Reader
	err error
}

func (t *tracked) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	if err != nil && err != io.EOF {
		t.err = err
	}
	return n, err
}

// Prune removes files, those first that were confirmed the longest ago, until
// what is left keeps the bounds. It returns how many it has removed.
func (s *Store) Prune(bounds Bounds) (removed int, err error) {
	bounds = bounds.orDefault()
	s.pruning.Lock()
	defer s.pruning.Unlock()
	root, err := s.open(false)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("pruning saved bundles: %w", err)
	}
	defer root.Close()
	files, err := s.list(root, nil)
	if err != nil {
		return 0, fmt.Errorf("pruning saved bundles: %w", err)
	}
	slices.SortFunc(files, func(a, b fs.FileInfo) int { return a.ModTime().Compare(b.ModTime()) })
	var total int64
	for _, f := range files {
		total += f.Size()
	}
	kept := make([]fs.FileInfo, 0, len(files))
	count := len(files)
	for _, f := range files {
		if (total > bounds.Bytes || count > bounds.Files) && s.discard(root, f.Name(), f) {
			total, count, removed = total-f.Size(), count-1, removed+1
			continue
		}
		kept = append(kept, f)
	}
	s.count(kept)
	return removed, nil
}

// count begins the tally anew.
func (s *Store) count(files []fs.FileInfo) {
	var total int64
	for _, f := range files {
		total += f.Size()
	}
	s.bytes.Store(total)
	s.files.Store(int64(len(files)))
}

// list returns the saved files, and calls other with the names of the rest.
func (s *Store) list(root *os.Root, other func(name string)) ([]fs.FileInfo, error) {
	d, err := root.Open(".")
	if err != nil {
		return nil, err
	}
	defer d.Close()
	var files []fs.FileInfo
	for {
		entries, err := d.ReadDir(1000)
		for _, e := range entries {
			if !storeName.MatchString(e.Name()) {
				if other != nil {
					other(e.Name())
				}
				continue
			}
			if info, err := root.Lstat(e.Name()); err == nil && info.Mode().IsRegular() {
				files = append(files, info)
			}
		}
		if err == io.EOF {
			return files, nil
		}
		if err != nil {
			return nil, err
		}
	}
}
