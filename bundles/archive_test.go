package bundles_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/gatehouse-authz/gatehouse/bundles"
)

// files is the content of a bundle :: relative path → text.
type files map[string]string

var orders = files{
	".manifest":        `{"revision":"r1","roots":["orders","limits"]}`,
	"orders/rule.rego": "package orders\n\nallow if input.user == data.limits.boss\n",
	"limits/data.json": `{"boss":"alice"}`,
	"limits/README.md": "not read",
}

// with returns f with one file replaced or added.
func (f files) with(name, text string) files {
	g := maps.Clone(f)
	g[name] = text
	return g
}

// entries returns tar entries with a prefix before each name, sorted.
func (f files) entries(prefix string) []tar.Header {
	var out []tar.Header
	for _, name := range slices.Sorted(maps.Keys(f)) {
		out = append(out, regular(prefix+name, f[name]))
	}
	return out
}

func (f files) tarball(t testing.TB) []byte {
	t.Helper()
	return gzipped(t, tarred(t, f.entries("/")...))
}

func (f files) writeTo(t testing.TB, dir string) {
	t.Helper()
	for name, text := range f {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		mustWrite(t, file, text)
	}
}

func mustWrite(t testing.TB, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// regular is a file's header; Linkname carries the text.
func regular(name, text string) tar.Header {
	return tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(text)), Linkname: text}
}

func special(typeflag byte, name string) tar.Header {
	return tar.Header{Typeflag: typeflag, Name: name, Linkname: "orders/rule.rego", Mode: 0o644}
}

func tarred(t testing.TB, entries ...tar.Header) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, h := range entries {
		text := ""
		if h.Typeflag == tar.TypeReg {
			text, h.Linkname = h.Linkname, ""
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, text); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func gzipped(t testing.TB, data ...[]byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	for _, d := range data {
		if _, err := w.Write(d); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func mustRead(t testing.TB, archive []byte) *bundles.Bundle {
	t.Helper()
	b, err := bundles.Read(bytes.NewReader(archive), "orders", bundles.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	return b
}
