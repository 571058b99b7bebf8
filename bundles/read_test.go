package bundles_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/bundle"

	"github.com/gatehouse-authz/gatehouse/bundles"
)

func TestReadAsOPA(t *testing.T) {
	t.Parallel()
	v0, v1 := 0, 1
	src := bundle.Bundle{
		Manifest: bundle.Manifest{
			Revision:         "r7",
			Roots:            &[]string{"a", "b/c"},
			RegoVersion:      &v1,
			FileRegoVersions: map[string]int{"/old/*.rego": v0},
			Metadata:         map[string]any{"team": "orders"},
		},
		Data: map[string]any{"b": map[string]any{"c": map[string]any{"n": 12, "l": []any{"x"}}}},
	}
	for path, text := range map[string]string{
		"a/new.rego": "# METADATA\n# title: New\npackage a\n\nallow if data.b.c.n == 12\n",
		"old/x.rego": "package a.old\n\nallow { input.x }\n",
		"odd/x.rego": "package a[\"b/c\"]\n\nx := 1\n",
	} {
		version := ast.RegoV1
		if strings.HasPrefix(path, "old/") {
			version = ast.RegoV0
		}
		src.Modules = append(src.Modules, bundle.ModuleFile{
			Path: path, URL: path, Raw: []byte(text),
			Parsed: ast.MustParseModuleWithOpts(text, ast.ParserOptions{ProcessAnnotation: true, RegoVersion: version}),
		})
	}
	for _, protobuf := range []bool{false, true} {
		src.SetManifestProto(protobuf)
		var archive bytes.Buffer
		if err := bundle.NewWriter(&archive).DisableFormat(true).Write(src); err != nil {
			t.Fatal(err)
		}
		want, err := bundle.NewReader(bytes.NewReader(archive.Bytes())).WithProcessAnnotations(true).Read()
		if err != nil {
			t.Fatal(err)
		}
		got := mustRead(t, archive.Bytes())

		if !reflect.DeepEqual(got.Bundle.Data, want.Data) {
			t.Errorf("data: got %v, want %v", got.Bundle.Data, want.Data)
		}
		if !got.Bundle.Manifest.Equal(want.Manifest) {
			t.Errorf("manifest: got %v, want %v", got.Bundle.Manifest, want.Manifest)
		}
		wanted := map[string]bundle.ModuleFile{}
		for _, m := range want.Modules {
			wanted[m.Path] = m
		}
		if len(got.Bundle.Modules) != len(wanted) {
			t.Fatalf("got %d modules, want %d", len(got.Bundle.Modules), len(wanted))
		}
		for _, m := range got.Bundle.Modules {
			if w := wanted[m.Path]; !reflect.DeepEqual(m, w) {
				t.Errorf("module %s: got %v, want %v", m.Path, m, w)
			}
		}
	}
}

func TestReadFields(t *testing.T) {
	t.Parallel()
	archive := orders.tarball(t)
	b := mustRead(t, archive)
	var expanded int64
	for _, text := range orders {
		expanded += int64(len(text))
	}
	if b.Name != "orders" || b.ETag != "" || b.Size != int64(len(archive)) || b.Expanded != expanded {
		t.Errorf("got %q, %q, %d, %d, want \"orders\", \"\", %d, %d", b.Name, b.ETag, b.Size, b.Expanded, len(archive), expanded)
	}
	if got := b.Bundle.Manifest.Revision; got != "r1" {
		t.Errorf("revision: got %q, want r1", got)
	}
}

