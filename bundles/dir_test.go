//go:build unix

package bundles_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/gatehouse-authz/gatehouse/bundles"
)

func mustLink(t testing.TB, target, link string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(link), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(target, link); err != nil {
		t.Fatal(err)
	}
}

func TestNewDir(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "file")
	mustWrite(t, file, "")
	for path, want := range map[string]string{
		filepath.Join(t.TempDir(), "none"): "no such file",
		file:                               "not a directory",
	} {
		if _, err := bundles.NewDir(path, bundles.Limits{}); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("got %v, want %q and the path", err, want)
		}
	}
}

func TestDirNames(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	orders.writeTo(t, filepath.Join(root, "folder"))
	orders.writeTo(t, filepath.Join(root, ".git"))
	orders.writeTo(t, filepath.Join(root, "..2026_10"))
	mustWrite(t, filepath.Join(root, "archive.tar.gz"), "")
	mustWrite(t, filepath.Join(root, "folder.tar.gz"), "")
	mustWrite(t, filepath.Join(root, "README.md"), "")
	mustWrite(t, filepath.Join(root, ".tar.gz"), "")
	mustLink(t, "folder", filepath.Join(root, "linked"))
	mustLink(t, "archive.tar.gz", filepath.Join(root, "also.tar.gz"))
	mustLink(t, "/etc", filepath.Join(root, "away"))
	mustLink(t, "none", filepath.Join(root, "nowhere"))
	got, err := mustDir(t, root).Names()
	want := []string{"also", "archive", "folder", "linked"}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}
}

func TestDirLinks(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	d := mustDir(t, root)
	want := mustRead(t, orders.tarball(t)).Digest

	// As Kubernetes mounts a volume: each entry leads to ..data, and that to
	// a version. An update relinks ..data.
	mount := filepath.Join(root, "mounted")
	orders.writeTo(t, filepath.Join(mount, "..2026_10_01"))
	mustLink(t, "..2026_10_01", filepath.Join(mount, "..data"))
	for _, name := range []string{".manifest", "orders", "limits"} {
		mustLink(t, filepath.Join("..data", name), filepath.Join(mount, name))
	}
	b, err := d.Fetch(t.Context(), "mounted", "")
	if err != nil {
		t.Fatal(err)
	}
	if b.Digest != want {
		t.Errorf("mounted: got digest %x, want %x", b.Digest, want)
	}
	orders.with("limits/data.json", `{"boss":"carol"}`).writeTo(t, filepath.Join(mount, "..2026_10_02"))
	mustLink(t, "..2026_10_02", filepath.Join(mount, "..tmp"))
	if err := os.Rename(filepath.Join(mount, "..tmp"), filepath.Join(mount, "..data")); err != nil {
		t.Fatal(err)
	}
	if updated, err := d.Fetch(t.Context(), "mounted", b.ETag); err != nil || updated.Digest == b.Digest {
		t.Errorf("relinked: got %v, want another bundle", err)
	}

	// The folder and the archive may be links.
	orders.writeTo(t, filepath.Join(root, ".releases", "v1"))
	mustLink(t, ".releases/v1", filepath.Join(root, "released"))
	mustWrite(t, filepath.Join(root, ".releases", "v1.tgz"), string(orders.tarball(t)))
	mustLink(t, ".releases/v1.tgz", filepath.Join(root, "packed.tar.gz"))
	for _, name := range []string{"released", "packed"} {
		if b, err := d.Fetch(t.Context(), name, ""); err != nil || b.Digest != want {
			t.Errorf("%s: got %v, want the bundle", name, err)
		}
	}
}

func TestDirRefuses(t *testing.T) {
	t.Parallel()
	outside := filepath.Join(t.TempDir(), "secret.rego")
	mustWrite(t, outside, "package secret")
	for name, test := range map[string]struct {
		spoil func(t *testing.T, root, dir string)
		want  string
	}{
		"link out": {func(t *testing.T, root, dir string) { mustLink(t, outside, filepath.Join(dir, "x.rego")) },
			`"x.rego" is a link that leads out of the folder`},
		"link up": {func(t *testing.T, root, dir string) {
			files{"x.rego": "package x"}.writeTo(t, filepath.Join(root, "other"))
			mustLink(t, "../other/x.rego", filepath.Join(dir, "x.rego"))
		}, `"x.rego" is a link that leads out of the folder`},
		"linked folder out": {func(t *testing.T, root, dir string) { mustLink(t, filepath.Dir(outside), filepath.Join(dir, "sub")) },
			`"sub" is a link that leads out of the folder`},
		"link nowhere": {func(t *testing.T, root, dir string) { mustLink(t, "none", filepath.Join(dir, "x.rego")) },
			`"x.rego" is a link that leads nowhere`},
		"link to itself": {func(t *testing.T, root, dir string) { mustLink(t, "x.rego", filepath.Join(dir, "x.rego")) },
			`"x.rego" is a link that leads`},
		"folder in itself": {func(t *testing.T, root, dir string) { mustLink(t, ".", filepath.Join(dir, "loop")) },
			"or in a circle"},
		"folders in themselves": {func(t *testing.T, root, dir string) {
			mustLink(t, ".", filepath.Join(dir, "a"))
			mustLink(t, ".", filepath.Join(dir, "b"))
		}, "or in a circle"},
		"pipe": {func(t *testing.T, root, dir string) { mustPipe(t, filepath.Join(dir, "x.rego")) },
			`"x.rego" is neither a file nor a folder`},
		"unread pipe": {func(t *testing.T, root, dir string) { mustPipe(t, filepath.Join(dir, "notes")) },
			`"notes" is neither a file nor a folder`},
		"both": {func(t *testing.T, root, dir string) { mustWrite(t, dir+".tar.gz", string(orders.tarball(t))) },
			`there are both a folder "orders" and an archive "orders.tar.gz"`},
		"name": {func(t *testing.T, root, dir string) { mustWrite(t, filepath.Join(dir, `a\b.rego`), "") },
			"has a backslash"},
		"large": {func(t *testing.T, root, dir string) { mustTruncate(t, filepath.Join(dir, "big.bin"), 257<<20) },
			"larger than 256 MiB together"},
		"entries": {func(t *testing.T, root, dir string) {
			for i := range 10_001 {
				mustWrite(t, filepath.Join(dir, fmt.Sprint(i)), "")
			}
		}, "more than 10000 entries"},
		"depth": {func(t *testing.T, root, dir string) {
			files{strings.Repeat("d/", 32) + "x.rego": ""}.writeTo(t, dir)
		}, "segments deep, limit 32"},
		"folder link out": {func(t *testing.T, root, dir string) {
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
			mustLink(t, filepath.Dir(outside), dir)
		}, `"orders" is a link that leads out of the folder`},
		"archive pipe": {func(t *testing.T, root, dir string) {
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
			mustPipe(t, dir+".tar.gz")
		}, `"orders.tar.gz" is not a regular file`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			root := t.TempDir()
			dir := filepath.Join(root, "orders")
			orders.writeTo(t, dir)
			test.spoil(t, root, dir)
			_, err := mustDir(t, root).Fetch(t.Context(), "orders", "")
			if !errors.Is(err, bundles.ErrRefused) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want a refusal with %q", err, test.want)
			}
		})
	}
}

