package bundles_test

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/gatehouse-authz/gatehouse/bundles"
)

// changes is a delta to orders.
var changes = files{
	".manifest":  `{"revision":"r2","roots":["orders","limits"]}`,
	"patch.json": `{"data":[{"op":"upsert","path":"/limits/boss","value":"eve"}]}`,
}

// serveDelta answers whoever has a bundle with a delta, others with orders.
func serveDelta(t *testing.T, delta files, prefer *string) string {
	t.Helper()
	snapshot, patch := orders.tarball(t), delta.tarball(t)
	return newServer(t, func(w http.ResponseWriter, r *http.Request) {
		*prefer = r.Header.Get("Prefer")
		if r.Header.Get("If-None-Match") == "" {
			w.Header().Set("ETag", `"1"`)
			w.Write(snapshot)
			return
		}
		w.Header().Set("ETag", `"2"`)
		w.Write(patch)
	})
}

func TestDelta(t *testing.T) {
	t.Parallel()
	var prefer string
	h := bundles.NewHTTP(bundles.HTTPConfig{URL: serveDelta(t, changes, &prefer), KeepArchive: true})
	base, err := h.Next(t.Context(), "orders", bundles.Have{})
	if err != nil {
		t.Fatal(err)
	}
	if base.Delta || prefer != "modes=snapshot" {
		t.Errorf("without a base: got delta %v, asked for %q", base.Delta, prefer)
	}

	have := bundles.Have{ETag: base.ETag, Digest: base.Digest}
	b, err := h.Next(t.Context(), "orders", have)
	if err != nil {
		t.Fatal(err)
	}
	if prefer != "modes=snapshot,delta" {
		t.Errorf("asked for %q", prefer)
	}
	if !b.Delta || b.ETag != `"2"` || b.Bundle.Manifest.Revision != "r2" || len(b.Bundle.Patch.Data) != 1 || b.Bundle.Patch.Data[0].Path != "/limits/boss" {
		t.Errorf("got %+v, want the delta", b)
	}
	again, err := h.Next(t.Context(), "orders", have)
	if err != nil || again.Digest != b.Digest {
		t.Errorf("again: got digest %x, %v, want %x", again.Digest, err, b.Digest)
	}
	have.Digest[0]++
	if other, err := h.Next(t.Context(), "orders", have); err != nil || other.Digest == b.Digest {
		t.Errorf("to another base: got %v, and the same digest", err)
	}

	store, err := bundles.NewStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := store.Save("key", b); err == nil || !strings.Contains(err.Error(), "it is a delta") {
		t.Errorf("saving: got %v, want it refused", err)
	}
}

