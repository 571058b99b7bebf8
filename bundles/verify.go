package bundles

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/open-policy-agent/opa/v1/bundle"
	"github.com/open-policy-agent/opa/v1/keys"
)

const signaturesPath = "/.signatures.json"

// ReadVerified is Read for bundles that must be signed, with OPA's format and
// configuration of signatures. The bundle is refused unless all of this holds:
//
//   - It has one signatures file, at its root, with one signature.
//   - The signature is by the key that verify names or, if it names none, by
//     the one of its keys that the signature names; with the algorithm of that
//     key, as the signature's header says too.
//   - Its scope is that of verify or, if that has none, of the key.
//   - Each file is signed with its path and a hash of at least 224 bits (not
//     MD5, not SHA-1), whether or not OPA reads it, and each that is signed is
//     there; but for those that match verify's exclude_files.
//   - The JSON documents hold no more than OPA hashes: a data document is one
//     value, and a manifest names each of its keys once.
//
// Delta bundles are refused, whatever verify says. Keys without a public key
// or secret, or without an algorithm of OPA's, are not used; if none is left,
// every bundle is refused. With a nil verify it is Read.
func ReadVerified(r io.Reader, name string, limits Limits, verify *bundle.VerificationConfig) (*Bundle, error) {
	return newContent(limits.orDefault(), usable(verify)).readFrom(context.Background(), r, name)
}

// usable returns a copy of verify with the keys that can verify. OPA would take
// a missing secret for an empty one.
func usable(verify *bundle.VerificationConfig) *bundle.VerificationConfig {
	if verify == nil {
		return nil
	}
	public := make(map[string]*keys.Config, len(verify.PublicKeys))
	for id, key := range verify.PublicKeys {
		if key != nil && key.Key != "" && keys.IsSupportedAlgorithm(key.Algorithm) {
			own := *key
			public[id] = &own
		}
	}
	return bundle.NewVerificationConfig(public, verify.KeyID, verify.Scope, slices.Clone(verify.Exclude))
}

// verifyFiles verifies the signature, and the files by it.
func (c *content) verifyFiles() (err error) {
	defer recoverTo(&err)
	var signatures []file
	for _, f := range c.files {
		if f.kind == kindSignatures {
			signatures = append(signatures, f)
		}
	}
	switch {
	case len(signatures) == 0:
		return errors.New("it is not signed, and keys are configured")
	case len(signatures) > 1:
		return fmt.Errorf("it has more than one signatures file: %q and %q", signatures[0].path, signatures[1].path)
	case signatures[0].path != signaturesPath:
		return fmt.Errorf("its signatures file is %q, not %q", signatures[0].path, signaturesPath)
	}
	signed, err := verifySignature(signatures[0].data, c.verify)
	if err != nil {
		return fmt.Errorf("its signature: %w", err)
	}
	for _, f := range c.files {
		if f.kind == kindSignatures {
			continue
		}
		name := strings.TrimPrefix(f.path, "/")
		if excluded(c.verify, name) {
			continue
		}
		if err := verifyFile(name, f, signed); err != nil {
			return fmt.Errorf("its signature: %w", err)
		}
	}
	maps.DeleteFunc(signed, func(name string, _ bundle.FileInfo) bool { return excluded(c.verify, name) })
	if len(signed) > 0 {
		return fmt.Errorf("its signature: %d files are signed and not there, %q among them", len(signed), brief(slices.Min(slices.Collect(maps.Keys(signed)))))
	}
	return nil
}

