package bundles

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/bundle"
	"github.com/open-policy-agent/opa/v1/bundle/v1pb"
	"github.com/open-policy-agent/opa/v1/loader/filter"
	"github.com/open-policy-agent/opa/v1/storage"
	"github.com/open-policy-agent/opa/v1/util"
)

// content gathers the files of one bundle, whichever way they come, and keeps
// the limits while it does: enter each entry, then reserve and add each file,
// then make the bundle. It is not safe for concurrent use.
type content struct {
	limits   Limits                     // with defaults
	verify   *bundle.VerificationConfig // nil: the bundle may not be signed
	entries  int
	expanded int64
	rego     int64           // bytes of Rego reserved
	yaml     int64           // bytes of YAML reserved
	seen     map[string]bool // :: path → is a directory
	files    []file          // those that OPA reads; to be verified, all

	base    *[32]byte // digest of the bundle that a delta may change; nil: none
	noDelta string    // why none, for an error; empty: none is there

	keepArchive bool         // the Bundle has its Archive
	supplied    func() error // reads all of the archive; nil: there is none
	leave, end  func()       // give back the place and the turn; nil: has none
}

type file struct {
	path string // with a leading slash
	kind kind
	data []byte
}

func newContent(limits Limits, verify *bundle.VerificationConfig) *content {
	return &content{limits: limits, verify: verify, seen: make(map[string]bool)}
}

// enter counts an entry and returns its path, which starts with a slash. Only
// the root of the bundle has the path "/".
func (c *content) enter(name string, dir bool) (string, error) {
	c.entries++
	if c.entries > c.limits.Files {
		return "", refuse("it has more than %d entries", c.limits.Files)
	}
	p, err := pathOf(name, dir)
	if err != nil {
		return "", err
	}
	if n := strings.Count(p, "/"); n > c.limits.Depth {
		return "", refuse("path %q is %d segments deep, limit %d", brief(name), n, c.limits.Depth)
	}
	if _, ok := c.seen[p]; ok {
		return "", refuse("it has %q twice", p)
	}
	c.seen[p] = dir
	return p, nil
}

