package plan

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/lestrrat-go/jwx/v3/jwk"
	"github.com/lestrrat-go/jwx/v3/jws/jwsbb"
	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/metrics"
	"github.com/open-policy-agent/opa/v1/topdown"
	"github.com/open-policy-agent/opa/v1/topdown/builtins"
	"github.com/open-policy-agent/opa/v1/topdown/cache"
	"github.com/open-policy-agent/opa/v1/util"
)

// parseJSON parses as json.unmarshal does.
func parseJSON(text []byte) (ast.Value, error) {
	var x any
	if err := util.UnmarshalJSON(text, &x); err != nil {
		return nil, err
	}
	return ast.InterfaceToValue(x)
}

const tokenTime = 1_700_000_000

// signer makes tokens of one algorithm.
type signer struct {
	alg   string
	key   any
	texts []string // forms of the public key
}

// signers makes one for each algorithm.
func signers(t testing.TB) (all []signer) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, alg := range []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"} {
		all = append(all, signer{alg, rsaKey, textsOf(t, alg, rsaKey)})
	}
	for alg, curve := range map[string]elliptic.Curve{"ES256": elliptic.P256(), "ES384": elliptic.P384(), "ES512": elliptic.P521()} {
		k, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, signer{alg, k, textsOf(t, alg, k)})
	}
	all = append(all, signer{"EdDSA", edKey, textsOf(t, "EdDSA", edKey)})
	for _, alg := range []string{"HS256", "HS384", "HS512"} {
		all = append(all, signer{alg, []byte("a secret of the test that is long enough for all three"), nil})
	}
	return all
}

// textsOf returns the public key as certificate, in PEM, and in sets of keys.
func textsOf(t testing.TB, alg string, private crypto.Signer) []string {
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotAfter: time.Unix(4_000_000_000, 0)}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(private.Public())
	if err != nil {
		t.Fatal(err)
	}
	k, err := jwk.Import(private.Public())
	if err != nil {
		t.Fatal(err)
	}
	text := func(v any) string {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	bare := text(k)
	with := func(members string) string { return strings.TrimSuffix(bare, "}") + "," + members + "}" }
	const other = `{"kty":"oct","k":"c2VjcmV0","kid":"other","alg":"HS256"}`
	return []string{
		string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert})),
		string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public})),
		bare,
		with(`"kid":"one","alg":"` + alg + `"`),
		`{"keys":[` + other + "," + with(`"kid":"one"`) + `]}`,
		`{"keys":[` + with(`"kid":"two","alg":"`+alg+`"`) + "," + other + `]}`,
		with(`"kid":"one","alg":"RSA-OAEP"`),
		with(`"kid":1`),
		with(`"x5c":["no certificate"]`),
		strings.TrimSuffix(bare, "}") + `,"keys":[]}`,
		`{"keys":[` + with(`"kid":"one","alg":"RSA-OAEP"`) + "," + other + `]}`,
		`{"keys":[]}`,
		"no key",
		string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: public})),
	}
}