// verifySignature returns the files that are signed, by path without a leading
// slash.
func verifySignature(doc []byte, verify *bundle.VerificationConfig) (map[string]bundle.FileInfo, error) {
	var signatures bundle.SignaturesConfig
	if err := json.Unmarshal(doc, &signatures); err != nil {
		return nil, fmt.Errorf("%q: %w", signaturesPath, err)
	}
	switch signatures.Plugin {
	case "", "_default": // OPA's own verifier
	default:
		return nil, fmt.Errorf("it is made for a plugin, %q", brief(signatures.Plugin))
	}
	signatures.Plugin = ""
	signed, err := bundle.VerifyBundleSignature(signatures, verify)
	if err != nil {
		return nil, err
	}

	// OPA verifies with the algorithm of the key and does not look at the
	// header. One that says something else was made for another verifier.
	header, claims, _ := strings.Cut(signatures.Signatures[0], ".")
	claims, _, _ = strings.Cut(claims, ".")
	var h struct {
		Algorithm string          `json:"alg"`
		KeyID     string          `json:"kid"`
		Critical  json.RawMessage `json:"crit"`
	}
	var p struct {
		KeyID string `json:"keyid"`
	}
	if err := errors.Join(decodePart(header, &h), decodePart(claims, &p)); err != nil {
		return nil, err
	}
	key := verify.PublicKeys[cmp.Or(verify.KeyID, h.KeyID, p.KeyID)]
	if key == nil || h.Algorithm != key.Algorithm {
		return nil, fmt.Errorf("its header names algorithm %q, which is not that of the key", brief(h.Algorithm))
	}
	if h.Critical != nil {
		return nil, errors.New("its header has critical extensions")
	}
	return signed, nil
}

func decodePart(part string, v any) error {
	data, err := base64.RawURLEncoding.DecodeString(part)
	if err != nil {
		return err
	}
	return json.Unmarshal(data, v)
}

// excluded reports whether a file need not be signed. A pattern matches the
// whole path, as with OPA; one that is malformed matches nothing.
func excluded(verify *bundle.VerificationConfig, name string) bool {
	return slices.ContainsFunc(verify.Exclude, func(pattern string) bool {
		ok, err := path.Match(pattern, name)
		return ok && err == nil
	})
}

// verifyFile verifies one file, and takes it out of those that are signed.
func verifyFile(name string, f file, signed map[string]bundle.FileInfo) error {
	switch bundle.HashingAlgorithm(signed[name].Algorithm) {
	case bundle.MD5, bundle.SHA1:
		return fmt.Errorf("%q is signed with a hash of %s, which can be forged", name, signed[name].Algorithm)
	}
	// OPA hashes what a document says, not its bytes. Its readers of JSON take
	// the first value of several, and merge what a manifest says twice under
	// one key; the hash is then not of what is read.
	switch {
	case f.kind == kindJSON && !json.Valid(f.data):
		return fmt.Errorf("%q is not one JSON document", name)
	case f.kind == kindManifest && bundle.IsStructuredDoc(name):
		if err := checkUnique(f.data); err != nil {
			return fmt.Errorf("%q %w", name, err)
		}
	}
	return bundle.VerifyBundleFile(name, *bytes.NewBuffer(f.data), signed)
}

// checkUnique returns an error unless a text is one JSON document in which no
// object has a key twice.
func checkUnique(doc []byte) error {
	if !json.Valid(doc) {
		return errors.New("is not one JSON document")
	}
	type level struct {
		keys  map[string]bool // nil: an array
		value bool            // a key has been read, its value has not
	}
	var stack []level
	dec := json.NewDecoder(bytes.NewReader(doc))
	dec.UseNumber()
	for {
		token, err := dec.Token()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if token == json.Delim('}') || token == json.Delim(']') {
			stack = stack[:len(stack)-1]
			continue
		}
		if n := len(stack); n > 0 && stack[n-1].keys != nil {
			top := &stack[n-1]
			if !top.value {
				key := token.(string)
				if top.keys[key] {
					return fmt.Errorf("has the key %q twice", brief(key))
				}
				top.keys[key], top.value = true, true
				continue
			}
			top.value = false
		}
		switch token {
		case json.Delim('{'):
			stack = append(stack, level{keys: map[string]bool{}})
		case json.Delim('['):
			stack = append(stack, level{})
		}
	}
}
