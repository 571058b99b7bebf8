package bundles_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gatehouse-authz/gatehouse/bundles"
)

// fetched returns a bundle as an HTTP source gives it to be kept.
func fetched(t testing.TB, archive []byte, etag string) *bundles.Bundle {
	t.Helper()
	b := mustRead(t, archive)
	b.ETag, b.Archive = etag, archive
	return b
}

func readOrders(r io.Reader) (*bundles.Bundle, error) {
	return bundles.Read(r, "orders", bundles.Limits{})
}

func mustStore(t testing.TB, dir string) *bundles.Store {
	t.Helper()
	s, err := bundles.NewStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func mustSave(t testing.TB, s *bundles.Store, key string, b *bundles.Bundle) {
	t.Helper()
	if err := s.Save(key, b); err != nil {
		t.Fatal(err)
	}
}

// names lists a directory.
func names(t testing.TB, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func TestStore(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "a", "store")
	s := mustStore(t, dir)
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("directory: got %v, %v, want mode 0700", info, err)
	}
	const key = "service\x00../../orders.tar.gz"
	if _, err := s.Load(key, readOrders); !errors.Is(err, bundles.ErrNotSaved) {
		t.Errorf("before: got %v, want ErrNotSaved", err)
	}
	if err := s.Confirm(key, time.Now()); !errors.Is(err, bundles.ErrNotSaved) {
		t.Errorf("confirm before: got %v, want ErrNotSaved", err)
	}
	if err := s.Save(key, mustRead(t, orders.tarball(t))); err == nil || !strings.Contains(err.Error(), "no archive") {
		t.Errorf("without an archive: got %v", err)
	}
	first := fetched(t, orders.tarball(t), `W/"1"`)
	mustSave(t, s, key, first)
	second := fetched(t, orders.with("limits/data.json", `{"boss":"bobby"}`).tarball(t), `W/"2"`)
	mustSave(t, s, key, second)
	mustSave(t, s, "another", first)

	at := time.Now().Add(-time.Hour).Truncate(time.Second)
	if err := s.Confirm(key, at); err != nil {
		t.Fatal(err)
	}
	got, err := mustStore(t, dir).Load(key, readOrders)
	if err != nil {
		t.Fatal(err)
	}
	if got.Digest != second.Digest || got.ETag != `W/"2"` || got.Archive != nil || len(got.Bundle.Bundle.Modules) != 1 {
		t.Errorf("got %x, ETag %q, archive of %d bytes", got.Digest, got.ETag, len(got.Archive))
	}
	if age := time.Since(got.SavedAt); age < 0 || age > time.Minute {
		t.Errorf("saved at %v", got.SavedAt)
	}
	if !got.ConfirmedAt.Equal(at) {
		t.Errorf("confirmed: got %v, want %v", got.ConfirmedAt, at)
	}
	if err := s.Confirm(key, time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Load(key, readOrders); err != nil || got.ConfirmedAt.After(time.Now()) {
		t.Errorf("got %v, confirmed in the future", err)
	}
	for _, name := range names(t, dir) {
		info, _ := os.Stat(filepath.Join(dir, name))
		if len(name) != 64 || info.Mode().Perm() != 0o600 {
			t.Errorf("got file %q with mode %v", name, info.Mode())
		}
	}
	// The error of the source's reader, for one that is as saved.
	_, err = s.Load(key, func(r io.Reader) (*bundles.Bundle, error) {
		return bundles.Read(r, "orders", bundles.Limits{Bytes: 10})
	})
	if !errors.Is(err, bundles.ErrRefused) || errors.Is(err, bundles.ErrCorrupt) {
		t.Errorf("beyond the limits: got %v, want ErrRefused", err)
	}
	if _, err := s.Load(key, readOrders); err != nil {
		t.Errorf("after that: got %v, want the bundle", err)
	}
}

// corruptions changes a saved file in each of its regions.
func corruptions(file []byte) map[string][]byte {
	out := map[string][]byte{
		"empty":          {},
		"one byte more":  append(bytes.Clone(file), 0),
		"one byte less":  file[:len(file)-1],
		"header alone":   file[:19],
		"half":           file[:len(file)/2],
		"zeros":          make([]byte, len(file)),
		"long metadata":  append(append(bytes.Clone(file[:51]), 0xff, 0xff, 0xff, 0xff), file[55:]...),
		"no metadata":    append(append(bytes.Clone(file[:51]), 0, 0, 0, 0), file[55:]...),
		"archive twice":  append(bytes.Clone(file), file[200:]...),
		"another's head": append([]byte("gatehouse bundle 2\n"), file[19:]...),
	}
	for i := 0; i < len(file); i += 7 {
		flipped := bytes.Clone(file)
		flipped[i] ^= 1 << (i % 8)
		out[fmt.Sprintf("bit in byte %d", i)] = flipped
	}
	return out
}

func TestStoreCorrupt(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := mustStore(t, dir)
	b := fetched(t, orders.tarball(t), `"1"`)
	mustSave(t, s, "key", b)
	path := filepath.Join(dir, names(t, dir)[0])
	file, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, changed := range corruptions(file) {
		mustWrite(t, path, string(changed))
		if _, err := s.Load("key", readOrders); !errors.Is(err, bundles.ErrCorrupt) {
			t.Errorf("%s: got %v, want ErrCorrupt", name, err)
		}
		if _, err := s.Load("key", readOrders); !errors.Is(err, bundles.ErrNotSaved) {
			t.Errorf("%s, again: got %v, want it removed", name, err)
		}
	}
	// A file that is moved to another key.
	mustSave(t, s, "other", b)
	if err := os.Rename(filepath.Join(dir, names(t, dir)[0]), path); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Load("key", readOrders); !errors.Is(err, bundles.ErrCorrupt) || !strings.Contains(err.Error(), "another key") {
		t.Errorf("moved: got %v, want ErrCorrupt", err)
	}
	// One that is read as something else than was saved.
	mustSave(t, s, "key", b)
	_, err = s.Load("key", func(io.Reader) (*bundles.Bundle, error) { return &bundles.Bundle{}, nil })
	if !errors.Is(err, bundles.ErrCorrupt) {
		t.Errorf("another digest: got %v, want ErrCorrupt", err)
	}
}

// Regression: what a crash leaves behind must neither be read nor stay.
func TestStoreLeftovers(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := mustStore(t, dir)
	mustSave(t, s, "key", fetched(t, orders.tarball(t), `"1"`))
	saved := names(t, dir)[0]
	mustWrite(t, filepath.Join(dir, saved+".0123456789abcdef.tmp"), "half a bundle")
	for _, foreign := range []string{"README.tmp", saved + ".tmp", "x." + saved + ".0123456789abcdef.tmp"} {
		mustWrite(t, filepath.Join(dir, foreign), "an operator's")
	}
	s = mustStore(t, dir)
	if got := names(t, dir); len(got) != 4 {
		t.Errorf("got %q, want the leftover removed and nothing else", got)
	}
	if _, err := s.Load("key", readOrders); err != nil {
		t.Error(err)
	}
}

func TestStoreLinks(t *testing.T) {
	t.Parallel()
	dir, outside := t.TempDir(), t.TempDir()
	s := mustStore(t, dir)
	mustSave(t, s, "key", fetched(t, orders.tarball(t), `"1"`))
	path := filepath.Join(dir, names(t, dir)[0])
	for _, target := range []string{filepath.Join(outside, "file"), filepath.Join(dir, "inside")} {
		mustSave(t, s, "key", fetched(t, orders.tarball(t), `"1"`))
		if err := os.Rename(path, target); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(target, path); err != nil {
			t.Fatal(err)
		}
		before, _ := os.Stat(target)
		if _, err := s.Load("key", readOrders); !errors.Is(err, bundles.ErrNotSaved) {
			t.Errorf("load through a link: got %v, want ErrNotSaved", err)
		}
		if err := s.Confirm("key", time.Unix(1, 0)); !errors.Is(err, bundles.ErrNotSaved) {
			t.Errorf("confirm through a link: got %v, want ErrNotSaved", err)
		}
		mustSave(t, s, "key", fetched(t, orders.tarball(t), `"1"`)) // replaces the link
		after, _ := os.Stat(target)
		if !after.ModTime().Equal(before.ModTime()) || after.Size() != before.Size() {
			t.Error("what the link leads to has changed")
		}
	}
}

func TestStoreUnusable(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "file")
	mustWrite(t, file, "")
	for _, dir := range []string{file, filepath.Join(file, "store")} {
		if _, err := bundles.NewStore(dir); err == nil || !strings.Contains(err.Error(), "not a directory") {
			t.Errorf("%s: got %v, want it not to be a directory", dir, err)
		}
	}
	// The directory goes away, and its place is taken.
	dir := filepath.Join(t.TempDir(), "store")
	s := mustStore(t, dir)
	b := fetched(t, orders.tarball(t), `"1"`)
	mustSave(t, s, "key", b)
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Load("key", readOrders); !errors.Is(err, bundles.ErrNotSaved) {
		t.Errorf("removed: got %v, want ErrNotSaved", err)
	}
	if _, err := s.Prune(bundles.Bounds{}); err != nil {
		t.Errorf("removed: got %v from Prune", err)
	}
	mustWrite(t, dir, "")
	if err := s.Save("key", b); err == nil {
		t.Error("a file in its place: got no error from Save")
	}
	if _, err := s.Load("key", readOrders); err == nil || errors.Is(err, bundles.ErrCorrupt) {
		t.Errorf("a file in its place: got %v", err)
	}
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	mustSave(t, s, "key", b) // makes it again
	if _, err := s.Load("key", readOrders); err != nil {
		t.Error(err)
	}
}

