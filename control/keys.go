package control

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/open-policy-agent/opa/v1/bundle"
	"github.com/open-policy-agent/opa/v1/keys"
)

// readKeys reads the keys: those with a key verify bundles, and one with a
// private_key signs what a service's oauth2 credentials ask a token with.
func (r *reader) readKeys(o object) map[string]*keys.Config {
	all := make(map[string]*keys.Config, len(o.m))
	for _, id := range slices.Sorted(maps.Keys(o.m)) {
		k := o.object(id)
		key := &keys.Config{
			Key:        k.string("key", ""),
			PrivateKey: k.string("private_key", ""),
			Algorithm:  k.string("algorithm", "RS256"),
			Scope:      k.string("scope", ""),
		}
		k.end()
		switch {
		case id == "":
			r.fault(k.path, "a key has no ID")
		case key.Key == "" && key.PrivateKey == "":
			r.fault(k.at("key"), "is missing")
		case !keys.IsSupportedAlgorithm(key.Algorithm):
			r.fault(k.at("algorithm"), "not supported: %q", key.Algorithm)
		case key.Key != "":
			if err := checkKey(key); err != nil {
				r.fault(k.at("key"), "%s", err)
			}
		}
		all[id] = key
	}
	return all
}

// noteKeys notes the private keys that nothing uses.
func (r *reader) noteKeys(at string) {
	for _, id := range slices.Sorted(maps.Keys(r.keys)) {
		if r.keys[id].PrivateKey != "" && !r.signers[id] {
			r.note(join(join(at, id), "private_key"), "has no effect: no service signs with it, and bundles are verified with key")
		}
	}
}

// checkKey returns an error unless the key is one of its algorithm. Its text
// has nothing of the key in it.
func checkKey(key *keys.Config) error {
	block, _ := pem.Decode([]byte(key.Key))
	if strings.HasPrefix(key.Algorithm, "HS") {
		// Whoever has a public key could sign with it as a secret.
		if block != nil {
			return fmt.Errorf("is a %s, and %s takes a secret", block.Type, key.Algorithm)
		}
		return nil
	}
	if block == nil {
		return fmt.Errorf("is not PEM, which %s takes", key.Algorithm)
	}
	public, err := publicKey(block)
	if err != nil {
		return err
	}
	switch public := public.(type) {
	case *rsa.PublicKey:
		if key.Algorithm[:2] == "RS" || key.Algorithm[:2] == "PS" {
			return nil
		}
	case *ecdsa.PublicKey:
		if key.Algorithm[:2] != "ES" {
			break
		}
		if curve := map[string]elliptic.Curve{"ES256": elliptic.P256(), "ES384": elliptic.P384(), "ES512": elliptic.P521()}[key.Algorithm]; public.Curve != curve {
			return fmt.Errorf("is a key on curve %s, and %s takes %s", public.Curve.Params().Name, key.Algorithm, curve.Params().Name)
		}
		return nil
	}
	return fmt.Errorf("is not a key that %s takes", key.Algorithm)
}

// publicKey reads what OPA can verify with. A private key verifies too.
func publicKey(block *pem.Block) (any, error) {
	var private any
	var err error
	switch block.Type {
	case "RSA PUBLIC KEY":
		public, err := x509.ParsePKCS1PublicKey(block.Bytes)
		if err != nil {
			return nil, errors.New("is not an RSA public key")
		}
		return public, nil
	case "PUBLIC KEY":
		public, err := x509.ParsePKIXPublicKey(block.Bytes)
		if err != nil {
			return nil, errors.New("is not a public key")
		}
		return public, nil
	case "CERTIFICATE":
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, errors.New("is not a certificate")
		}
		return certificate.PublicKey, nil
	case "RSA PRIVATE KEY":
		private, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	case "EC PRIVATE KEY":
		private, err = x509.ParseECPrivateKey(block.Bytes)
	case "PRIVATE KEY":
		private, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	default:
		return nil, fmt.Errorf("is PEM of a kind that is no key: %q", block.Type)
	}
	if err != nil {
		return nil, errors.New("is not a private key")
	}
	switch private := private.(type) {
	case *rsa.PrivateKey:
		return &private.PublicKey, nil
	case *ecdsa.PrivateKey:
		return &private.PublicKey, nil
	}
	return nil, nil
}

// signing reads how a bundle is verified; nil: there are no keys for it.
func (r *reader) signing(b object) *bundle.VerificationConfig {
	o := b.object("signing")
	id, scope := o.string("keyid", ""), o.string("scope", "")
	exclude := o.list("exclude_files")
	for i, pattern := range exclude {
		if _, err := path.Match(pattern, ""); err != nil {
			r.fault(fmt.Sprintf("%s[%d]", o.at("exclude_files"), i), "is not a pattern")
		}
	}
	if o.bool("allow_unsigned_delta_bundles") {
		r.note(o.at("allow_unsigned_delta_bundles"), "has no effect here: delta bundles are refused")
	}
	o.end()
	verify := r.verification(id, scope, exclude)
	switch {
	case o.m == nil:
	case verify == nil:
		r.fault(o.path, "there are no keys to verify with")
	case id != "" && len(verify.PublicKeys) == 0:
		r.fault(o.at("keyid"), "no key %q to verify with", id)
	}
	return verify
}

// verification returns what bundles are verified with: one key or, if id is
// empty, any that a signature names. It is nil where none is there at all;
// where there is one, every bundle must be signed.
func (r *reader) verification(id, scope string, exclude []string) *bundle.VerificationConfig {
	public := make(map[string]*keys.Config, len(r.keys))
	for i, key := range r.keys {
		if key.Key != "" {
			public[i] = &keys.Config{Key: key.Key, Algorithm: key.Algorithm, Scope: key.Scope}
		}
	}
	if len(public) == 0 {
		return nil
	}
	if id != "" {
		maps.DeleteFunc(public, func(i string, _ *keys.Config) bool { return i != id })
	}
	return bundle.NewVerificationConfig(public, id, scope, exclude)
}

// identity hashes what sets one from others, in a form that does not change
// from one start to the next.
func identity(parts ...any) string {
	text, err := json.Marshal(parts)
	if err != nil {
		panic(err) // maps, strings and numbers
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])
}