func TestReadNames(t *testing.T) {
	t.Parallel()
	want := mustRead(t, orders.tarball(t))
	dirs := []tar.Header{special(tar.TypeDir, "./"), special(tar.TypeDir, "./orders/"), special(tar.TypeDir, "limits")}
	for i := range dirs {
		dirs[i].Linkname = ""
	}
	comment := tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "pax_global_header", PAXRecords: map[string]string{"comment": "c0ffee"}}
	for name, entries := range map[string][]tar.Header{
		"opa build":        orders.entries("/"),
		"tar -C dir .":     append(dirs, orders.entries("./")...),
		"tar -C dir *":     orders.entries(""),
		"git archive":      append([]tar.Header{comment}, orders.entries("")...),
		"another order":    shuffled(orders.entries("/")),
		"an unread file":   append(orders.entries("/"), regular("/notes.txt", "never mind")),
		"an empty unread":  append(orders.entries("/"), regular("/sub/patch.json.bak", "")),
		"a trailing block": orders.entries("/"),
	} {
		raw := tarred(t, entries...)
		if name == "a trailing block" {
			raw = append(raw, make([]byte, 20*512)...)
		}
		if got := mustRead(t, gzipped(t, raw)); got.Digest != want.Digest {
			t.Errorf("%s: got digest %x, want %x", name, got.Digest, want.Digest)
		}
	}
	for name, other := range map[string]files{
		"revision": orders.with(".manifest", `{"revision":"r2","roots":["orders","limits"]}`),
		"data":     orders.with("limits/data.json", `{"boss":"alicf"}`),
		"path":     orders.with("orders/more.rego", "package orders\n"),
	} {
		if got := mustRead(t, other.tarball(t)); got.Digest == want.Digest {
			t.Errorf("another %s: got the same digest", name)
		}
	}
}

func shuffled(entries []tar.Header) []tar.Header {
	rand.Shuffle(len(entries), func(i, j int) { entries[i], entries[j] = entries[j], entries[i] })
	return entries
}

