package plan

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"slices"
	"strings"
	"sync"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/metrics"
	"github.com/open-policy-agent/opa/v1/topdown"
)

// Bounds of what a Program remembers for tokens.
const (
	maxKeySets     = 64
	maxKeySetBytes = 1 << 20 // of the texts of keys together
	maxHeaders     = 256
	maxHeader      = 1 << 10 // bytes of an encoded header
)

// key is a public key for tokens.
type key struct {
	alg, kid string // "": it has none
	key      any    // nil: it is of a kind that is not known here
}

// keySets are the keys that texts have: certificates and public keys in PEM, JWK
// and sets of them. Where there are too many, those to forget are chosen at random.
type keySets struct {
	mu    sync.RWMutex
	known map[string][]key // :: text → keys
	bytes int              // of the texts
}

// get returns the keys of a text, and whether OPA takes it for one of keys.
func (s *keySets) get(m *machine, text string) ([]key, bool) {
	s.mu.RLock()
	keys, ok := s.known[text]
	s.mu.RUnlock()
	if ok {
		return keys, true
	}
	if keys = m.keysOf(text); keys == nil || !readByOPA(text) {
		return nil, false
	}
	if len(text) > maxKeySetBytes/4 {
		return keys, true
	}
	text = strings.Clone(text) // not what it is a part of
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.known == nil {
		s.known = make(map[string][]key)
	}
	if _, ok := s.known[text]; ok {
		return keys, true
	}
	for other := range s.known {
		if len(s.known) < maxKeySets && s.bytes+len(text) <= maxKeySetBytes {
			break
		}
		delete(s.known, other)
		s.bytes -= len(other)
	}
	s.known[text] = keys
	s.bytes += len(text)
	return keys, true
}

// readByOPA reports whether OPA reads a text as keys: it has an error else before
// it looks at the signature.
func readByOPA(text string) (ok bool) {
	defer func() {
		if recover() != nil {
			ok = false
		}
	}()
	operands := []*ast.Term{ast.StringTerm("e30.e30.AA"), ast.StringTerm(text)} // {}, signed by nobody
	err := topdown.GetBuiltin(ast.JWTVerifyES256.Name)(topdown.BuiltinContext{Metrics: metrics.NoOp()}, operands,
		func(*ast.Term) error { return nil })
	return err == nil
}

// keysOf returns the keys of a text that OPA reads as keys.
func (m *machine) keysOf(text string) []key {
	if block, rest := pem.Decode([]byte(text)); block != nil {
		if len(rest) > 0 {
			return nil
		}
		switch block.Type {
		case "CERTIFICATE":
			if cert, err := x509.ParseCertificate(block.Bytes); err == nil {
				return []key{{key: cert.PublicKey}}
			}
		case "PUBLIC KEY":
			if k, err := x509.ParsePKIXPublicKey(block.Bytes); err == nil {
				return []key{{key: k}}
			}
		}
		return nil
	}
	if m.env.JSON == nil {
		return nil
	}
	v, err := m.env.JSON([]byte(text))
	if err != nil {
		return nil
	}
	obj, ok := v.(ast.Object)
	if !ok {
		return nil
	}
	list := ast.NewArray(ast.NewTerm(obj))
	if set := obj.Get(ast.StringTerm("keys")); set != nil {
		if list, ok = set.Value.(*ast.Array); !ok || obj.Get(ast.StringTerm("kty")) != nil {
			return nil
		}
	}
	keys := make([]key, 0, list.Len())
	for i := range list.Len() {
		obj, ok := list.Elem(i).Value.(ast.Object)
		if !ok {
			return nil
		}
		// Keys for something else are none to OPA, whatever they are called.
		if k := jwkOf(obj); k.alg == "" || algorithms[k.alg] {
			keys = append(keys, k)
		}
	}
	return keys
}

// jwkOf reads a JWK (RFC 7517, 7518 section 6, 8037).
func jwkOf(obj ast.Object) key {
	member := func(name string) string {
		if t := obj.Get(ast.StringTerm(name)); t != nil {
			if s, ok := t.Value.(ast.String); ok {
				return string(s)
			}
		}
		return ""
	}
	number := func(name string) []byte {
		b, ok := bytesOf(member(name))
		if !ok {
			return nil
		}
		return b
	}
	k := key{alg: member("alg"), kid: member("kid")}
	if obj.Get(ast.StringTerm("d")) != nil {
		return k // a private one
	}
	switch member("kty") {
	case "RSA":
		n, e := number("n"), new(big.Int).SetBytes(number("e"))
		if len(n) > 0 && e.IsInt64() && 0 < e.Int64() && e.Int64() < 1<<31 {
			k.key = &rsa.PublicKey{N: new(big.Int).SetBytes(n), E: int(e.Int64())}
		}
	case "EC":
		curve := curves[member("crv")]
		x, y := number("x"), number("y")
		if curve == nil || len(x) != len(y) || len(x) != (curve.Params().BitSize+7)/8 {
			break
		}
		if public, err := ecdsa.ParseUncompressedPublicKey(curve, slices.Concat([]byte{4}, x, y)); err == nil {
			k.key = public
		}
	case "OKP":
		if x := number("x"); member("crv") == "Ed25519" && len(x) == ed25519.PublicKeySize {
			k.key = ed25519.PublicKey(x)
		}
	}
	return k
}

var curves = map[string]elliptic.Curve{"P-256": elliptic.P256(), "P-384": elliptic.P384(), "P-521": elliptic.P521()}

// algorithms are those of signatures that OPA knows.
var algorithms = map[string]bool{
	"RS256": true, "RS384": true, "RS512": true, "PS256": true, "PS384": true, "PS512": true,
	"ES256": true, "ES384": true, "ES512": true, "HS256": true, "HS384": true, "HS512": true, "EdDSA": true,
}

// tokenHeader is the header of a token, with what is a string in it.
type tokenHeader struct {
	term     *ast.Term
	alg, kid string
}

// tokenHeaders are headers of tokens that were verified: an issuer writes the same
// in all tokens of one key. There is room for so many, and then for no more.
type tokenHeaders struct {
	mu    sync.RWMutex
	known map[string]*tokenHeader // :: encoded → header
}

// get returns a header, and whether it was kept; nil where it is not plain.
func (hs *tokenHeaders) get(m *machine, encoded string) (h *tokenHeader, known bool) {
	hs.mu.RLock()
	h = hs.known[encoded]
	hs.mu.RUnlock()
	if h != nil {
		return h, true
	}
	obj := m.object(encoded)
	if obj == nil || obj.Get(keyEnc) != nil || obj.Get(keyCrit) != nil {
		return nil, false
	}
	h = &tokenHeader{term: ast.NewTerm(obj)}
	for _, k := range []*ast.Term{keyAlg, keyKid, keyTyp, keyCty} {
		v := obj.Get(k)
		if v == nil {
			continue
		}
		s, ok := v.Value.(ast.String)
		switch {
		case !ok:
			return nil, false
		case k == keyAlg:
			h.alg = string(s)
		case k == keyKid:
			h.kid = string(s)
		case k == keyCty && strings.EqualFold(string(s), "JWT"):
			return nil, false // the payload is a token
		}
	}
	return h, false
}

func (hs *tokenHeaders) keep(encoded string, h *tokenHeader) {
	if len(encoded) > maxHeader {
		return
	}
	encoded = strings.Clone(encoded)
	hs.mu.Lock()
	defer hs.mu.Unlock()
	if hs.known == nil {
		hs.known = make(map[string]*tokenHeader)
	}
	if len(hs.known) < maxHeaders {
		hs.known[encoded] = h
	}
}
