package httpserve

import (
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/control"
	"github.com/gatehouse-authz/gatehouse/peers"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// Caller is who asks, as a credential that was verified says.
type Caller struct {
	Kind    Kind
	Type    string     // of the subject: "user", or what the tenant's token says; "" for nobody
	Subject string     // "" for nobody
	Claims  ast.Object // of the token; nil: there are none
	Expiry  time.Time  // of the credential, which may lie back by the leeway; zero: it has none
}

// Kind is how a caller is known.
type Kind string

// The kinds of callers.
const (
	ByNothing Kind = "nothing" // asks from this machine a tenant that anybody may ask
	ByJWT     Kind = "jwt"     // has a token of the tenant's issuer
	ByToken   Kind = "token"   // has a secret of the tenant's
	ByPeer    Kind = "mtls"    // has a certificate
	ByHeaders Kind = "headers" // is vouched for by a trusted peer
)

// Types of subjects where the credential has none.
const (
	typeUser    = "user"
	typeService = "service"
)

// Value returns the caller as policies see it: {type, id, claims}, without what
// there is not.
func (c *Caller) Value() ast.Object {
	obj := ast.NewObject(
		ast.Item(ast.StringTerm("type"), ast.StringTerm(c.Type)),
		ast.Item(ast.StringTerm("id"), ast.StringTerm(c.Subject)),
	)
	if c.Claims != nil {
		obj.Insert(ast.StringTerm("claims"), ast.NewTerm(c.Claims))
	}
	return obj
}

// maxSubject bounds the name of a subject, in bytes.
const maxSubject = 1 << 10

// Challenges of answers to callers that are not known (RFC 6750 section 3).
const (
	challenge        = `Bearer realm="gatehouse"`
	challengeInvalid = `Bearer realm="gatehouse", error="invalid_token"`
)

// The faults of credentials. What exactly is wrong with a token is for the log.
var (
	errNobody  = &fault{http.StatusUnauthorized, codeUnauthorized, "a credential is needed", challenge, 0}
	errBad     = &fault{http.StatusUnauthorized, codeUnauthorized, "the credential is not good", challengeInvalid, 0}
	errTwo     = &fault{http.StatusUnauthorized, codeUnauthorized, "the request has more than one credential", challengeInvalid, 0}
	errKeys    = &fault{http.StatusServiceUnavailable, codeUnavailable, "the keys of the issuer are not there", "", 5 * time.Second}
	errSubject = errors.New("subject is not a text of 1 to 1024 bytes")
)

// badCredential is why a credential is refused: errBad to the client, the reason
// to the log.
type badCredential struct{ reason error }

func (e *badCredential) Error() string   { return "credential refused: " + e.reason.Error() }
func (e *badCredential) Unwrap() []error { return []error{errBad, e.reason} }

func bad(reason string) error { return &badCredential{errors.New(reason)} }

// callerOf returns who asks. A credential that is there must be good, and two
// that are there must name the same subject.
func (s *Server) callerOf(r *request) (*Caller, error) {
	auth := &r.Offers.Auth
	if auth.None() {
		return s.anybody(r)
	}
	named, err := s.vouched(r, auth.Headers)
	if err != nil {
		return nil, err
	}
	own, err := s.shown(r, auth)
	if err != nil {
		return nil, err
	}
	switch {
	case named != nil && own != nil && named.Subject != own.Subject:
		return nil, errTwo
	case own != nil:
		return own, nil
	case named != nil:
		return named, nil
	}
	id := peers.Of(r.TLS)
	switch {
	case id == "" || !peers.MatchAny(auth.MTLS, id):
		return nil, errNobody
	case !r.safe() && !r.ownPage():
		return nil, errOrigin
	}
	return &Caller{Kind: ByPeer, Type: typeService, Subject: id}, nil
}

// anybody is who asks a tenant that does not want to know, on a listener of this
// machine. A page in a browser here could ask too, under a name of its own that
// it has made an address of this machine.
func (s *Server) anybody(r *request) (*Caller, error) {
	if !r.ownPage() {
		return nil, errOrigin
	}
	if r.RemoteAddr == "" || !strings.Contains(r.RemoteAddr, ":") { // no browser reaches a socket
		return &Caller{Kind: ByNothing}, nil
	}
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	if host != "localhost" && net.ParseIP(strings.Trim(host, "[]")) == nil && !r.place.trusted.has(r.Request) &&
		(r.place.url == nil || r.Host != r.place.url.Host) {
		return nil, errHost
	}
	return &Caller{Kind: ByNothing}, nil
}

// shown returns the caller whose token the request has in its Authorization
// header or in the tenant's cookie; nil: it has none.
func (s *Server) shown(r *request, auth *control.Auth) (*Caller, error) {
	if auth.JWT == nil && len(auth.Tokens) == 0 {
		return nil, nil
	}
	token, err := bearer(r.Header)
	if err != nil {
		return nil, err
	}
	cookie := ""
	if auth.JWT != nil && auth.JWT.Cookie != "" {
		if cookie, err = cookieOf(r.Request, auth.JWT.Cookie); err != nil {
			return nil, err
		}
	}
	switch {
	case token != "" && cookie != "" && token != cookie:
		return nil, errTwo
	case token == "" && cookie == "":
		return nil, nil
	case token == "" && !r.safe() && !r.ownPage():
		return nil, errOrigin
	case token == "":
		return s.issued(r.Context(), auth.JWT, cookie)
	}
	if c := known(auth.Tokens, token); c != nil {
		return c, nil
	}
	if auth.JWT == nil {
		return nil, bad("token is not one of the tenant's")
	}
	return s.issued(r.Context(), auth.JWT, token)
}

// bearer returns the token of the Authorization header; "": there is none.
func bearer(h http.Header) (string, error) {
	values := h.Values("Authorization")
	if len(values) == 0 {
		return "", nil
	}
	if len(values) > 1 {
		return "", &fault{http.StatusBadRequest, codeInvalid, "the request has more than one authorization header",
			`Bearer realm="gatehouse", error="invalid_request"`, 0}
	}
	scheme, token, ok := strings.Cut(values[0], " ")
	token = strings.TrimLeft(token, " ")
	if !ok || !strings.EqualFold(scheme, "bearer") || token == "" || strings.ContainsAny(token, " ,") {
		return "", bad("authorization is not a bearer token")
	}
	return token, nil
}

// cookieOf returns the value of a cookie; "": there is none.
func cookieOf(r *http.Request, name string) (string, error) {
	cookies := r.CookiesNamed(name)
	for _, c := range cookies {
		if c.Value != cookies[0].Value {
			return "", errTwo
		}
	}
	if len(cookies) == 0 {
		return "", nil
	}
	return cookies[0].Value, nil
}

// known returns the caller whose secret the token is; nil: it is nobody's. It
// takes as long whichever it is.
func known(tokens []control.Token, token string) *Caller {
	digest := sha256.Sum256([]byte(token))
	found := -1
	for i := range tokens {
		if subtle.ConstantTimeCompare(digest[:], tokens[i].Digest[:]) == 1 {
			found = i
		}
	}
	if found < 0 {
		return nil
	}
	return &Caller{Kind: ByToken, Type: tokens[found].Type, Subject: tokens[found].Subject}
}

// vouched returns the caller that a trusted peer names in its headers; nil: there
// is none. Headers of others are not read.
func (s *Server) vouched(r *request, headers *control.Headers) (*Caller, error) {
	if headers == nil || !r.place.trusted.has(r.Request) {
		return nil, nil
	}
	subject, err := single(r.Header, headers.Subject)
	if err != nil {
		return nil, err
	}
	payload, err := single(r.Header, headers.Payload)
	if err != nil {
		return nil, err
	}
	if payload == "" {
		if subject == "" {
			return nil, nil
		}
		if !isSubject(subject) {
			return nil, &badCredential{errSubject}
		}
		return &Caller{Kind: ByHeaders, Type: typeUser, Subject: subject}, nil
	}
	claims, err := payloadOf(payload)
	if err != nil {
		return nil, err
	}
	c := &Caller{Kind: ByHeaders, Type: typeUser, Claims: claims}
	if c.Subject, err = subjectOf(claims, headers.Claim); err != nil {
		return nil, err
	}
	if subject != "" && subject != c.Subject {
		return nil, errTwo
	}
	exp, ok, err := timeOf(claims, "exp")
	switch {
	case err != nil:
		return nil, err
	case ok && !time.Now().Before(exp):
		return nil, bad("the payload's token has expired")
	case ok:
		c.Expiry = exp
	}
	return c, nil
}

// single returns the one value of a header; "": it has none.
func single(h http.Header, name string) (string, error) {
	if name == "" {
		return "", nil
	}
	values := h.Values(name)
	if len(values) == 0 {
		return "", nil
	}
	if len(values) > 1 {
		return "", errTwo
	}
	return values[0], nil
}

// isSubject reports whether s can be the name of a subject.
func isSubject(s string) bool {
	if s == "" || len(s) > maxSubject {
		return false
	}
	return !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f || r == '\uFFFD' })
}

// maxOpen bounds the tenants that openLog remembers.
const maxOpen = 1000

// openLog tells the operator of tenants that would be open, once for each state
// of each.
type openLog struct {
	mu   sync.Mutex
	told map[tenants.ID]string // :: tenant → state; guarded by mu
}

func (l *openLog) warn(log *slog.Logger, id tenants.ID, state string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.told[id] == state {
		return
	}
	if l.told == nil || len(l.told) >= maxOpen {
		l.told = map[tenants.ID]string{}
	}
	l.told[id] = state
	log.Warn("tenant refused over HTTP: it would be open on a listener that is not of this machine alone; it needs plugins.gatehouse_http.auth", "tenant", id)
}