func TestReadRefuses(t *testing.T) {
	t.Parallel()
	ok := orders.tarball(t)
	plain := tarred(t, orders.entries("/")...)
	archive := func(more ...tar.Header) []byte {
		return gzipped(t, tarred(t, append(orders.entries("/"), more...)...))
	}
	file := func(name, text string) []byte { return orders.with(name, text).tarball(t) }
	small := bundles.Limits{Expanded: 4 << 20}
	rules := func(n int) string { return "package orders\n" + strings.Repeat("# 0123456789\n", n/13) }
	noise := make([]byte, 4096)
	rand.NewChaCha8([32]byte{}).Read(noise)

	for name, test := range map[string]struct {
		archive []byte
		limits  bundles.Limits
		want    string
	}{
		"empty":          {nil, bundles.Limits{}, "not a gzip archive: it is empty"},
		"HTML":           {[]byte("\n<!doctype html><p>Sign in"), bundles.Limits{}, "not a gzip archive: it looks like HTML"},
		"JSON":           {[]byte(`{"error":"no"}`), bundles.Limits{}, "not a gzip archive: it looks like JSON"},
		"zip":            {[]byte("PK\x03\x04 and so on"), bundles.Limits{}, "not a gzip archive: it looks like a zip"},
		"plain tar":      {plain, bundles.Limits{}, "not a gzip archive: it looks like a tar"},
		"text":           {[]byte("hello"), bundles.Limits{}, "not a gzip archive"},
		"gzip of text":   {gzipped(t, []byte(strings.Repeat("hello", 1000))), bundles.Limits{}, "archive is broken"},
		"gzip of naught": {gzipped(t), bundles.Limits{}, "cut short"},
		"no end mark":    {gzipped(t, plain[:len(plain)-1024]), bundles.Limits{}, "cut short"},
		"cut in tar":     {gzipped(t, plain[:700]), bundles.Limits{}, "cut short"},
		"cut in gzip":    {ok[:len(ok)-20], bundles.Limits{}, "cut short"},
		"cut checksum":   {ok[:len(ok)-3], bundles.Limits{}, "cut short"},
		"cut header":     {ok[:5], bundles.Limits{}, "cut short"},
		"flipped bit":    {flip(ok), bundles.Limits{}, "archive is broken"},
		"two members":    {append(bytes.Clone(ok), ok...), bundles.Limits{}, "more than one gzip member"},
		"garbage after":  {append(bytes.Clone(ok), 'x'), bundles.Limits{}, "data after its end"},
		"hidden archive": {gzipped(t, plain, plain), bundles.Limits{}, "data after its end"},

		"compressed":    {gzipped(t, tarred(t, regular("/x.bin", string(noise)))), bundles.Limits{Bytes: 2 << 10}, "larger than 2 KiB compressed"},
		"expanded":      {archive(regular("/big.txt", strings.Repeat("x", 2000))), bundles.Limits{Expanded: 2000}, "larger than 2000 bytes together"},
		"entries":       {ok, bundles.Limits{Files: 3}, "more than 3 entries"},
		"depth":         {archive(regular("/a/b/c/d.txt", "")), bundles.Limits{Depth: 3}, `path "/a/b/c/d.txt" is 4 segments deep, limit 3`},
		"path":          {archive(regular("/"+strings.Repeat("x", 1100), "")), bundles.Limits{}, "longer than 1024 bytes"},
		"Rego":          {file("orders/big.rego", rules(2<<20)), small, "Rego files are larger than 1 MiB together"},
		"YAML":          {file("limits/x/data.yaml", strings.Repeat("#\n", 1<<20)), small, "YAML files are larger than 1 MiB together"},
		"JSON values":   {file("limits/x/data.json", "["+strings.Repeat("0,", 140_000)+"0]"), small, "more than 131072 values"},
		"YAML values":   {file("limits/x/data.yml", "["+strings.Repeat("0,", 140_000)+"0]"), small, "more than 131072 values"},
		"manifest":      {file(".manifest", `{"revision":"`+strings.Repeat("r", 1<<20)+`"}`), bundles.Limits{}, `"/.manifest" is larger than 1 MiB`},
		"roots":         {file(".manifest", `{"roots":[`+strings.Repeat(`"a",`, 1000)+`"b"]}`), bundles.Limits{}, "1001 roots, limit 1000"},
		"deep root":     {file(".manifest", `{"roots":["`+strings.Repeat("a/", 40)+`b"]}`), bundles.Limits{}, "41 segments deep, limit 32"},
		"root segments": {file(".manifest", `{"roots":["x`+strings.Repeat(`","a/b/c/d/e/f/g/h/i/j/k/l/m/n/o/p/q/r/s/t/u`, 100)+`"]}`), bundles.Limits{}, "roots of 2101 segments together, limit 2000"},
		"Rego tokens":   {file("orders/x.rego", "package orders\nx := 1"+strings.Repeat("+1", 70_000)), small, "Rego files hold more than 131072 tokens"},
		"nested JSON":   {file("limits/x/data.json", strings.Repeat("[", 513)+strings.Repeat("]", 513)), bundles.Limits{}, `"/limits/x/data.json" is nested deeper than 512`},
		"nested YAML":   {file("limits/x/data.yaml", strings.Repeat("[", 513)+strings.Repeat("]", 513)), bundles.Limits{}, `"/limits/x/data.yaml" is nested deeper than 512`},
		"indented":      {file("limits/x/data.yaml", indented(20)), bundles.Limits{Nesting: 16}, `"/limits/x/data.yaml" is nested deeper than 16`},
		"flat enough":   {file("limits/x/data.yaml", "- - - - 1\n"), bundles.Limits{Nesting: 3}, `"/limits/x/data.yaml" is nested deeper than 3`},
		"nested alias":  {file("limits/x/data.yaml", "a: &a [[[[1]]]]\nb: [[[*a]]]\n"), bundles.Limits{Nesting: 6}, "nested deeper than 6"},
		"laughs":        {file("limits/x/data.yaml", laughs), bundles.Limits{}, "values"},
		"long laughs":   {file("limits/x/data.yaml", "a: &a "+strings.Repeat("x", 500_000)+"\nb: ["+strings.Repeat("*a,", 600)+"]\n"), bundles.Limits{}, "larger than 256 MiB with its aliases written out"},
		"alias circle":  {file("limits/x/data.yaml", "a: &a [*a]\n"), bundles.Limits{}, "leads back to itself"},
		"nested Rego":   {file("orders/x.rego", "package orders\nx := "+strings.Repeat("[", 513)+strings.Repeat("]", 513)), bundles.Limits{}, `"/orders/x.rego" is nested deeper than 512`},
		"nested text":   {file("orders/x.rego", "package orders\nx := "+strings.Repeat(`[$"{`, 90_000)+"1"+strings.Repeat(`}"]`, 90_000)), bundles.Limits{}, `"/orders/x.rego" is nested deeper than 512`},
		"long sum":      {file("orders/x.rego", "package orders\nx := 1"+strings.Repeat("+1", 50_000)), bundles.Limits{}, `"/orders/x.rego" has a rule or an expression nested deeper than 4096`},
		"long else":     {file("orders/x.rego", "package orders\nx := 1 if input.a\n"+strings.Repeat("else := 2 if input.b\n", 20_000)), bundles.Limits{}, `"/orders/x.rego" has a rule or an expression nested deeper than 4096`},

		"traversal":   {archive(regular("../x.rego", "package x")), bundles.Limits{}, `path "../x.rego" has a ".." segment`},
		"up and down": {archive(regular("/a/../../x.rego", "package x")), bundles.Limits{}, `has a ".." segment`},
		"dot":         {archive(regular("/a/./x.rego", "package x")), bundles.Limits{}, `has a "." segment`},
		"absolute":    {archive(regular("//etc/passwd", "x")), bundles.Limits{}, `path "//etc/passwd" is absolute`},
		"both":        {archive(regular(".//etc/passwd", "x")), bundles.Limits{}, `is absolute`},
		"no segment":  {archive(regular("/a//x.rego", "package x")), bundles.Limits{}, "has an empty segment"},
		"backslash":   {archive(regular(`/a\x.rego`, "package x")), bundles.Limits{}, "has a backslash"},
		"newline":     {archive(regular("/a\nx.rego", "package x")), bundles.Limits{}, "has a control character"},
		"not UTF-8":   {archive(regular("/a\xff.rego", "package x")), bundles.Limits{}, "is not UTF-8"},
		"twice":       {archive(regular("./orders/rule.rego", "package orders")), bundles.Limits{}, `it has "/orders/rule.rego" twice`},

		"symlink":    {archive(special(tar.TypeSymlink, "/x.rego")), bundles.Limits{}, `entry "/x.rego" is a symbolic link`},
		"hard link":  {archive(special(tar.TypeLink, "/x.rego")), bundles.Limits{}, "is a hard link"},
		"device":     {archive(special(tar.TypeChar, "/x.rego")), bundles.Limits{}, "is a device"},
		"pipe":       {archive(special(tar.TypeFifo, "/x.rego")), bundles.Limits{}, "is a named pipe"},
		"unknown":    {archive(special('7', "/x.rego")), bundles.Limits{}, "is of an unknown type"},
		"sparse":     {gzipped(t, sparsePAX(t)), bundles.Limits{}, `entry "/x.rego" is a sparse file`},
		"old sparse": {gzipped(t, sparseGNU(t)), bundles.Limits{}, `entry "/x.rego" is a sparse file`},

		"nothing":         {gzipped(t, tarred(t)), bundles.Limits{}, "no policy and no data"},
		"delta":           {file("patch.json", `{"data":[{"op":"upsert","path":"/limits/boss","value":"eve"}]}`), bundles.Limits{}, "it is a delta bundle, and there is no bundle here that it may change"},
		"wasm":            {file("policy.wasm", "\x00asm"), bundles.Limits{}, "WebAssembly is not supported"},
		"wasm resolver":   {file(".manifest", `{"roots":["orders","limits"],"wasm":[{"entrypoint":"orders/allow","module":"/p.wasm"}]}`), bundles.Limits{}, "names WebAssembly modules"},
		"plan alone":      {files{"plan.json": "{}", "data.json": "{}"}.tarball(t), bundles.Limits{}, "a plan, \"/plan.json\", and no Rego"},
		"signed":          {file(".signatures.json", `{"signatures":["e30.e30.e30"]}`), bundles.Limits{}, "verification key not provided"},
		"outside roots":   {file("x.rego", "package other\n"), bundles.Limits{}, `"/x.rego" is "package other", which the manifest roots do not permit`},
		"data outside":    {file("other/data.json", "{}"), bundles.Limits{}, "do not permit data at path"},
		"parse error":     {file("orders/x.rego", "package orders\nallow {"), bundles.Limits{}, "/orders/x.rego:2"},
		"JSON error":      {file("limits/x/data.json", "{"), bundles.Limits{}, "/limits/x/data.json"},
		"YAML error":      {file("limits/x/data.yaml", "{"), bundles.Limits{}, `"/limits/x/data.yaml" is not YAML`},
		"manifest error":  {file(".manifest", "{"), bundles.Limits{}, `"/.manifest" is not a manifest`},
		"two manifests":   {file("sub/.manifest", `{"roots":["orders","limits"]}`), bundles.Limits{}, "multiple manifest files"},
		"two signatures":  {orders.with("a/.signatures.json", `{}`).with("b/.signatures.json", `{}`).tarball(t), bundles.Limits{}, "multiple signatures files"},
		"manifest proto":  {file(".manifest.pb", "\xff\xff"), bundles.Limits{}, `"/.manifest.pb" is not a manifest`},
		"a very long one": {file("orders/x.rego", "package orders\n"+strings.Repeat("x", 100_000)+" {"), bundles.Limits{}, "…"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := bundles.Read(iotest.HalfReader(bytes.NewReader(test.archive)), "orders", test.limits)
			if !errors.Is(err, bundles.ErrRefused) || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("got %v, want a refusal with %q", err, test.want)
			}
			if n := len(err.Error()); n > 5000 {
				t.Errorf("got an error of %d bytes", n)
			}
			if n := strings.Count(err.Error(), bundles.ErrRefused.Error()); n != 1 {
				t.Errorf("got %q, want it to say once that the bundle is refused", err)
			}
		})
	}
}