// pathOf checks the name of an entry and normalises it. OPA's own writer gives
// names a leading slash, and "tar -C dir ." gives them a leading "./".
func pathOf(name string, dir bool) (string, error) {
	bad := func(why string) (string, error) {
		return "", refuse("path %q %s", brief(name), why)
	}
	if len(name) > maxPath {
		return bad(fmt.Sprintf("is longer than %d bytes", maxPath))
	}
	if !utf8.ValidString(name) {
		return bad("is not UTF-8")
	}
	if strings.ContainsFunc(name, unicode.IsControl) {
		return bad("has a control character")
	}
	if strings.Contains(name, `\`) {
		return bad("has a backslash")
	}
	p := name
	if after, ok := strings.CutPrefix(p, "./"); ok {
		p = after
	} else {
		p = strings.TrimPrefix(p, "/")
	}
	if dir {
		p = strings.TrimSuffix(p, "/")
		if p == "" || p == "." {
			return "/", nil
		}
	}
	for segment := range strings.SplitSeq(p, "/") {
		switch segment {
		case "":
			if strings.HasPrefix(p, "/") {
				return bad("is absolute")
			}
			return bad("has an empty segment")
		case ".", "..":
			return bad(fmt.Sprintf("has a %q segment", segment))
		}
	}
	return "/" + p, nil
}

// reserve checks the size of a file before it is read, and reports whether it
// is to be read at all: files that mean nothing to OPA only count, unless they
// are to be verified.
func (c *content) reserve(p string, size int64) (bool, error) {
	if size < 0 || size > c.limits.Expanded-c.expanded {
		return false, refuse("its files are larger than %s together", bytesText(c.limits.Expanded))
	}
	c.expanded += size

	switch kindOf(p) {
	case kindPatch:
		return true, c.checkDelta(p, size)
	case kindWasm:
		return false, refuse("WebAssembly is not supported: it has %q", p)
	case kindRego:
		if c.rego += size; c.rego > c.limits.source() {
			return false, refuse("its Rego files are larger than %s together", bytesText(c.limits.source()))
		}
	case kindYAML:
		if c.yaml += size; c.yaml > c.limits.source() {
			return false, refuse("its YAML files are larger than %s together", bytesText(c.limits.source()))
		}
	case kindManifest, kindManifestProto, kindSignatures:
		if size > maxManifest {
			return false, refuse("%q is larger than %s", p, bytesText(maxManifest))
		}
	case kindNone:
		return c.verify != nil, nil
	}
	return true, nil
}

// add keeps a file that has been reserved.
func (c *content) add(p string, data []byte) {
	c.files = append(c.files, file{path: p, kind: kindOf(p), data: data})
}

type kind int

const (
	kindNone kind = iota
	kindSignatures
	kindPatch
	kindRego
	kindWasm
	kindPlan
	kindJSON
	kindYAML
	kindManifestProto
	kindManifest
)

// kindOf tells what OPA's reader takes a file for. The order is its order.
func kindOf(p string) kind {
	base := path.Base(p)
	switch {
	case bundle.IsSignaturesFile(p):
		return kindSignatures
	case base == "patch.json":
		return kindPatch
	case strings.HasSuffix(p, bundle.RegoExt):
		return kindRego
	case base == bundle.WasmFile:
		return kindWasm
	case base == bundle.PlanFile, base == bundle.PlanProtoFile:
		return kindPlan
	case base == "data.json":
		return kindJSON
	case bundle.IsYAMLDataFile(p):
		return kindYAML
	case strings.HasSuffix(p, bundle.ManifestProtoExt):
		return kindManifestProto
	case strings.HasSuffix(p, bundle.ManifestExt):
		return kindManifest
	}
	return kindNone
}

// bundle checks what was gathered and has OPA read it. Every error wraps
// ErrRefused. The content is spent afterwards.
func (c *content) bundle(name string, size int64) (*Bundle, error) {
	slices.SortFunc(c.files, func(a, b file) int { return cmp.Compare(a.path, b.path) })
	if err := c.check(); err != nil {
		return nil, err
	}
	if c.verify != nil {
		if err := c.verifyFiles(); err != nil {
			return nil, refuseLong(err)
		}
		c.files = slices.DeleteFunc(c.files, func(f file) bool { return f.kind == kindNone || f.kind == kindSignatures })
		if len(c.files) == 0 {
			return nil, refuse("it has no policy and no data")
		}
	}
	digest, delta := c.digest(), c.delta()
	b, err := c.read(name)
	if err != nil {
		return nil, refuseLong(err)
	}
	if delta {
		digest = deltaDigest(*c.base, digest)
	}
	return &Bundle{Name: name, Digest: digest, Size: size, Expanded: c.expanded, Bundle: b, Delta: delta}, nil
}

// check bounds what OPA would spend on decoding, before it decodes.
func (c *content) check() error {
	if len(c.files) == 0 {
		return refuse("it has no policy and no data")
	}
	if c.delta() {
		if err := c.checkAlone(); err != nil {
			return err
		}
	}
	var (
		values  = c.limits.values()
		tokens  = c.limits.tokens()
		modules = 0
		plan    = ""
	)
	for _, f := range c.files {
		var err error
		switch f.kind {
		case kindRego:
			modules++
			err = checkRego(f.data, c.limits.Nesting, &tokens)
		case kindPlan:
			plan = f.path
		case kindPatch:
			if err = checkJSON(f.data, c.limits.Nesting, &values); err == nil {
				err = c.checkPatch(f)
			}
		case kindJSON, kindSignatures:
			err = checkJSON(f.data, c.limits.Nesting, &values)
		case kindYAML:
			err = checkYAML(f.data, c.limits.Nesting, values, c.limits.Expanded)
		case kindManifest:
			if err = checkJSON(f.data, c.limits.Nesting, &values); err == nil {
				err = c.checkManifest(f)
			}
		case kindManifestProto:
			err = c.checkManifest(f)
		}
		switch err {
		case nil:
		case errValues:
			return refuse("its JSON and YAML documents hold more than %d values", c.limits.values())
		case errTokens:
			return refuse("its Rego files hold more than %d tokens", c.limits.tokens())
		default:
			return refuseLong(fmt.Errorf("%q %w", f.path, err))
		}
	}
	if plan != "" && modules == 0 {
		return refuse("it has a plan, %q, and no Rego", plan)
	}
	return nil
}

// checkManifest bounds a manifest, because OPA's checks of modules and data
// against it take time in the product of their numbers.
func (c *content) checkManifest(f file) (err error) {
	defer recoverTo(&err)
	var m bundle.Manifest
	if f.kind == kindManifestProto {
		var message v1pb.Manifest
		if err := proto.Unmarshal(f.data, &message); err != nil {
			return fmt.Errorf("is not a manifest: %w", err)
		}
		decoded, err := bundle.ManifestFromProto(&message)
		if err != nil {
			return fmt.Errorf("is not a manifest: %w", err)
		}
		m = *decoded
	} else if err := util.NewJSONDecoder(bytes.NewReader(f.data)).Decode(&m); err != nil {
		return fmt.Errorf("is not a manifest: %w", err)
	}
	if len(m.WasmResolvers) > 0 {
		return errors.New("names WebAssembly modules, which are not supported")
	}
	if n := len(m.FileRegoVersions); n > maxFileVersions {
		return fmt.Errorf("has %d entries in file_rego_versions, limit %d", n, maxFileVersions)
	}
	if m.Roots != nil {
		if n := len(*m.Roots); n > maxRoots {
			return fmt.Errorf("has %d roots, limit %d", n, maxRoots)
		}
		segments := 0
		for _, root := range *m.Roots {
			n := strings.Count(strings.Trim(root, "/"), "/") + 1
			if n > c.limits.Depth {
				return fmt.Errorf("has root %q, %d segments deep, limit %d", brief(root), n, c.limits.Depth)
			}
			segments += n
		}
		if segments > maxRootSegments {
			return fmt.Errorf("has roots of %d segments together, limit %d", segments, maxRootSegments)
		}
	}
	if deeper(m.Metadata, c.limits.Nesting) {
		return nestingError(c.limits.Nesting)
	}
	return nil
}

// digest hashes the sorted files. Lengths go before what they measure, so no
// two sets of files are written alike.
func (c *content) digest() [32]byte {
	h := sha256.New()
	var length [8]byte
	write := func(b []byte) {
		binary.BigEndian.PutUint64(length[:], uint64(len(b)))
		h.Write(length[:])
		h.Write(b)
	}
	for _, f := range c.files {
		write([]byte(f.path))
		write(f.data)
	}
	return [32]byte(h.Sum(nil))
}

// read has OPA read everything but the modules, which are parsed here with the
// options that OPA would use: one after the other, since one bundle has no claim
// to every core, and where a panic is an error of this bundle alone.
func (c *content) read(name string) (_ *bundle.Bundle, err error) {
	defer recoverTo(&err)
	b, err := bundle.NewCustomReader(&loader{files: c.files}).
		WithBundleName(name).
		WithSizeLimitBytes(c.limits.Expanded).
		WithProcessAnnotations(true).
		Read()
	if err != nil {
		return nil, err
	}

	var roots [][]string
	for _, root := range *b.Manifest.Roots {
		roots = append(roots, strings.Split(root, "/"))
	}
	opts := ast.ParserOptions{ProcessAnnotation: true}
	opts.RegoVersion = b.RegoVersion(opts.EffectiveRegoVersion())
	for _, f := range c.files {
		if f.kind != kindRego {
			continue
		}
		opts := opts
		version, err := b.RegoVersionForFile(f.path, opts.EffectiveRegoVersion())
		if err != nil {
			return nil, err
		}
		if version != ast.RegoUndefined {
			opts.RegoVersion = version
		}
		module, err := ast.ParseModuleWithOpts(f.path, util.ByteSliceToString(f.data), opts)
		if err != nil {
			return nil, err
		}
		if limit := c.limits.Nesting * 8; astDeeper(module, limit) {
			return nil, fmt.Errorf("%q has a rule or an expression nested deeper than %d", f.path, limit)
		}
		if !rootsPermit(roots, module.Package) {
			return nil, fmt.Errorf("%q is %q, which the manifest roots do not permit", f.path, brief(module.Package.String()))
		}
		b.Modules = append(b.Modules, bundle.ModuleFile{
			URL: f.path, Path: f.path, RelativePath: f.path, Raw: f.data, Parsed: module,
		})
	}
	return &b, nil
}

// rootsPermit reports whether one of the roots contains a package. OPA has
// trimmed the slashes off the roots.
func rootsPermit(roots [][]string, pkg *ast.Package) bool {
	segments, err := storage.NewPathForRef(pkg.Path)
	if err != nil {
		return false
	}
	return slices.ContainsFunc(roots, func(root []string) bool {
		if len(root) == 1 && root[0] == "" {
			return true
		}
		return len(root) <= len(segments) && slices.Equal(root, segments[:len(root)])
	})
}

// loader hands files to OPA's reader, all but the modules.
type loader struct {
	files []file
}

func (l *loader) NextFile() (*bundle.Descriptor, error) {
	for len(l.files) > 0 {
		f := l.files[0]
		l.files = l.files[1:]
		if f.kind != kindRego {
			// OPA's reader takes a bytes.Buffer as it is, without a copy.
			return bundle.NewDescriptor(f.path, f.path, bytes.NewBuffer(f.data)), nil
		}
	}
	return nil, io.EOF
}

func (l *loader) WithFilter(filter.LoaderFilter) bundle.DirectoryLoader         { return l }
func (l *loader) WithPathFormat(bundle.PathFormat) bundle.DirectoryLoader       { return l }
func (l *loader) WithSizeLimitBytes(int64) bundle.DirectoryLoader               { return l }
func (l *loader) WithFollowSymlinks(followSymlinks bool) bundle.DirectoryLoader { return l }

// refuse returns an error that wraps ErrRefused.
func refuse(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrRefused, fmt.Errorf(format, args...))
}

// refuseLong refuses for a reason that OPA gives. OPA quotes whole lines of the
// source, so a long reason is cut.
func refuseLong(err error) error {
	const limit = 4096
	if text := err.Error(); len(text) > limit {
		return refuse("%s…", strings.ToValidUTF8(text[:limit], ""))
	}
	return refuse("%w", err)
}

// recoverTo makes a panic of a decoder or of the parser an error.
func recoverTo(err *error) {
	if p := recover(); p != nil {
		*err = fmt.Errorf("cannot be read: panic: %s", brief(fmt.Sprint(p)))
	}
}

// brief cuts a text that a bundle's author chose, for use in an error.
func brief(s string) string {
	const limit = 200
	if len(s) <= limit {
		return s
	}
	return strings.ToValidUTF8(s[:limit], "") + "…"
}

// bytesText writes a size the way a person would configure it.
func bytesText(n int64) string {
	switch {
	case n >= 1<<20 && n%(1<<20) == 0:
		return fmt.Sprintf("%d MiB", n>>20)
	case n >= 1<<10 && n%(1<<10) == 0:
		return fmt.Sprintf("%d KiB", n>>10)
	}
	return fmt.Sprintf("%d bytes", n)
}