func TestStorePrune(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := mustStore(t, dir)
	b := fetched(t, orders.tarball(t), `"1"`)
	for i := range 10 {
		key := fmt.Sprint(i)
		mustSave(t, s, key, b)
		if err := s.Confirm(key, time.Now().Add(-time.Duration(i)*time.Minute)); err != nil {
			t.Fatal(err)
		}
	}
	mustWrite(t, filepath.Join(dir, "notes"), strings.Repeat("x", 100_000))
	info, _ := os.Stat(filepath.Join(dir, names(t, dir)[0]))
	if n, err := s.Prune(bundles.Bounds{}); n != 0 || err != nil {
		t.Errorf("within the bounds: got %d, %v", n, err)
	}
	if n, err := s.Prune(bundles.Bounds{Files: 7}); n != 3 || err != nil {
		t.Errorf("files: got %d, %v, want 3 removed", n, err)
	}
	if n, err := s.Prune(bundles.Bounds{Bytes: info.Size()*4 + 10}); n != 3 || err != nil {
		t.Errorf("bytes: got %d, %v, want 3 removed", n, err)
	}
	for i := range 10 {
		_, err := s.Load(fmt.Sprint(i), readOrders)
		if kept := i < 4; (err == nil) != kept {
			t.Errorf("key %d: got %v, want it kept: %v", i, err, kept)
		}
	}
}

