package bundles_test

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/gatehouse-authz/gatehouse/bundles"
)

// shelf is where a source under test finds its bundles.
type shelf interface {
	put(t *testing.T, name string, content files)
	putArchive(t *testing.T, name string, archive []byte)
	source() bundles.Source
	// asked is the name to ask for a bundle by.
	asked(name string) string
}

// TestSource checks what every Source promises.
func TestSource(t *testing.T) {
	t.Parallel()
	for kind, open := range map[string]func(*testing.T) shelf{
		"Dir of folders":  func(t *testing.T) shelf { return newDirShelf(t, false) },
		"Dir of archives": func(t *testing.T) shelf { return newDirShelf(t, true) },
		"HTTP":            newHTTPShelf,
	} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			s := open(t)
			source, orderz := s.source(), s.asked("orders")
			s.put(t, "orders", orders)

			first, err := source.Fetch(t.Context(), orderz, "")
			if err != nil {
				t.Fatal(err)
			}
			if first.Name != orderz || first.ETag == "" || first.Size == 0 || len(first.Bundle.Modules) != 1 {
				t.Errorf("got name %q, ETag %q, size %d and %d modules", first.Name, first.ETag, first.Size, len(first.Bundle.Modules))
			}
			if want := mustRead(t, orders.tarball(t)); first.Digest != want.Digest {
				t.Errorf("got digest %x, want that of the archive, %x", first.Digest, want.Digest)
			}

			if b, err := source.Fetch(t.Context(), orderz, first.ETag); err != bundles.ErrNotModified || b != nil {
				t.Errorf("not modified: got %v, %v, want ErrNotModified", b, err)
			}
			if again, err := source.Fetch(t.Context(), orderz, ""); err != nil || again.ETag != first.ETag || again.Digest != first.Digest {
				t.Errorf("without an ETag: got %v, want the same bundle", err)
			}
			if _, err := source.Fetch(t.Context(), orderz, `"another"`); err != nil {
				t.Errorf("with another ETag: got %v, want the bundle", err)
			}

			changed := orders.with("limits/data.json", `{"boss":"bobby"}`) // of the same size
			s.put(t, "orders", changed)
			second, err := source.Fetch(t.Context(), orderz, first.ETag)
			if err != nil {
				t.Fatal(err)
			}
			if second.ETag == first.ETag || second.Digest == first.Digest {
				t.Error("changed: got the same ETag or digest")
			}

			s.put(t, "broken", orders.with("orders/rule.rego", "package"))
			_, err = source.Fetch(t.Context(), s.asked("broken"), "")
			if !errors.Is(err, bundles.ErrRefused) || !strings.Contains(err.Error(), strconv.Quote(s.asked("broken"))) {
				t.Errorf("refused: got %v, want ErrRefused and the name", err)
			}
			if _, err := source.Fetch(t.Context(), s.asked("none"), ""); !errors.Is(err, bundles.ErrNotFound) {
				t.Errorf("not found: got %v, want ErrNotFound", err)
			}
			for _, name := range []string{"", "..", "../orders", "a/../../orders", "orders\x00", "orders\n"} {
				_, err := source.Fetch(t.Context(), name, "")
				if err == nil || errors.Is(err, bundles.ErrRefused) || errors.Is(err, bundles.ErrNotModified) {
					t.Errorf("name %q: got %v, want another error", name, err)
				}
			}

			gone, cancel := context.WithCancel(t.Context())
			cancel()
			if _, err := source.Fetch(gone, orderz, ""); !errors.Is(err, context.Canceled) || errors.Is(err, bundles.ErrRefused) {
				t.Errorf("cancelled: got %v, want context.Canceled", err)
			}

			var group sync.WaitGroup
			for range 8 {
				group.Go(func() {
					if b, err := source.Fetch(t.Context(), orderz, ""); err != nil || b.Digest != second.Digest {
						t.Errorf("at once: got %v, want the bundle", err)
					}
				})
			}
			group.Wait()
		})
	}
}

// TestSourceRefusesArchives has both kinds of source read what is no bundle.
func TestSourceRefusesArchives(t *testing.T) {
	t.Parallel()
	ok := orders.tarball(t)
	for _, s := range []shelf{newDirShelf(t, true), newHTTPShelf(t)} {
		for name, archive := range map[string][]byte{
			"html":  []byte("<html>Sign in</html>"),
			"empty": {},
			"cut":   ok[:len(ok)/2],
			"delta": files{"patch.json": `{"data":[]}`}.tarball(t),
		} {
			s.putArchive(t, name, archive)
			if _, err := s.source().Fetch(t.Context(), s.asked(name), ""); !errors.Is(err, bundles.ErrRefused) {
				t.Errorf("%T: %s: got %v, want ErrRefused", s, name, err)
			}
		}
	}
}

type dirShelf struct {
	root     string
	archives bool
	dir      *bundles.Dir
}

func newDirShelf(t *testing.T, archives bool) shelf {
	s := &dirShelf{root: t.TempDir(), archives: archives}
	s.dir = mustDir(t, s.root)
	return s
}

func mustDir(t testing.TB, root string) *bundles.Dir {
	t.Helper()
	d, err := bundles.NewDir(root, bundles.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func (s *dirShelf) put(t *testing.T, name string, content files) {
	if s.archives {
		s.putArchive(t, name, content.tarball(t))
		return
	}
	content.writeTo(t, filepath.Join(s.root, name))
}

func (s *dirShelf) putArchive(t *testing.T, name string, archive []byte) {
	mustWrite(t, filepath.Join(s.root, name+".tar.gz"), string(archive))
}

func (s *dirShelf) source() bundles.Source   { return s.dir }
func (s *dirShelf) asked(name string) string { return name }

type httpShelf struct {
	server *httptest.Server
	http   *bundles.HTTP
	root   string
}

// newHTTPShelf is a file server with ETags.
func newHTTPShelf(t *testing.T) shelf {
	s := &httpShelf{root: t.TempDir()}
	s.server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		archive, err := os.ReadFile(filepath.Join(s.root, filepath.Base(r.URL.Path)))
		if err != nil {
			http.NotFound(w, r)
			return
		}
		serve(w, r, archive)
	}))
	t.Cleanup(s.server.Close)
	s.http = bundles.NewHTTP(bundles.HTTPConfig{URL: s.server.URL + "/v1/"})
	return s
}

func (s *httpShelf) put(t *testing.T, name string, content files) {
	s.putArchive(t, name, content.tarball(t))
}

func (s *httpShelf) putArchive(t *testing.T, name string, archive []byte) {
	mustWrite(t, filepath.Join(s.root, name+".tar.gz"), string(archive))
}

func (s *httpShelf) source() bundles.Source   { return s.http }
func (s *httpShelf) asked(name string) string { return "tenants/" + name + ".tar.gz" }