func flip(archive []byte) []byte {
	archive = bytes.Clone(archive)
	archive[len(archive)/2] ^= 0x10
	return archive
}

// indented is a YAML document of n nested block mappings.
func indented(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "%s%s:\n", strings.Repeat(" ", i), "k")
	}
	return b.String()
}

// laughs is small, and 10^9 values with its aliases written out.
var laughs = func() string {
	text := "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n"
	for i := range 8 {
		text += fmt.Sprintf("a%d: &a%d [%s]\n", i+1, i+1, strings.TrimSuffix(strings.Repeat(fmt.Sprintf("*a%d,", i), 10), ","))
	}
	return text
}()

// retyped changes the type of the entry whose header is at offset.
func retyped(archive []byte, offset int, typeflag byte) []byte {
	h := archive[offset : offset+512]
	h[156] = typeflag
	copy(h[148:156], "        ")
	sum := 0
	for _, b := range h {
		sum += int(b)
	}
	copy(h[148:156], fmt.Sprintf("%06o\x00 ", sum))
	return archive
}

// sparsePAX is an archive with a file of 1 byte that claims 1 TiB, as PAX
// writes it: in records that Go's writer leaves to global headers.
func sparsePAX(t testing.TB) []byte {
	return retyped(tarred(t,
		tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{
			"GNU.sparse.size": "1099511627776", "GNU.sparse.numblocks": "1", "GNU.sparse.map": "0,1",
		}},
		regular("/x.rego", "x"),
	), 0, tar.TypeXHeader)
}

