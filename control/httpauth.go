package control

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strings"
	"time"
)

// Auth says who may ask a tenant over HTTP. Its zero value names nobody.
type Auth struct {
	JWT     *JWT     // nil: no token of an issuer is taken
	Tokens  []Token  // that are taken as they are
	MTLS    []string // patterns of the IDs of peers that may ask
	Headers *Headers // that a trusted peer sets; nil: none are believed
}

// None reports whether nobody is named.
func (a *Auth) None() bool {
	return a.JWT == nil && len(a.Tokens) == 0 && len(a.MTLS) == 0 && a.Headers == nil
}

// JWT says which signed tokens are taken: each has an issuer, an audience and a
// time at which it expires.
type JWT struct {
	Issuer     string
	Audiences  []string // one of which a token is for
	Algorithms []string // by which it may be signed

	JWKSURL string // of the issuer's public keys; "" where there is a Secret
	Secret  []byte // of the HS algorithms; nil where there is a JWKSURL

	Cookie  string        // that holds a token, too; "": none does
	Subject string        // the claim that names the subject
	Leeway  time.Duration // between the issuer's clock and ours
}

// Token is a secret by which a caller is known.
type Token struct {
	Subject string
	Type    string // of the subject
	Digest  [sha256.Size]byte
}

// Headers are those by which a trusted peer says who asks, in lower case.
type Headers struct {
	Subject string // holds the subject; "": none does
	Payload string // holds the claims of a token that was verified, in base64url; "": none does
	Claim   string // that names the subject in these
}

// Bounds of what is read.
const (
	minToken  = 16 // bytes of a token
	minSecret = 32 // bytes of a secret that signs
	maxLeeway = 5 * time.Minute
)

// Algorithms of signatures, and those that are taken where none are named.
var (
	publicAlgorithms = []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}
	secretAlgorithms = []string{"HS256", "HS384", "HS512"}

	defaultPublic = []string{"RS256", "ES256", "EdDSA"}
	defaultSecret = []string{"HS256"}
)

func (r *reader) auth(o object) Auth {
	var a Auth
	if o.has("jwt") {
		a.JWT = r.jwt(o.object("jwt"))
	}
	seen := map[[sha256.Size]byte]bool{}
	for _, t := range o.objects("tokens") {
		token := r.token(t)
		if seen[token.Digest] && token.Subject != "" {
			r.fault(t.path, "is the same token as another")
		}
		seen[token.Digest] = true
		a.Tokens = append(a.Tokens, token)
	}
	a.MTLS = o.list("mtls")
	for i, pattern := range a.MTLS {
		if pattern == "" {
			r.fault(fmt.Sprintf("%s[%d]", o.at("mtls"), i), "is empty")
		}
	}
	if o.has("headers") {
		a.Headers = r.headers(o.object("headers"))
	}
	o.end()
	return a
}

func (r *reader) token(o object) Token {
	t := Token{Subject: o.string("subject", ""), Type: o.string("type", "service")}
	text, digest := o.string("token", ""), o.string("sha256", "")
	o.end()
	if t.Subject == "" {
		r.fault(o.at("subject"), "is missing")
	}
	if t.Type == "" {
		r.fault(o.at("type"), "is empty")
	}
	switch {
	case (text == "") == (digest == ""):
		r.fault(o.path, "wants one of token and sha256")
	case digest != "":
		sum, err := hex.DecodeString(digest)
		if err != nil || len(sum) != sha256.Size {
			r.fault(o.at("sha256"), "is not a SHA-256 in hexadecimal")
			break
		}
		t.Digest = [sha256.Size]byte(sum)
	case len(text) < minToken:
		r.fault(o.at("token"), "has less than %d bytes", minToken)
	default:
		t.Digest = sha256.Sum256([]byte(text))
	}
	return t
}

