// Package bundles supplies OPA bundles by name, from a directory or from an
// HTTP service, if they have changed and if they keep within limits.
//
// In the common case a caller asks again for a bundle that it has, naming the
// state it has by its ETag, and is told ErrNotModified at the price of a
// conditional request or of a few stat calls. If the bundle has changed, the
// whole of it is read through the one bounded reader (see Read), is handed to
// OPA's reader from memory, and comes back parsed.
//
// What others lean on:
//
//   - Whoever wrote the bundle is not trusted. Every size, count, depth and
//     wait has a bound (see Limits); a bundle beyond one is refused before OPA
//     sees it, and OPA's panics are refusals too.
//   - Nothing in a bundle is executed, and nothing it names is fetched.
//     WebAssembly is refused, and so are delta bundles but where the caller of
//     HTTP.Next says which bundle they may change.
//   - With keys, a bundle is verified before OPA reads it, and one that is not
//     signed is refused (see ReadVerified). Without keys, a signed bundle is
//     refused, as there is nothing to verify it with.
//   - Modules and data mean what they mean to OPA, by the paths that
//     "opa build -b" gives them: relative to the bundle, with a leading slash.
//   - Equal content has an equal Digest, whether it came as an archive or as
//     a folder, and an equal Digest means equal content.
//   - A Bundle is never changed once it has been returned.
//   - However many are read at once, few large ones are (see Turns).
//
// A Store keeps bundles on disk as they were supplied, for a start while their
// sources are away. What it gives back has been read, and verified, anew.
package bundles

import (
	"context"
	"errors"

	"github.com/open-policy-agent/opa/v1/bundle"
)

// Source supplies bundles by name. Its two implementations are Dir and HTTP.
type Source interface {
	// Fetch returns the named bundle, read within the limits, unless it still
	// is the one that etag names: then it returns ErrNotModified. An empty
	// etag always fetches. Fetch is safe for concurrent use.
	//
	// It returns ErrNotModified; ErrNotFound when the source says that there
	// is no such bundle; an error wrapping ErrRefused for one that is there
	// and cannot be used; and any other error when the source cannot be
	// asked, or not within ctx.
	Fetch(ctx context.Context, name, etag string) (*Bundle, error)
}

// Bundle is one bundle as it was supplied.
type Bundle struct {
	// Name is the name it was fetched by.
	Name string
	// ETag names this state of the bundle at its source; empty where the
	// source gives none, and the bundle is then fetched whole each time.
	ETag string
	// Digest is the SHA-256 of the content: equal digests, equal content,
	// whatever the archive or directory it came in. The content is the files
	// that OPA reads, with their paths; other files do not count, nor does a
	// signature: who signed a content does not change what it says, and each
	// Bundle has passed the verification of its own source.
	Digest [32]byte
	// Size is its size as supplied, Expanded that of its files, in bytes.
	Size, Expanded int64
	// Bundle is the content as OPA reads it. It must not be changed.
	Bundle *bundle.Bundle
	// Archive is the bundle as it was supplied, for a Store. Nil unless it was
	// asked for (see HTTPConfig).
	Archive []byte

	// Delta says that Bundle.Patch is what changes in the bundle that its
	// caller has, and that Bundle has nothing else but a manifest. The Digest
	// is then made of that of the other bundle and of the content of this one:
	// equal digests still mean equal content, though a bundle that came by
	// other ways to the same content has another.
	Delta bool

	// Waits says that the service can be asked to wait for a change: see Have.
	Waits bool

	end func() // gives the turn back; nil: there is none
}

// Errors that a Source returns, most of them wrapped.
var (
	ErrNotModified = errors.New("bundle is not modified")
	ErrNotFound    = errors.New("no such bundle")
	ErrRefused     = errors.New("bundle refused")
)

// Limits bound what is read of one bundle. A field that is not positive means
// its default.
//
// A few bounds follow from Expanded, because a small document can be a large
// one in memory. Rego files together, and YAML files together, have 1/64 of it
// in bytes (at least 1 MiB); Rego files together have one token for each 256
// bytes of it (at least 131,072), and JSON documents together one value for
// each 32 (at least 131,072).
//
// Other bounds are fixed: a path has 1,024 bytes; a manifest or a signatures
// file has 1 MiB, and a manifest 1,000 roots, 2,000 segments in them, and
// 1,000 file versions; the patch of a delta bundle has 10,000 operations.
type Limits struct {
	Bytes    int64 // as supplied, compressed; default 64 MiB
	Expanded int64 // of all files together; default 256 MiB
	Files    int   // number of entries, directories too; default 10,000
	Depth    int   // segments in the path of a file; default 32
	Nesting  int   // nesting of a JSON or YAML document, and of Rego; default 512

	// Turns bound how many large bundles are read at once. Nil: no bound.
	Turns *Turns
}

// The bounds that follow from no setting.
const (
	maxPath         = 1024    // bytes in a path
	maxManifest     = 1 << 20 // bytes in a manifest, and in a signatures file
	maxRoots        = 1000    // roots in a manifest
	maxRootSegments = 2000    // segments in its roots together
	maxFileVersions = 1000    // patterns in a manifest's file_rego_versions
	maxPatches      = 10_000  // operations in the patch of a delta bundle
)

func (l Limits) orDefault() Limits {
	if l.Bytes <= 0 {
		l.Bytes = 64 << 20
	}
	if l.Expanded <= 0 {
		l.Expanded = 256 << 20
	}
	if l.Files <= 0 {
		l.Files = 10_000
	}
	if l.Depth <= 0 {
		l.Depth = 32
	}
	if l.Nesting <= 0 {
		l.Nesting = 512
	}
	return l
}

// source bounds the Rego files together, and the YAML files together, in bytes:
// a byte of YAML may take a hundred bytes once parsed.
func (l Limits) source() int64 { return max(l.Expanded/64, 1<<20) }

// tokens bounds the tokens of the Rego files: a token may take half a KiB.
func (l Limits) tokens() int64 { return max(l.Expanded/256, 1<<17) }

// values bounds the JSON values: `{},` is three bytes, and 64 decoded.
func (l Limits) values() int64 { return max(l.Expanded/32, 1<<17) }
