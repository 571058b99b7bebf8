package plan

import (
	"crypto"
	"crypto/hmac"
	"encoding/base64"
	"encoding/hex"
	"slices"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
)

// tokens are the native forms of the builtins for tokens, which follow those of
// OPA's registry (topdown/tokens.go) step by step as far as the signature of a token
// is good. The registry is asked where it is not, and where there is anything that
// is not plain: what has an error there, what is nested, critical or padded, keys of
// other kinds, and all tokens where OPA's cache of verified tokens is enabled.
type tokens struct {
	keys    keySets
	headers tokenHeaders
}

// native returns the native form of a builtin for tokens, or nil.
func (ts *tokens) native(name string) native {
	switch name {
	case ast.JWTDecodeVerify.Name:
		return ts.decodeVerify
	case ast.JWTDecode.Name:
		return ts.decode
	}
	if h, ok := secretHashes[name]; ok {
		return func(m *machine, a []operand) (*ast.Term, bool) { return ts.verifySecret(m, a, h) }
	}
	if v, ok := keyVerifiers[name]; ok {
		return func(m *machine, a []operand) (*ast.Term, bool) { return ts.verifyKey(m, a, v) }
	}
	return nil
}

// tokenNames are the builtins that have a native form here.
func tokenNames() []string {
	names := []string{ast.JWTDecodeVerify.Name, ast.JWTDecode.Name}
	for name := range secretHashes {
		names = append(names, name)
	}
	for name := range keyVerifiers {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// token is one in three parts.
type token struct{ header, payload, signature string }

// maxToken is the longest token that is looked at here, in bytes.
const maxToken = 64 << 10

func tokenOf(t *ast.Term) (tk token, ok bool) {
	s, ok := t.Value.(ast.String)
	if !ok || len(s) > maxToken {
		return tk, false
	}
	header, rest, ok := strings.Cut(string(s), ".")
	if !ok {
		return tk, false
	}
	payload, signature, ok := strings.Cut(rest, ".")
	return token{header, payload, signature}, ok && strings.IndexByte(signature, '.') < 0
}

// signed returns what the signature is of.
func (tk *token) signed(t *ast.Term) []byte {
	return []byte(t.Value.(ast.String)[:len(tk.header)+1+len(tk.payload)])
}

// bytesOf decodes base64url without padding, other than which nothing is plain.
func bytesOf(s string) ([]byte, bool) {
	if strings.ContainsAny(s, "=\r\n") {
		return nil, false
	}
	b, err := base64.RawURLEncoding.DecodeString(s)
	return b, err == nil
}

// object returns the JSON object that a part of a token is, or nil.
func (m *machine) object(part string) ast.Object {
	if m.env.JSON == nil {
		return nil
	}
	text, ok := bytesOf(part)
	if !ok {
		return nil
	}
	v, err := m.env.JSON(text)
	if err != nil {
		return nil
	}
	obj, _ := v.(ast.Object)
	return obj
}

// remembersTokens reports whether OPA's cache of verified tokens is enabled.
func (m *machine) remembersTokens() bool {
	c := m.env.InterQueryBuiltinValueCache
	return c != nil && c.GetCache("io_jwt") != nil
}

var unverified = ast.ArrayTerm(ast.InternedTerm(false), ast.InternedEmptyObject, ast.InternedEmptyObject)

// The keys of tokens and of constraints for them.
var (
	keyIss  = ast.StringTerm("iss")
	keyAud  = ast.StringTerm("aud")
	keyExp  = ast.StringTerm("exp")
	keyNbf  = ast.StringTerm("nbf")
	keyCty  = ast.StringTerm("cty")
	keyCrit = ast.StringTerm("crit")
	keyEnc  = ast.StringTerm("enc")
	keyAlg  = ast.StringTerm("alg")
	keyKid  = ast.StringTerm("kid")
	keyTyp  = ast.StringTerm("typ")
)

// constraints are what a token must meet.
type constraints struct {
	cert, secret, alg, iss, aud string
	time                        float64 // in nanoseconds
}

// constraintsOf reads constraints that are plain: with one key, a secret or a
// certificate.
func constraintsOf(m *machine, v ast.Value) (c constraints, ok bool) {
	obj, ok := v.(ast.Object)
	if !ok {
		return c, false
	}
	c.time = -1
	keys := 0
	odd := obj.Until(func(k, v *ast.Term) bool {
		name, ok := k.Value.(ast.String)
		if !ok {
			return true
		}
		if name == "time" {
			n, ok := v.Value.(ast.Number)
			if !ok {
				return true
			}
			c.time, ok = n.Float64()
			return !ok || c.time < 0
		}
		s, ok := v.Value.(ast.String)
		switch name {
		case "cert":
			c.cert = string(s)
			keys++
		case "secret":
			c.secret = string(s)
			keys++
		case "alg":
			c.alg = string(s)
		case "iss":
			c.iss = string(s)
		case "aud":
			c.aud = string(s)
		default:
			return true
		}
		return !ok
	})
	if c.time == -1 {
		c.time = float64(m.now())
	}
	return c, !odd && keys == 1 && (c.cert == "") != (c.secret == "")
}

func (ts *tokens) decodeVerify(m *machine, a []operand) (*ast.Term, bool) {
	text := a[0].load(m)
	tk, ok := tokenOf(text)
	if !ok || m.remembersTokens() {
		return nil, false
	}
	c, ok := constraintsOf(m, a[1].load(m).Value)
	if !ok {
		return nil, false
	}
	var keys []key
	if c.cert != "" {
		if keys, ok = ts.keys.get(m, c.cert); !ok {
			return nil, false
		}
	}
	header, known := ts.headers.get(m, tk.header)
	if header == nil || c.alg != "" && c.alg != header.alg {
		return nil, false
	}
	signature, ok := bytesOf(tk.signature)
	if !ok {
		return nil, false
	}
	by := signatures[header.alg]
	switch {
	case by == nil:
		return nil, false
	case c.cert != "":
		ok = verifiedBy(keys, header, by, tk.signed(text), signature)
	default:
		ok = by.verify([]byte(c.secret), tk.signed(text), signature)
	}
	if !ok {
		return nil, false
	}
	if !known {
		ts.headers.keep(tk.header, header)
	}
	payload := m.object(tk.payload)
	if payload == nil {
		return nil, false
	}
	if meets, ok := c.met(payload); !meets || !ok {
		return unverified, ok
	}
	return ast.ArrayTerm(termTrue, header.term, ast.NewTerm(payload)), true
}

// met reports whether the claims of a token meet what is asked of them, and
// whether that can be told here.
func (c *constraints) met(claims ast.Object) (meets, ok bool) {
	if c.iss != "" {
		iss := claims.Get(keyIss)
		if iss == nil {
			return false, true
		}
		s, ok := iss.Value.(ast.String)
		if !ok || string(s) != c.iss {
			return false, ok
		}
	}
	if aud := claims.Get(keyAud); aud != nil {
		if !c.audience(aud.Value) {
			return false, true
		}
	} else if c.aud != "" {
		return false, true
	}
	exp, nbf := claims.Get(keyExp), claims.Get(keyNbf)
	if exp == nil && nbf == nil {
		return true, true
	}
	now := ast.FloatNumberTerm(c.time / 1e9)
	if exp != nil {
		n, ok := exp.Value.(ast.Number)
		if !ok || now.Value.Compare(n) != -1 {
			return false, ok
		}
	}
	if nbf != nil {
		n, ok := nbf.Value.(ast.Number)
		if !ok || now.Value.Compare(n) == -1 {
			return false, ok
		}
	}
	return true, true
}

func (c *constraints) audience(aud ast.Value) bool {
	is := func(t *ast.Term) bool {
		s, ok := t.Value.(ast.String)
		return ok && string(s) == c.aud
	}
	if s, ok := aud.(ast.String); ok {
		return string(s) == c.aud
	}
	list, ok := aud.(*ast.Array)
	return ok && list.Until(is)
}

// verifiedBy reports whether one of the keys for a token verifies it: the one that
// the token names, if there is one of that name.
func verifiedBy(keys []key, h *tokenHeader, by *signatureOf, signed, signature []byte) bool {
	if h.kid != "" {
		for i := range keys {
			if keys[i].kid == h.kid {
				return by.verify(keys[i].key, signed, signature)
			}
		}
	}
	for i := range keys {
		if (keys[i].alg == "" || keys[i].alg == h.alg) && by.verify(keys[i].key, signed, signature) {
			return true
		}
	}
	return false
}

func (ts *tokens) decode(m *machine, a []operand) (*ast.Term, bool) {
	tk, ok := tokenOf(a[0].load(m))
	if !ok {
		return nil, false
	}
	header := m.object(tk.header)
	if header == nil || header.Get(keyEnc) != nil || header.Get(keyCty) != nil {
		return nil, false
	}
	payload := m.object(tk.payload)
	if payload == nil {
		return nil, false
	}
	signature, ok := bytesOf(tk.signature)
	if !ok {
		return nil, false
	}
	return ast.ArrayTerm(ast.NewTerm(header), ast.NewTerm(payload), ast.StringTerm(hex.EncodeToString(signature))), true
}

// secretHashes are the builtins that verify by a secret.
var secretHashes = map[string]crypto.Hash{ // :: name → hash of the signature
	ast.JWTVerifyHS256.Name: crypto.SHA256,
	ast.JWTVerifyHS384.Name: crypto.SHA384,
	ast.JWTVerifyHS512.Name: crypto.SHA512,
}

func (ts *tokens) verifySecret(m *machine, a []operand, h crypto.Hash) (*ast.Term, bool) {
	text := a[0].load(m)
	tk, ok := tokenOf(text)
	if !ok || m.remembersTokens() {
		return nil, false
	}
	secret, ok := a[1].load(m).Value.(ast.String)
	if !ok {
		return nil, false
	}
	signature, ok := bytesOf(tk.signature)
	if !ok {
		return nil, false
	}
	mac := hmac.New(h.New, []byte(secret))
	mac.Write(tk.signed(text))
	return truth(hmac.Equal(signature, mac.Sum(nil))), true
}

// keyVerifiers are the builtins that verify by a public key.
var keyVerifiers = map[string]*signatureOf{
	ast.JWTVerifyRS256.Name: signatures["RS256"],
	ast.JWTVerifyRS384.Name: signatures["RS384"],
	ast.JWTVerifyRS512.Name: signatures["RS512"],
	ast.JWTVerifyPS256.Name: signatures["PS256"],
	ast.JWTVerifyPS384.Name: signatures["PS384"],
	ast.JWTVerifyPS512.Name: signatures["PS512"],
	ast.JWTVerifyES256.Name: signatures["ES256"],
	ast.JWTVerifyES384.Name: signatures["ES384"],
	ast.JWTVerifyES512.Name: signatures["ES512"],
	ast.JWTVerifyEdDSA.Name: signatures["EdDSA"],
}

func (ts *tokens) verifyKey(m *machine, a []operand, by *signatureOf) (*ast.Term, bool) {
	text := a[0].load(m)
	tk, ok := tokenOf(text)
	if !ok || m.remembersTokens() {
		return nil, false
	}
	cert, ok := a[1].load(m).Value.(ast.String)
	if !ok {
		return nil, false
	}
	keys, ok := ts.keys.get(m, string(cert))
	if !ok {
		return nil, false
	}
	signature, ok := bytesOf(tk.signature)
	if !ok {
		return nil, false
	}
	header, known := ts.headers.get(m, tk.header)
	if header == nil || !verifiedBy(keys, header, by, tk.signed(text), signature) {
		return nil, false
	}
	if !known {
		ts.headers.keep(tk.header, header)
	}
	return termTrue, true
}