func mustPipe(t *testing.T, path string) {
	t.Helper()
	if err := syscall.Mkfifo(path, 0o644); err != nil {
		t.Fatal(err)
	}
}

func mustTruncate(t *testing.T, path string, size int64) {
	t.Helper()
	mustWrite(t, path, "")
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
}

// changing is a context that changes something when it is asked whether it is
// done, which a source does before each read.
type changing struct {
	context.Context
	calls  int
	change func(call int)
}

func (c *changing) Err() error {
	c.calls++
	c.change(c.calls)
	return c.Context.Err()
}

// A bundle that is rewritten while it is read comes as one of its states, or
// not at all.
func TestDirRewritten(t *testing.T) {
	t.Parallel()
	state := func(i int) files {
		f := files{}
		for j := range 5 {
			f[fmt.Sprintf("%c.rego", 'a'+j)] = fmt.Sprintf("package p\n\nx contains %d\n", i)
		}
		return f
	}
	for _, archives := range []bool{false, true} {
		s := newDirShelf(t, archives)
		s.put(t, "orders", state(1))
		first, err := s.source().Fetch(t.Context(), "orders", "")
		if err != nil {
			t.Fatal(err)
		}

		for _, call := range []int{2, 3, 4, 6} {
			s.put(t, "orders", state(1))
			if _, err := s.source().Fetch(t.Context(), "orders", ""); err != nil {
				t.Fatal(err)
			}
			once := &changing{Context: t.Context(), change: func(n int) {
				if n == call {
					s.put(t, "orders", state(2))
				}
			}}
			b, err := s.source().Fetch(once, "orders", "")
			if err != nil {
				t.Fatalf("changed at call %d: got %v", call, err)
			}
			if once.calls >= call && b.Digest == first.Digest && !archives {
				t.Errorf("changed at call %d: got the state before", call)
			}
			var rules []string
			for _, m := range b.Bundle.Modules {
				rules = append(rules, m.Parsed.Rules[0].String())
			}
			if slices.Sort(rules); len(slices.Compact(rules)) != 1 {
				t.Errorf("changed at call %d: got %q, want one state", call, rules)
			}
		}

		always := &changing{Context: t.Context(), change: func(n int) { s.put(t, "orders", state(n)) }}
		_, err = s.source().Fetch(always, "orders", "")
		if err == nil || errors.Is(err, bundles.ErrRefused) || !strings.Contains(err.Error(), "the bundle changes while it is read") {
			t.Errorf("changed always: got %v, want it to say that the bundle changes", err)
		}

		gone := &changing{Context: t.Context(), change: func(n int) {
			if n == 1 {
				return
			}
			for _, name := range []string{"orders", "orders.tar.gz"} {
				os.RemoveAll(filepath.Join(s.(*dirShelf).root, name))
			}
		}}
		s.put(t, "orders", state(1))
		if !archives {
			if _, err = s.source().Fetch(gone, "orders", ""); !errors.Is(err, bundles.ErrNotFound) {
				t.Errorf("removed: got %v, want ErrNotFound", err)
			}
		}
	}
}

// Each change counts, also one that leaves the size and comes at once.
func TestDirSeesEachChange(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	d := mustDir(t, root)
	etag := ""
	for i := range 20 {
		files{"data.json": fmt.Sprintf(`{"n":%d}`, 100+i)}.writeTo(t, filepath.Join(root, "orders"))
		b, err := d.Fetch(t.Context(), "orders", etag)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := fmt.Sprint(b.Bundle.Data["n"]), fmt.Sprint(100+i); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
		etag = b.ETag
	}
}
