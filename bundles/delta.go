package bundles

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/open-policy-agent/opa/v1/bundle"
	"github.com/open-policy-agent/opa/v1/util"
)

// patchPath is where the patch of a delta bundle is.
const patchPath = "/patch.json"

// checkDelta returns an error unless a patch of that path and size is one that
// the bundle may have.
func (c *content) checkDelta(p string, size int64) error {
	switch {
	case c.verify != nil:
		return refuse("it is a delta bundle, and keys are configured: no signature says what a delta makes of a bundle")
	case c.noDelta != "":
		return refuse("it is a delta bundle, and %s", c.noDelta)
	case c.base == nil:
		return refuse("it is a delta bundle, and there is no bundle here that it may change")
	case p != patchPath:
		return refuse("its patch is %q, not %q", p, patchPath)
	}
	return nil
}

// delta reports whether the bundle is a delta.
func (c *content) delta() bool {
	return slices.ContainsFunc(c.files, func(f file) bool { return f.kind == kindPatch })
}

// checkAlone returns an error if a delta has more than a patch and a manifest.
func (c *content) checkAlone() error {
	for _, f := range c.files {
		switch f.kind {
		case kindPatch, kindManifest, kindManifestProto:
		default:
			return refuse("it is a delta bundle, and has %q", f.path)
		}
	}
	return nil
}

// checkPatch bounds a patch. Its paths are checked against the roots by who
// applies it.
func (c *content) checkPatch(f file) error {
	if !json.Valid(f.data) {
		return errors.New("is not one JSON document")
	}
	var patch bundle.Patch
	if err := util.NewJSONDecoder(bytes.NewReader(f.data)).Decode(&patch); err != nil {
		return fmt.Errorf("is not a patch: %w", err)
	}
	switch n := len(patch.Data); {
	case n == 0:
		// OPA takes it for a snapshot of nothing.
		return errors.New("has no operation")
	case n > maxPatches:
		return fmt.Errorf("has %d operations, limit %d", n, maxPatches)
	}
	for i, op := range patch.Data {
		if len(op.Path) > maxPath {
			return fmt.Errorf("has operation %d with a path longer than %d bytes", i, maxPath)
		}
		segments := strings.Count(strings.Trim(op.Path, "/"), "/") + 1
		if segments > c.limits.Nesting || deeper(op.Value, c.limits.Nesting-segments) {
			return fmt.Errorf("has operation %d, after which data %w", i, nestingError(c.limits.Nesting))
		}
	}
	return nil
}

// deltaDigest is the digest of a bundle to which a delta was applied.
func deltaDigest(base, delta [32]byte) [32]byte {
	h := sha256.New()
	h.Write([]byte("gatehouse delta 1\n"))
	h.Write(base[:])
	h.Write(delta[:])
	return [32]byte(h.Sum(nil))
}