// sparseGNU is such an archive in the old format of GNU tar.
func sparseGNU(t testing.TB) []byte {
	h := regular("/x.rego", "x")
	h.Format = tar.FormatGNU
	archive := tarred(t, h)
	copy(archive[386:], "00000000000\x0000000000001\x00")
	copy(archive[483:], "17777777777\x00")
	return retyped(archive, 0, tar.TypeGNUSparse)
}

// TestReadRegoNesting has modules whose brackets nest three deep, and four,
// with texts that look like brackets, or hide them.
func TestReadRegoNesting(t *testing.T) {
	t.Parallel()
	limits := bundles.Limits{Nesting: 3}
	for _, test := range []struct {
		rule string // %s is where one more bracket may go
		more string
	}{
		{`x := [[[%s]]]`, `[]`},
		{`x := [[["[[["]]] # [[[ "`, ``},
		{"x := [[`[[[\"`,[%s]]]", `[]`},
		{`x := ["\"[[[[", "\\", [[%s]]]`, `[]`},
		{`x := ["\u0022[[[[\u005B", [[%s]]]`, `[]`},
		{`x := [$"[[[[\{{1+(%s)}[[[[{2}\"", [[]]]`, `(1)`},
		{"x := [$`[[[[\\{{1+(%s)}[[\"[[{2}\n`, [[]]]", `(1)`},
		{`x := {[y | y := {1, 2}[_]] | (1 + 1) == 2}`, ``},
		{`x if { every y in [1] { y == [1][%s] } }`, `[0][0]`},
	} {
		one := "1"
		for _, want := range []bool{true, false} {
			rule := test.rule
			if strings.Contains(rule, "%s") {
				rule = fmt.Sprintf(rule, one)
			}
			if !want && test.more == "" {
				continue
			}
			archive := files{"x.rego": "package x\n\n" + rule + "\n"}.tarball(t)
			_, err := bundles.Read(bytes.NewReader(archive), "x", limits)
			if want && err != nil {
				t.Errorf("%s: got %v, want it read", rule, err)
			}
			if !want && (err == nil || !strings.Contains(err.Error(), "nested deeper than 3")) {
				t.Errorf("%s: got %v, want it nested deeper than 3", rule, err)
			}
			one = test.more
		}
	}
	// After a string that does not end, OPA's parser reads on.
	open := files{"x.rego": "package x\n\nx := " + strings.Repeat("$\"\n", 100_000)}.tarball(t)
	if _, err := bundles.Read(bytes.NewReader(open), "x", limits); err == nil || !strings.Contains(err.Error(), "nested deeper than 3") {
		t.Errorf("templates without an end: got %v, want them nested deeper than 3", err)
	}
}

