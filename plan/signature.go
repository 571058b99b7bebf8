package plan

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/hmac"
	"crypto/rsa"
	_ "crypto/sha256" // for crypto.SHA256
	_ "crypto/sha512"
	"math/big"
)

// signatureOf is one kind of signature.
type signatureOf struct {
	hash crypto.Hash // 0: what is signed is not hashed
	kind signatureKind
	size int // of the parts of one of an elliptic curve, in bytes
}

type signatureKind int

const (
	secretSignature signatureKind = iota
	pkcsSignature
	pssSignature
	curveSignature
	edwardsSignature
)

var signatures = map[string]*signatureOf{ // :: algorithm → its signatures
	"HS256": {crypto.SHA256, secretSignature, 0},
	"HS384": {crypto.SHA384, secretSignature, 0},
	"HS512": {crypto.SHA512, secretSignature, 0},
	"RS256": {crypto.SHA256, pkcsSignature, 0},
	"RS384": {crypto.SHA384, pkcsSignature, 0},
	"RS512": {crypto.SHA512, pkcsSignature, 0},
	"PS256": {crypto.SHA256, pssSignature, 0},
	"PS384": {crypto.SHA384, pssSignature, 0},
	"PS512": {crypto.SHA512, pssSignature, 0},
	"ES256": {crypto.SHA256, curveSignature, 32},
	"ES384": {crypto.SHA384, curveSignature, 48},
	"ES512": {crypto.SHA512, curveSignature, 66},
	"EdDSA": {0, edwardsSignature, 0},
}

// verify reports whether a signature is good. It is never good where OPA would not
// find it so: signatures of OPA may be of another curve, or have another salt.
func (s *signatureOf) verify(key any, signed, signature []byte) bool {
	switch s.kind {
	case secretSignature:
		k, ok := key.([]byte)
		if !ok {
			return false
		}
		mac := hmac.New(s.hash.New, k)
		mac.Write(signed)
		return hmac.Equal(signature, mac.Sum(nil))
	case pkcsSignature:
		k, ok := key.(*rsa.PublicKey)
		return ok && rsa.VerifyPKCS1v15(k, s.hash, s.digest(signed), signature) == nil
	case pssSignature:
		k, ok := key.(*rsa.PublicKey)
		return ok && rsa.VerifyPSS(k, s.hash, s.digest(signed), signature, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil
	case curveSignature:
		k, ok := key.(*ecdsa.PublicKey)
		if !ok || (k.Curve.Params().BitSize+7)/8 != s.size || len(signature) != 2*s.size {
			return false
		}
		r, sum := new(big.Int).SetBytes(signature[:s.size]), new(big.Int).SetBytes(signature[s.size:])
		return ecdsa.Verify(k, s.digest(signed), r, sum)
	case edwardsSignature:
		k, ok := key.(ed25519.PublicKey)
		return ok && len(k) == ed25519.PublicKeySize && ed25519.Verify(k, signed, signature)
	}
	return false
}

func (s *signatureOf) digest(signed []byte) []byte {
	h := s.hash.New()
	h.Write(signed)
	return h.Sum(nil)
}
