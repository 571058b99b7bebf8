package httpserve

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/lestrrat-go/jwx/v3/jws/jwsbb"
	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/control"
	"github.com/gatehouse-authz/gatehouse/policy"
)

// Bounds of a token, in bytes.
const (
	maxToken = 16 << 10
	maxKeyID = 256
)

// issued returns the caller that a signed token is for: a JWT in its compact form
// (RFC 7519), of the tenant's issuer, for one of its audiences, signed by one of
// its algorithms, and within its time.
//
// Which key verifies follows from the tenant's settings and the token's kid alone:
// jku, x5u, jwk and x5c are not read. A header that has crit or b64 asks for what
// we do not do.
func (s *Server) issued(ctx context.Context, settings *control.JWT, token string) (*Caller, error) {
	if len(token) > maxToken {
		return nil, bad("token is larger than 16 KiB")
	}
	signed, signature, ok := cutLast(token, '.')
	head, body, ok2 := strings.Cut(signed, ".")
	if !ok || !ok2 || strings.Contains(body, ".") {
		return nil, bad("token has not three parts")
	}
	header, err := partOf(head)
	if err != nil {
		return nil, &badCredential{fmt.Errorf("header: %w", err)}
	}
	alg, ok := textOf(header, "alg")
	if !ok || !slices.Contains(settings.Algorithms, alg) {
		return nil, bad("algorithm is not one of the tenant's")
	}
	for _, name := range []string{"crit", "b64"} {
		if header.Get(ast.StringTerm(name)) != nil {
			return nil, bad("header has " + name)
		}
	}
	kid, _ := textOf(header, "kid")
	if len(kid) > maxKeyID {
		return nil, bad("key ID is too long")
	}
	raw, err := base64.RawURLEncoding.Strict().DecodeString(signature)
	if err != nil {
		return nil, bad("signature is not base64url")
	}
	if err := s.verify(ctx, settings, alg, kid, []byte(signed), raw); err != nil {
		return nil, err
	}
	claims, err := partOf(body)
	if err != nil {
		return nil, &badCredential{fmt.Errorf("claims: %w", err)}
	}
	return callerIn(claims, settings, time.Now())
}

func cutLast(s string, c byte) (before, after string, ok bool) {
	i := strings.LastIndexByte(s, c)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+1:], true
}

// maxTried bounds the keys that are tried for a token that names none.
const maxTried = 8

// verify returns an error unless one of the keys that a token may be signed with
// has signed it.
func (s *Server) verify(ctx context.Context, settings *control.JWT, alg, kid string, signed, signature []byte) error {
	if settings.Secret != nil {
		if err := jwsbb.Verify(settings.Secret, alg, signed, signature); err != nil {
			return bad("signature is not good")
		}
		return nil
	}
	keys, err := s.keys.find(ctx, settings.JWKSURL, alg, kid)
	if err != nil {
		return err
	}
	for _, key := range keys[:min(len(keys), maxTried)] {
		if jwsbb.Verify(key, alg, signed, signature) == nil {
			return nil
		}
	}
	return bad("signature is not good")
}

// callerIn returns the caller that verified claims name at that time.
func callerIn(claims ast.Object, settings *control.JWT, now time.Time) (*Caller, error) {
	if issuer, ok := textOf(claims, "iss"); !ok || issuer != settings.Issuer {
		return nil, bad("issuer is not the tenant's")
	}
	if !isFor(claims, settings.Audiences) {
		return nil, bad("audience is not one of the tenant's")
	}
	exp, ok, err := timeOf(claims, "exp")
	switch {
	case err != nil:
		return nil, err
	case !ok:
		return nil, bad("token never expires")
	case !now.Before(exp.Add(settings.Leeway)):
		return nil, bad("token has expired")
	}
	nbf, ok, err := timeOf(claims, "nbf")
	if err != nil {
		return nil, err
	}
	if ok && now.Add(settings.Leeway).Before(nbf) {
		return nil, bad("token is not valid yet")
	}
	subject, err := subjectOf(claims, settings.Subject)
	if err != nil {
		return nil, err
	}
	return &Caller{Kind: ByJWT, Type: typeUser, Subject: subject, Claims: claims, Expiry: exp}, nil
}

var errObject = errors.New("is not an object")

// partOf returns the object that a part of a token is.
func partOf(part string) (ast.Object, error) {
	text, err := base64.RawURLEncoding.Strict().DecodeString(part)
	if err != nil {
		return nil, err
	}
	v, err := policy.ParseJSON(text, nil)
	if err != nil {
		return nil, err
	}
	obj, ok := v.(ast.Object)
	if !ok {
		return nil, errObject
	}
	return obj, nil
}

// payloadOf returns the claims that a trusted peer's header holds: those of a
// token that it has verified, in base64url with padding or without.
func payloadOf(value string) (ast.Object, error) {
	if len(value) > maxToken {
		return nil, bad("payload is larger than 16 KiB")
	}
	claims, err := partOf(strings.TrimRight(value, "="))
	if err != nil {
		return nil, &badCredential{fmt.Errorf("payload: %w", err)}
	}
	return claims, nil
}

// textOf returns a member that is a string.
func textOf(obj ast.Object, key string) (string, bool) {
	t := obj.Get(ast.StringTerm(key))
	if t == nil {
		return "", false
	}
	s, ok := t.Value.(ast.String)
	return string(s), ok
}

// subjectOf returns the subject that a claim names.
func subjectOf(claims ast.Object, claim string) (string, error) {
	subject, ok := textOf(claims, claim)
	if !ok || !isSubject(subject) {
		return "", &badCredential{errSubject}
	}
	return subject, nil
}

// isFor reports whether the token is for one of these audiences: aud is a string
// or a list of strings (RFC 7519 section 4.1.3).
func isFor(claims ast.Object, audiences []string) bool {
	if aud, ok := textOf(claims, "aud"); ok {
		return slices.Contains(audiences, aud)
	}
	t := claims.Get(ast.StringTerm("aud"))
	if t == nil {
		return false
	}
	list, ok := t.Value.(*ast.Array)
	if !ok {
		return false
	}
	found := false
	for i := range list.Len() {
		s, ok := list.Elem(i).Value.(ast.String)
		if !ok {
			return false
		}
		found = found || slices.Contains(audiences, string(s))
	}
	return found
}

// maxTime bounds the times of claims, in seconds since 1970: the year 9999.
const maxTime = 253402300799

// timeOf returns the time that a claim names, and whether there is one.
func timeOf(claims ast.Object, claim string) (time.Time, bool, error) {
	t := claims.Get(ast.StringTerm(claim))
	if t == nil {
		return time.Time{}, false, nil
	}
	n, ok := t.Value.(ast.Number)
	if !ok {
		return time.Time{}, false, bad(claim + " is not a number")
	}
	seconds, ok := n.Float64()
	if !ok || seconds < 0 || seconds > maxTime {
		return time.Time{}, false, bad(claim + " is not a time")
	}
	return time.Unix(int64(seconds), 0), true, nil
}