func TestReadManifestNesting(t *testing.T) {
	t.Parallel()
	metadata := map[string]any{}
	for range 20 {
		metadata = map[string]any{"m": []any{metadata}}
	}
	src := bundle.Bundle{Manifest: bundle.Manifest{Metadata: metadata}, Data: map[string]any{}}
	for _, protobuf := range []bool{false, true} {
		src.SetManifestProto(protobuf)
		var archive bytes.Buffer
		if err := bundle.NewWriter(&archive).Write(src); err != nil {
			t.Fatal(err)
		}
		if _, err := bundles.Read(bytes.NewReader(archive.Bytes()), "x", bundles.Limits{}); err != nil {
			t.Errorf("got %v, want it read", err)
		}
		_, err := bundles.Read(bytes.NewReader(archive.Bytes()), "x", bundles.Limits{Nesting: 30})
		if err == nil || !strings.Contains(err.Error(), "is nested deeper than 30") {
			t.Errorf("got %v, want it nested deeper than 30", err)
		}
	}
}

// TestReadBombs reads archives that are small and unpack to a lot. It does not
// run beside other tests, as it counts what is allocated.
func TestReadBombs(t *testing.T) {
	for name, test := range map[string]struct {
		want    string
		entries []tar.Header
		file    int64 // size of a last file, of zeros
	}{
		"one file":      {"larger than 256 MiB together", nil, 10 << 30},
		"a data file":   {"larger than 256 MiB together", []tar.Header{{Typeflag: tar.TypeReg, Name: "/data.json", Size: 10 << 30}}, 0},
		"a false claim": {"cut short", []tar.Header{{Typeflag: tar.TypeReg, Name: "/data.json", Size: 200 << 20}}, 0},
		"long names":    {"longer than 1024 bytes", []tar.Header{{Typeflag: tar.TypeReg, Name: "/" + strings.Repeat("n", 500_000)}}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			r, w := io.Pipe()
			go func() {
				zw, _ := gzip.NewWriterLevel(w, gzip.BestSpeed)
				tw := tar.NewWriter(zw)
				for _, h := range test.entries {
					tw.WriteHeader(&h)
				}
				if test.file > 0 {
					tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "/big.bin", Size: test.file})
					io.CopyN(tw, zeros{}, test.file)
				}
				zw.Close()
				w.Close()
			}()
			assertRefused(t, r, test.want)
			r.Close()
		})
	}
	t.Run("headers only", func(t *testing.T) {
		// A million records in front of no file: nothing but headers.
		header := retyped(tarred(t, tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{
			"comment": strings.Repeat("c", 900_000),
		}}), 0, tar.TypeXHeader)
		header = header[:len(header)-1024]
		r, w := io.Pipe()
		go func() {
			zw, _ := gzip.NewWriterLevel(w, gzip.BestSpeed)
			for range 2000 {
				if _, err := zw.Write(header); err != nil {
					return
				}
			}
			zw.Close()
			w.Close()
		}()
		assertRefused(t, r, "of headers and padding")
		r.Close()
	})
	t.Run("after the end", func(t *testing.T) {
		r, w := io.Pipe()
		go func() {
			zw, _ := gzip.NewWriterLevel(w, gzip.BestSpeed)
			zw.Write(tarred(t, orders.entries("/")...))
			io.CopyN(zw, zeros{}, 10<<30)
			zw.Close()
			w.Close()
		}()
		assertRefused(t, r, "of headers and padding")
		r.Close()
	})
}