func TestDeltaRefused(t *testing.T) {
	t.Parallel()
	rs := rs256()
	digest := [32]byte{1}
	patch := func(text string) files { return changes.with("patch.json", text) }
	for name, c := range map[string]struct {
		delta  files
		config bundles.HTTPConfig
		have   bundles.Have
		want   string
	}{
		"no base":         {changes, bundles.HTTPConfig{}, bundles.Have{ETag: `"1"`}, "no bundle here that it may change"},
		"keys":            {changes, bundles.HTTPConfig{Verify: rs.verify()}, bundles.Have{ETag: `"1"`, Digest: digest}, "keys are configured"},
		"signed":          {changes.signed(t, rs), bundles.HTTPConfig{Verify: rs.verify()}, bundles.Have{ETag: `"1"`, Digest: digest}, "keys are configured"},
		"signed, no keys": {changes.signed(t, rs), bundles.HTTPConfig{}, bundles.Have{}, `has "/.signatures.json"`},
		"rules":           {changes.with("a.rego", "package orders"), bundles.HTTPConfig{}, bundles.Have{}, `has "/a.rego"`},
		"data":            {changes.with("limits/data.json", "{}"), bundles.HTTPConfig{}, bundles.Have{}, `has "/limits/data.json"`},
		"elsewhere":       {changes.with("a/patch.json", "{}"), bundles.HTTPConfig{}, bundles.Have{}, `its patch is "/a/patch.json"`},
		"not JSON":        {patch(`{"data":[]} {}`), bundles.HTTPConfig{}, bundles.Have{}, "not one JSON document"},
		"another thing":   {patch(`{"data":"x"}`), bundles.HTTPConfig{}, bundles.Have{}, "is not a patch"},
		"nothing":         {patch(`{"data":[]}`), bundles.HTTPConfig{}, bundles.Have{}, "has no operation"},
		"many":            {patch(`{"data":[{"op":"remove","path":"/a"}` + strings.Repeat(`,{"op":"remove","path":"/a"}`, 10000) + `]}`), bundles.HTTPConfig{}, bundles.Have{}, "10001 operations, limit 10000"},
		"nested":          {patch(`{"data":[{"op":"upsert","path":"/limits/a","value":` + strings.Repeat("[", 600) + strings.Repeat("]", 600) + `}]}`), bundles.HTTPConfig{}, bundles.Have{}, "nested deeper than 512"},
		"nested in all":   {patch(`{"data":[{"op":"upsert","path":"/limits` + strings.Repeat("/a", 20) + `","value":` + strings.Repeat("[", 500) + strings.Repeat("]", 500) + `}]}`), bundles.HTTPConfig{}, bundles.Have{}, "after which data is nested deeper than 512"},
		"long path":       {patch(`{"data":[{"op":"upsert","path":"/limits/` + strings.Repeat("a", 2000) + `"}]}`), bundles.HTTPConfig{}, bundles.Have{}, "longer than 1024 bytes"},
		"outside roots":   {patch(`{"data":[{"op":"upsert","path":"/other","value":1}]}`), bundles.HTTPConfig{}, bundles.Have{}, "roots"},
		"large":           {patch(`{"data":[{"op":"upsert","path":"/limits/x","value":"` + strings.Repeat("x", 3000) + `"}]}`), bundles.HTTPConfig{Limits: bundles.Limits{Expanded: 2000}}, bundles.Have{}, "larger than 2000 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var prefer string
			c.config.URL = serveDelta(t, c.delta, &prefer)
			if c.have == (bundles.Have{}) {
				c.have = bundles.Have{ETag: `"1"`, Digest: digest}
			}
			b, err := bundles.NewHTTP(c.config).Next(t.Context(), "orders", c.have)
			if !errors.Is(err, bundles.ErrRefused) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, %v, want it refused for %q", b, err, c.want)
			}
			if c.config.Verify != nil && prefer != "modes=snapshot" {
				t.Errorf("with keys, asked for %q", prefer)
			}
		})
	}

	root := t.TempDir()
	changes.writeTo(t, root+"/folder")
	mustWrite(t, root+"/archive.tar.gz", string(changes.tarball(t)))
	for _, name := range []string{"folder", "archive"} {
		_, err := mustDir(t, root).Fetch(t.Context(), name, "")
		if !errors.Is(err, bundles.ErrRefused) || !strings.Contains(err.Error(), "a directory has no earlier bundle") {
			t.Errorf("%s: got %v, want it refused", name, err)
		}
	}
}

// A delta that somebody asks another host for is asked for in the same words.
func TestDeltaRedirect(t *testing.T) {
	t.Parallel()
	var prefer string
	other := serveDelta(t, changes, &prefer)
	here := newServer(t, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, other, http.StatusFound) })
	b, err := bundles.NewHTTP(bundles.HTTPConfig{URL: here}).Next(t.Context(), "orders", bundles.Have{ETag: `"1"`, Digest: [32]byte{1}})
	if err != nil || !b.Delta || prefer != "modes=snapshot,delta" {
		t.Errorf("got %v, asked for %q", err, fmt.Sprint(prefer))
	}
}