// Whoever loads while others save gets one of the bundles whole.
func TestStoreConcurrency(t *testing.T) {
	t.Parallel()
	s := mustStore(t, t.TempDir())
	var all []*bundles.Bundle
	for i := range 3 {
		all = append(all, fetched(t, orders.with("limits/data.json", fmt.Sprintf(`{"boss":"boss-%d"}`, i)).tarball(t), fmt.Sprint(i)))
	}
	mustSave(t, s, "key", all[0])
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 10 {
				b := all[(i+j)%len(all)]
				if err := s.Save("key", b); err != nil {
					t.Errorf("save: %v", err)
				}
				if err := s.Confirm("key", time.Now()); err != nil {
					t.Errorf("confirm: %v", err)
				}
				got, err := s.Load("key", readOrders)
				if err != nil {
					t.Errorf("load: %v", err)
					continue
				}
				var etag int
				fmt.Sscan(got.ETag, &etag)
				if got.Digest != all[etag].Digest {
					t.Error("got the ETag of one and the content of another")
				}
			}
		})
	}
	wg.Go(func() {
		for range 5 {
			if n, err := s.Prune(bundles.Bounds{}); n != 0 || err != nil {
				t.Errorf("prune: %d, %v", n, err)
			}
		}
	})
	wg.Wait()
}

func FuzzStoreLoad(f *testing.F) {
	dir := f.TempDir()
	s := mustStore(f, dir)
	b := fetched(f, orders.tarball(f), `"1"`)
	mustSave(f, s, "key", b)
	path := filepath.Join(dir, names(f, dir)[0])
	file, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(file)
	f.Add(file[:60])
	f.Fuzz(func(t *testing.T, data []byte) {
		mustWrite(t, path, string(data))
		got, err := s.Load("key", readOrders)
		switch {
		case err == nil:
			if got.Digest == b.Digest {
				return
			}
			// Whoever can compute a sum can write any bundle.
		case errors.Is(err, bundles.ErrCorrupt):
			if _, err := os.Stat(path); err == nil {
				t.Error("a corrupt file is still there")
			}
		case !errors.Is(err, bundles.ErrRefused):
			t.Errorf("got %v, want ErrCorrupt or ErrRefused", err)
		}
	})
}