// assertRefused reads an archive and bounds what that allocates. Most of it is
// garbage at once, by far below what is promised.
func assertRefused(t *testing.T, r io.Reader, want string) {
	t.Helper()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, err := bundles.Read(r, "bomb", bundles.Limits{})
	runtime.ReadMemStats(&after)
	if !errors.Is(err, bundles.ErrRefused) || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want a refusal with %q", err, want)
	}
	if got := (after.TotalAlloc - before.TotalAlloc) >> 20; got > 256 {
		t.Errorf("got %d MiB allocated, want at most 256", got)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func TestReadTransportError(t *testing.T) {
	t.Parallel()
	archive := orders.tarball(t)
	for _, want := range []error{errors.New("connection reset"), context.DeadlineExceeded, io.ErrUnexpectedEOF} {
		for _, n := range []int{0, 1, 5, 12, len(archive) / 2, len(archive) - 1, len(archive)} {
			_, err := bundles.Read(io.MultiReader(bytes.NewReader(archive[:n]), iotest.ErrReader(want)), "orders", bundles.Limits{})
			if err != want {
				t.Errorf("after %d bytes: got %v, want %v", n, err, want)
			}
		}
	}
}

// What is within the limits is read, up to the last byte and segment.
func TestReadAtTheLimits(t *testing.T) {
	t.Parallel()
	archive := files{"a/b/data.json": "[[[[0]]]]", "a/x.rego": "package x\ny := [[[[0]]]]\n"}.tarball(t)
	limits := bundles.Limits{Bytes: int64(len(archive)), Expanded: 9 + 25, Files: 2, Depth: 3, Nesting: 4}
	if _, err := bundles.Read(bytes.NewReader(archive), "x", limits); err != nil {
		t.Error(err)
	}
	for _, limits := range []bundles.Limits{
		{Bytes: limits.Bytes - 1}, {Expanded: limits.Expanded - 1}, {Files: 1}, {Depth: 2}, {Nesting: 3},
	} {
		if _, err := bundles.Read(bytes.NewReader(archive), "x", limits); !errors.Is(err, bundles.ErrRefused) {
			t.Errorf("%+v: got %v, want a refusal", limits, err)
		}
	}
}

func FuzzRead(f *testing.F) {
	for _, seed := range []files{
		orders,
		orders.with("patch.json", "{}"),
		orders.with("x/data.yaml", laughs),
		orders.with("orders/x.rego", "package orders\nx := $\"{[1][0]} \\{\"\n# METADATA\n# title: y\ny if not x\n"),
		{"data.yaml": "a: &a [1]\nb: *a\n"},
	} {
		f.Add(tarred(f, seed.entries("/")...), true)
		f.Add(seed.tarball(f), false)
	}
	f.Add(tarred(f, special(tar.TypeSymlink, "/x.rego")), true)
	f.Add(sparsePAX(f), true)
	f.Add(sparseGNU(f), true)
	f.Add([]byte("<html>"), false)
	f.Fuzz(func(t *testing.T, archive []byte, zip bool) {
		if zip {
			archive = gzipped(t, archive)
		}
		checkRead(t, archive)
	})
}

// FuzzReadFile has an archive that is as it should be around a file that may
// not be.
func FuzzReadFile(f *testing.F) {
	f.Add("/data.json", `{"a":[1,{"b":"\"["}]}`)
	f.Add("/a/data.yaml", "a: &a [1]\nb: *a\nc:\n  - - x\n  - <<: {y: 1}\n")
	f.Add("/data.yml", laughs)
	f.Add("/.manifest", `{"roots":["a"],"rego_version":0,"file_rego_versions":{"/a/*":1}}`)
	f.Add("/.manifest.pb", "\x0a\x02r1")
	f.Add("/.signatures.json", `{"signatures":[]}`)
	f.Add("/x.rego", "package x\n\ny := $\"{[1][0]} \\{\" # {\nz := $`{`{`}`\n")
	f.Add("/x.rego", "# METADATA\n# custom: {a: &a [1], b: *a}\npackage x\n\ny if { every z in input { z } } else := 1\n")
	f.Fuzz(func(t *testing.T, name, text string) {
		if len(name) > 90 || strings.Contains(name, "\x00") {
			return // Go's tar writer would refuse it, or write another header
		}
		h := regular(name, text)
		h.Format = tar.FormatUSTAR
		var archive bytes.Buffer
		w := tar.NewWriter(&archive)
		h.Linkname = ""
		if w.WriteHeader(&h) != nil {
			return
		}
		io.WriteString(w, text)
		w.Close()
		checkRead(t, gzipped(t, archive.Bytes()))
	})
}

// checkRead reads an archive and checks what holds for any.
func checkRead(t *testing.T, archive []byte) {
	t.Helper()
	limits := bundles.Limits{Bytes: 64 << 10, Expanded: 64 << 10, Files: 16, Depth: 6, Nesting: 24}
	b, err := bundles.Read(bytes.NewReader(archive), "fuzz", limits)
	if err != nil {
		if !errors.Is(err, bundles.ErrRefused) {
			t.Errorf("got %v, want a refusal", err)
		}
		return
	}
	if b.Size > limits.Bytes || b.Expanded > limits.Expanded || len(b.Bundle.Modules) > limits.Files {
		t.Errorf("got %d bytes, %d expanded, %d modules, want them within %+v", b.Size, b.Expanded, len(b.Bundle.Modules), limits)
	}
	if d := depth(b.Bundle.Data); d > limits.Depth+limits.Nesting {
		t.Errorf("got data %d deep", d)
	}
	again, err := bundles.Read(bytes.NewReader(archive), "again", limits)
	if err != nil || again.Digest != b.Digest {
		t.Errorf("a second time: got another digest, or %v", err)
	}
}

func depth(v any) int {
	deepest := 0
	switch v := v.(type) {
	case map[string]any:
		for _, x := range v {
			deepest = max(deepest, 1+depth(x))
		}
	case []any:
		for _, x := range v {
			deepest = max(deepest, 1+depth(x))
		}
	}
	return deepest
}

func BenchmarkRead(b *testing.B) {
	big := files{".manifest": `{"revision":"r1"}`}
	for i := range 50 {
		big[fmt.Sprintf("p%d/rule.rego", i)] = fmt.Sprintf("package p%d\n\nimport data.users\n\n", i) +
			strings.Repeat("allow if {\n\tsome role in users[input.user].roles\n\trole == \"admin\"\n}\n\n", 20)
	}
	var users []string
	for i := range 10_000 {
		users = append(users, fmt.Sprintf(`"user%d":{"roles":["reader","writer"],"level":%d}`, i, i))
	}
	big["users/data.json"] = "{" + strings.Join(users, ",") + "}"
	for name, content := range map[string]files{"small": orders, "1MB": big} {
		b.Run(name, func(b *testing.B) {
			archive := content.tarball(b)
			var size int64
			for _, text := range content {
				size += int64(len(text))
			}
			b.SetBytes(size)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := bundles.Read(bytes.NewReader(archive), "bench", bundles.Limits{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