func (s *signer) sign(t testing.TB, header, payload string) string {
	text := encoded(header) + "." + encoded(payload)
	signature, err := jwsbb.Sign(s.key, s.alg, []byte(text), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return text + "." + base64.RawURLEncoding.EncodeToString(signature)
}

func encoded(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }

// sameAsRegistry compares what a native form of a builtin has told, if it has, with
// the registry.
func sameAsRegistry(n native, name string, terms []*ast.Term) (told bool, err error) {
	args := make([]operand, 0, len(terms))
	for _, t := range terms {
		args = append(args, operand{term: t})
	}
	m := &machine{env: Env{Time: time.Unix(tokenTime, 0), JSON: parseJSON}}
	got, ok := n(m, args)
	if !ok {
		return false, nil
	}
	var want *ast.Term
	bctx := topdown.BuiltinContext{Metrics: metrics.NoOp(), Time: ast.NumberTerm(json.Number(fmt.Sprint(tokenTime, "000000000")))}
	if err := topdown.GetBuiltin(name)(bctx, terms, func(v *ast.Term) error {
		want = v
		return nil
	}); err != nil {
		return true, fmt.Errorf("%s(%v): got %v, want error %v", name, terms, got, err)
	}
	if want == nil || want.String() != got.String() {
		return true, fmt.Errorf("%s(%v): got %v, want %v", name, terms, got, want)
	}
	return true, nil
}

var (
	tokenHeaderTexts = []string{
		`{"alg":"%s","typ":"JWT"}`, `{"alg":"%s","kid":"one"}`, `{"kid":"nobody","alg":"%s","more":[1]}`, `{"alg":"HS256","was":"%s"}`,
		`{"alg":"%s","kid":1}`, `{"alg":"%s","crit":["more"],"more":1}`, `{"alg":"%s","cty":"jwt"}`, `{"alg":"%s","cty":"text"}`,
		`{"alg":"none","was":"%s"}`, `{"was":"%s"}`, `{"alg":"%s","enc":"x"}`, `["%s"]`, `{"alg":"%s"} x`, `{"alg":"x","alg":"%s"}`,
	}
	tokenPayloads = []string{
		`{"iss":"me","aud":"you","exp":1700000001,"nbf":1699999999,"sub":"ä"}`, `{"iss":"me","aud":["they","you"],"exp":1700000000}`,
		`{"iss":"other","exp":1.7e9}`, `{"iss":1}`, `{"aud":{"you":1}}`, `{"aud":["you",1],"nbf":1700000001}`, `{"nbf":1700000000.0}`,
		`{"exp":"soon"}`, `{"nbf":"soon","aud":"you"}`, `{"exp":1700000000.5}`, `{}`, `[]`, `{"a":1,"a":2}`, `{"exp":null}`,
	}
	tokenConstraints = []string{
		`{}`, `{"aud":"you"}`, `{"iss":"me","aud":"you"}`, `{"aud":"you","time":1600000000000000000}`, `{"time":1700000000500000000}`, `{"time":0}`,
		`{"alg":"%s","aud":"you"}`, `{"alg":"ES256"}`, `{"iss":"","aud":""}`, `{"aud":["you"]}`, `{"time":-1}`, `{"time":"now"}`,
		`{"secret":"more"}`, `{"cert":""}`, `{"unknown":1}`, `{"secret":""}`,
	}
)

// The native forms for tokens tell what the registry's do, whatever the token, its
// key and its constraints.
func TestTokens(t *testing.T) {
	ts := new(tokens)
	told, asked := 0, 0
	try := func(name string, terms ...*ast.Term) {
		t.Helper()
		asked++
		ok, err := sameAsRegistry(ts.native(name), name, terms)
		if err != nil {
			t.Error(err)
		}
		if ok {
			told++
		}
	}
	for _, s := range signers(t) {
		texts := s.texts
		verify := "io.jwt.verify_" + strings.ToLower(s.alg)
		if s.alg == "EdDSA" {
			verify = ast.JWTVerifyEdDSA.Name
		}
		by := "cert"
		if texts == nil {
			texts, by = []string{string(s.key.([]byte)), "another secret", ""}, "secret"
		}
		good := ast.MustParseTerm(`{"aud":"you"}`)
		good.Value.(ast.Object).Insert(ast.StringTerm(by), ast.StringTerm(texts[0]))
		token := ast.StringTerm(s.sign(t, fmt.Sprintf(tokenHeaderTexts[0], s.alg), tokenPayloads[0]))
		before := told
		try(ast.JWTDecodeVerify.Name, token, good)
		try(verify, token, ast.StringTerm(texts[0]))
		if told != before+2 {
			t.Errorf("%s: the registry was asked about a good token", s.alg)
		}
		for i, header := range tokenHeaderTexts {
			header = fmt.Sprintf(header, s.alg)
			for j, payload := range tokenPayloads {
				if i > 1 && j > 2 {
					continue
				}
				token := s.sign(t, header, payload)
				tokens := []string{token}
				if j == 0 {
					dot, last := strings.IndexByte(token, '.'), strings.LastIndexByte(token, '.')
					tokens = append(tokens, token[:last+1], token[:last], token+".", token+"=", token+"\n", token[:dot]+token[dot+1:], "x"+token,
						token[:last+2]+token[last+3:], token[:last+1]+"AAAA", token[:dot+1]+encoded(`{"iss":"me","sub":"admin"}`)+token[last:], "", "a.b.c")
				}
				for k, text := range texts {
					if j > 0 && k > 0 {
						continue
					}
					for l, token := range tokens {
						if k > 0 && l > 0 {
							break
						}
						try(verify, ast.StringTerm(token), ast.StringTerm(text))
						try(ast.JWTVerifyES256.Name, ast.StringTerm(token), ast.StringTerm(text))
						try(ast.JWTDecode.Name, ast.StringTerm(token))
						for n, c := range tokenConstraints {
							if n > 3 && k > 0 {
								break
							}
							if strings.Contains(c, "%s") {
								c = fmt.Sprintf(c, s.alg)
							}
							own := ast.MustParseTerm(c)
							if own.Get(ast.StringTerm(by)) == nil {
								own.Value.(ast.Object).Insert(ast.StringTerm(by), ast.StringTerm(text))
							}
							try(ast.JWTDecodeVerify.Name, ast.StringTerm(token), own)
						}
					}
				}
			}
		}
	}
	t.Logf("%d of %d questions were answered", told, asked)
	if told < asked/50 {
		t.Errorf("%d of %d questions were answered, want more", told, asked)
	}
	if n := len(ts.keys.known); n > maxKeySets || n == 0 {
		t.Errorf("%d texts of keys are remembered", n)
	}
}

// What is remembered of keys and headers is bounded.
func TestTokenBounds(t *testing.T) {
	ts, m := new(tokens), &machine{env: Env{JSON: parseJSON}}
	for i := range 3 * maxKeySets {
		text := fmt.Sprintf(`{"keys":[{"kty":"oct","k":"c2VjcmV0","kid":"%d","note":"%s"}]}`, i, strings.Repeat("x", i*200))
		if keys, ok := ts.keys.get(m, text); !ok || len(keys) != 1 || keys[0].kid != fmt.Sprint(i) {
			t.Fatalf("got %v, %v", keys, ok)
		}
		if _, ok := ts.keys.get(m, "no key "+text); ok {
			t.Fatal("got keys of no key")
		}
	}
	bytes := 0
	for text := range ts.keys.known {
		bytes += len(text)
	}
	if len(ts.keys.known) > maxKeySets || bytes > maxKeySetBytes || bytes != ts.keys.bytes {
		t.Errorf("%d texts with %d bytes are remembered, %d are counted", len(ts.keys.known), bytes, ts.keys.bytes)
	}
	for i := range 2 * maxHeaders {
		ts.headers.keep(fmt.Sprint(i), &tokenHeader{})
	}
	ts.headers.keep(strings.Repeat("x", maxHeader+1), &tokenHeader{})
	if n := len(ts.headers.known); n != maxHeaders {
		t.Errorf("%d headers are remembered, want %d", n, maxHeaders)
	}
}

// A token is verified at the time of the evaluation, which is one, whatever was
// found out about it before.
func TestTokenTime(t *testing.T) {
	s := signer{alg: "HS256", key: []byte("secret")}
	token := s.sign(t, `{"alg":"HS256"}`, `{"exp":1700000000}`)
	p := programOf(t, `package t

p := valid if [valid, _, _] := io.jwt.decode_verify(input.token, {"secret": "secret"})
`, "data.t.p = result", map[string]any{})
	input := ast.NewObject(ast.Item(ast.StringTerm("token"), ast.StringTerm(token)))
	for _, at := range []int64{1_600_000_000, 1_700_000_001, 1_699_999_999, 1_700_000_000} {
		v, err := p.Eval(t.Context(), input, &Env{Time: time.Unix(at, 0), JSON: parseJSON})
		if err != nil || v != ast.Boolean(at < 1_700_000_000) {
			t.Errorf("at %d: got %v, %v", at, v, err)
		}
	}
}

// OPA's cache of verified tokens is used where it is enabled, and results that are
// given beforehand are taken.
func TestTokensOfOthers(t *testing.T) {
	s := signer{alg: "HS256", key: []byte("secret")}
	token := s.sign(t, `{"alg":"HS256"}`, `{}`)
	p := programOf(t, `package t

p := valid if [valid, _, _] := io.jwt.decode_verify(input.token, {"secret": "secret"})
`, "data.t.p = result", map[string]any{})
	input := ast.NewObject(ast.Item(ast.StringTerm("token"), ast.StringTerm(token)))

	on, entries := false, 10
	values := cache.NewInterQueryValueCache(t.Context(), &cache.Config{InterQueryBuiltinValueCache: cache.InterQueryBuiltinValueCacheConfig{
		NamedCacheConfigs: map[string]*cache.NamedValueCacheConfig{"io_jwt": {Disabled: &on, MaxNumEntries: &entries}},
	}})
	if v, err := p.Eval(t.Context(), input, &Env{JSON: parseJSON, InterQueryBuiltinValueCache: values}); err != nil || v != ast.Boolean(true) {
		t.Fatalf("got %v, %v", v, err)
	}
	key := ast.NewArray(ast.StringTerm(token), ast.MustParseTerm(`{"secret": "secret"}`))
	if _, ok := values.GetCache("io_jwt").Get(key); !ok {
		t.Error("the token is not in OPA's cache")
	}

	if ast.JWTDecodeVerify.IsNondeterministic() {
		results := builtins.NDBCache{}
		operands := ast.NewArray(ast.StringTerm(token), ast.MustParseTerm(`{"secret": "secret"}`))
		results.Put(ast.JWTDecodeVerify.Name, operands, ast.MustParseTerm(`[false, {}, {}]`).Value)
		if v, err := p.Eval(t.Context(), input, &Env{JSON: parseJSON, NDBuiltinCache: results}); err != nil || v != ast.Boolean(false) {
			t.Errorf("got %v, %v, want what was found before", v, err)
		}
	}
}

// FuzzTokens compares the native forms for tokens with the registry's on what the
// fuzzer makes of tokens that are signed.
func FuzzTokens(f *testing.F) {
	hs := signer{alg: "HS256", key: []byte("secret")}
	ed := signer{alg: "EdDSA", key: ed25519.NewKeyFromSeed(make([]byte, 32))}
	cert := textsOf(f, "EdDSA", ed.key.(ed25519.PrivateKey))[4]
	f.Add(`{"alg":"HS256","kid":"one"}`, `{"exp":1700000001}`, `{"secret":"secret","aud":"you"}`, uint8(0), uint8(0))
	for i, h := range tokenHeaderTexts {
		f.Add(fmt.Sprintf(h, "EdDSA"), tokenPayloads[i], strings.ReplaceAll(tokenConstraints[i], "%s", "EdDSA"), uint8(i), uint8(1))
	}
	names := tokenNames()
	ts := new(tokens)
	f.Fuzz(func(t *testing.T, header, payload, constraints string, cut, form uint8) {
		s := &hs
		if form%2 == 1 {
			s = &ed
		}
		token := s.sign(t, header, payload)
		if form&4 != 0 && len(token) > 0 {
			at := int(cut) % len(token)
			token = token[:at] + token[at+1:]
		}
		c, err := ast.ParseTerm(constraints)
		if err != nil || !ast.IsConstant(c.Value) {
			return
		}
		if obj, ok := c.Value.(ast.Object); ok && form&8 != 0 {
			obj.Insert(ast.StringTerm("cert"), ast.StringTerm(cert))
		}
		for _, key := range []string{cert, constraints} {
			for _, name := range names {
				terms := []*ast.Term{ast.StringTerm(token), ast.StringTerm(key)}
				switch name {
				case ast.JWTDecodeVerify.Name:
					terms[1] = c
				case ast.JWTDecode.Name:
					terms = terms[:1]
				}
				if _, err := sameAsRegistry(ts.native(name), name, terms); err != nil {
					t.Error(err)
				}
			}
		}
	})
}