func (r *reader) jwt(o object) *JWT {
	j := &JWT{
		Issuer:     o.string("issuer", ""),
		Audiences:  o.list("audiences"),
		Algorithms: o.list("algorithms"),
		JWKSURL:    o.string("jwks_url", ""),
		Secret:     []byte(o.string("secret", "")),
		Cookie:     o.string("cookie", ""),
		Subject:    o.string("subject", "sub"),
		Leeway:     o.seconds("leeway_seconds", 30*time.Second),
	}
	insecure := o.bool("allow_insecure")
	o.end()
	if j.Issuer == "" {
		r.fault(o.at("issuer"), "is missing")
	}
	if len(j.Audiences) == 0 || slices.Contains(j.Audiences, "") {
		r.fault(o.at("audiences"), "wants at least one audience, and none that is empty")
	}
	if j.Subject == "" {
		r.fault(o.at("subject"), "is empty")
	}
	if j.Leeway > maxLeeway {
		r.fault(o.at("leeway_seconds"), "is more than %d", int(maxLeeway.Seconds()))
	}
	if j.Cookie != "" && (!strings.HasPrefix(j.Cookie, "__Host-") || !isToken(j.Cookie)) {
		r.fault(o.at("cookie"), `is not the name of a cookie that begins with "__Host-"`)
	}
	known, def := publicAlgorithms, defaultPublic
	switch {
	case (j.JWKSURL == "") == (len(j.Secret) == 0):
		r.fault(o.path, "wants one of jwks_url and secret")
		return j
	case j.JWKSURL != "":
		j.Secret = nil
		if text := faultOfURL(j.JWKSURL, insecure); text != "" {
			r.fault(o.at("jwks_url"), "%s", text)
		}
	default:
		known, def = secretAlgorithms, defaultSecret
		if len(j.Secret) < minSecret {
			r.fault(o.at("secret"), "has less than %d bytes", minSecret)
		}
	}
	for i, name := range j.Algorithms {
		if !slices.Contains(known, name) {
			r.fault(fmt.Sprintf("%s[%d]", o.at("algorithms"), i), "%q is not one of %s", name, strings.Join(known, ", "))
		}
	}
	if len(j.Algorithms) == 0 {
		j.Algorithms = def
	}
	return j
}

// faultOfURL says what is wrong with the URL of keys; "": nothing. Whoever can
// change what it gives can make tokens, so it is https, or on this machine, or
// the operator says that it need not be.
func faultOfURL(s string, insecure bool) string {
	u, err := url.Parse(s)
	if err != nil || u.Host == "" || u.User != nil || u.Fragment != "" {
		return "is not a URL with a host and without a user or fragment"
	}
	ip := net.ParseIP(u.Hostname())
	local := u.Hostname() == "localhost" || ip != nil && ip.IsLoopback()
	switch {
	case u.Scheme == "https":
	case u.Scheme != "http":
		return "is neither https nor http"
	case !local && !insecure:
		return "is not https: allow_insecure allows that"
	}
	return ""
}

// reservedHeaders are those that say something else.
var reservedHeaders = []string{"authorization", "cookie", "host", "content-length", "transfer-encoding", "connection", "upgrade", "te", "trailer"}

func (r *reader) headers(o object) *Headers {
	h := &Headers{Claim: o.string("claim", "sub")}
	for key, field := range map[string]*string{"subject": &h.Subject, "payload": &h.Payload} {
		*field = strings.ToLower(o.string(key, ""))
		if *field != "" && (!isToken(*field) || slices.Contains(reservedHeaders, *field)) {
			r.fault(o.at(key), "%q is not the name of a header for that", *field)
		}
	}
	if h.Subject == "" && h.Payload == "" {
		r.fault(o.path, "wants subject, payload or both")
	}
	if h.Claim == "" {
		r.fault(o.at("claim"), "is empty")
	}
	o.end()
	return h
}

// cors returns the origins whose pages may ask.
func (r *reader) cors(o object) []string {
	origins := o.list("origins")
	for i, origin := range origins {
		if text := faultOfOrigin(origin); text != "" {
			r.fault(fmt.Sprintf("%s[%d]", o.at("origins"), i), "%q %s", origin, text)
		}
	}
	o.end()
	return origins
}

// faultOfOrigin says why no browser names an origin so; "": one does.
func faultOfOrigin(s string) string {
	if s == "*" || s == "null" {
		return "is not allowed: name each origin"
	}
	u, err := url.Parse(s)
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" || s != u.Scheme+"://"+u.Host || strings.ToLower(s) != s {
		return "is not an origin, like https://example.com"
	}
	if u.Port() == map[string]string{"https": "443", "http": "80"}[u.Scheme] && u.Port() != "" || strings.HasSuffix(u.Host, ":") {
		return "has the port that a browser leaves out"
	}
	if strings.Contains(u.Host, "*") {
		return "is a pattern: name each origin"
	}
	return ""
}

// isToken reports whether s is a token of HTTP.
func isToken(s string) bool {
	return s != "" && strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!#$%&'*+-.^_`|~") == ""
}
