package httpserve

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/lestrrat-go/jwx/v3/jwk"
)

// Bounds of the keys of issuers.
const (
	keysFresh   = 5 * time.Minute  // after that they are fetched again, beside the requests
	keysOld     = time.Hour        // after that requests wait for the fetch,
	keysStale   = 24 * time.Hour   // and after that they are used no more where it fails
	keysRetry   = 5 * time.Second  // between two fetches where there are no keys that can be used
	keysUnknown = 30 * time.Second // between two fetches for key IDs that are not known
	keysTime    = 5 * time.Second  // for one fetch
	keysBytes   = 1 << 20
	keysCount   = 100  // in one set
	keysSets    = 1000 // that are remembered; the one not used for longest goes first
	minRSABits  = 2048
	maxRSABits  = 16384
)

// keyring holds the keys of issuers, by their URL. They are fetched when they are
// needed, once however many wait; one that an issuer has taken back is gone at the
// next fetch. Keys that cannot be fetched again stay for keysStale.
type keyring struct {
	client *http.Client

	mu   sync.Mutex
	sets map[string]*keyset // :: URL → keys; guarded by mu
}

// keyset is what one URL gives.
type keyset struct {
	url    string
	client *http.Client

	mu      sync.Mutex
	used    time.Time     // guarded by keyring.mu
	keys    []verifyKey   // those that were fetched last; nil: none were yet; guarded by mu
	fetched time.Time     // when they were; guarded by mu
	tried   time.Time     // when a fetch was begun last; guarded by mu
	running chan struct{} // closed when the fetch that runs has ended; nil: none runs; guarded by mu
}

// verifyKey is one public key.
type verifyKey struct {
	id        string // "": it has none
	algorithm string // "": any that fits
	key       crypto.PublicKey
}

func newKeyring(client *http.Client) *keyring {
	if client == nil {
		client = &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	}
	return &keyring{client: client, sets: map[string]*keyset{}}
}

// set returns the keys of a URL.
func (k *keyring) set(url string) *keyset {
	k.mu.Lock()
	defer k.mu.Unlock()
	set := k.sets[url]
	if set == nil {
		if len(k.sets) >= keysSets {
			oldest := ""
			for url, set := range k.sets {
				if oldest == "" || set.used.Before(k.sets[oldest].used) {
					oldest = url
				}
			}
			delete(k.sets, oldest)
		}
		set = &keyset{url: url, client: k.client}
		k.sets[url] = set
	}
	set.used = time.Now()
	return set
}

// find returns the keys that may have signed by the algorithm under the key ID,
// which may be none: at least one. The error is errKeys where it cannot be told,
// or that of a bad credential.
func (k *keyring) find(ctx context.Context, url, algorithm, id string) ([]crypto.PublicKey, error) {
	set := k.set(url)
	keys, wait := set.current(time.Now())
	if wait != nil {
		if err := ended(ctx, wait); err != nil {
			return nil, err
		}
		keys, _ = set.current(time.Now())
	}
	if keys == nil {
		return nil, errKeys
	}
	if found := fitting(keys, algorithm, id); len(found) > 0 {
		return found, nil
	}
	// The issuer may have a new key since.
	if wait := set.again(time.Now()); wait != nil {
		if err := ended(ctx, wait); err != nil {
			return nil, err
		}
		keys, _ = set.current(time.Now())
		if found := fitting(keys, algorithm, id); len(found) > 0 {
			return found, nil
		}
	}
	return nil, bad("the issuer has no such key")
}

// ended waits for a fetch.
func ended(ctx context.Context, running <-chan struct{}) error {
	select {
	case <-running:
		return nil
	case <-ctx.Done():
		return errKeys
	}
}

// current returns the keys that may be used now; nil: there are none. Where a
// fetch may give better ones that are worth waiting for, wait is closed when it
// has ended.
func (s *keyset) current(now time.Time) (keys []verifyKey, wait <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	age := now.Sub(s.fetched)
	switch {
	case s.keys == nil || age > keysStale:
		return nil, s.fetch(now, keysRetry)
	case age > keysOld:
		return s.keys, s.fetch(now, keysRetry)
	case age > keysFresh:
		s.fetch(now, keysUnknown)
	}
	return s.keys, nil
}

// again has the keys fetched for a key ID that is not among them; nil: they were
// not long ago.
func (s *keyset) again(now time.Time) <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.fetch(now, keysUnknown)
}

// fetch begins a fetch unless the last one was begun less than interval ago. It
// returns what is closed when the one that runs has ended; nil: none runs. s.mu is
// held.
func (s *keyset) fetch(now time.Time, interval time.Duration) <-chan struct{} {
	if s.running != nil {
		return s.running
	}
	if !s.tried.IsZero() && now.Sub(s.tried) < interval {
		return nil
	}
	running := make(chan struct{})
	s.running, s.tried = running, now
	go func() {
		keys, err := s.get()
		s.mu.Lock()
		defer s.mu.Unlock()
		if err == nil {
			s.keys, s.fetched = keys, time.Now()
		}
		s.running = nil
		close(running)
	}()
	return running
}

// get fetches the keys.
func (s *keyset) get() (keys []verifyKey, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("reading keys: panic: %v", r)
		}
	}()
	ctx, cancel := context.WithTimeout(context.Background(), keysTime)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/jwk-set+json, application/json")
	resp, err := s.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("status is %d", resp.StatusCode)
	}
	text, err := io.ReadAll(io.LimitReader(resp.Body, keysBytes+1))
	if err != nil {
		return nil, err
	}
	if len(text) > keysBytes {
		return nil, fmt.Errorf("keys are larger than %d bytes", keysBytes)
	}
	return keysIn(text)
}

// keysIn reads a set of keys (RFC 7517 section 5). Those that nothing can be
// verified with here are left out, secret ones too.
func keysIn(text []byte) ([]verifyKey, error) {
	set, err := jwk.Parse(text, jwk.WithIgnoreParseError(true))
	if err != nil {
		return nil, err
	}
	if set.Len() > keysCount {
		return nil, fmt.Errorf("set has %d keys, limit %d", set.Len(), keysCount)
	}
	keys := []verifyKey{}
	for i := range set.Len() {
		jwkKey, ok := set.Key(i)
		if !ok {
			continue
		}
		if use, ok := jwkKey.KeyUsage(); ok && use != "sig" {
			continue
		}
		if ops, ok := jwkKey.KeyOps(); ok && !slices.Contains(ops, jwk.KeyOpVerify) {
			continue
		}
		var raw any
		if err := jwk.Export(jwkKey, &raw); err != nil {
			continue
		}
		key := verifyKey{key: raw}
		key.id, _ = jwkKey.KeyID()
		if alg, ok := jwkKey.Algorithm(); ok {
			key.algorithm = alg.String()
		}
		if usable(key.key) {
			keys = append(keys, key)
		}
	}
	if len(keys) == 0 {
		return nil, errors.New("set has no key to verify with")
	}
	return keys, nil
}

// usable reports whether a key is one that we verify with.
func usable(key crypto.PublicKey) bool {
	switch key := key.(type) {
	case *rsa.PublicKey:
		bits := key.N.BitLen()
		return bits >= minRSABits && bits <= maxRSABits && key.E >= 3
	case *ecdsa.PublicKey, ed25519.PublicKey:
		return true
	}
	return false
}

// fitting returns the keys of that ID, or else those without one, that the
// algorithm takes. A token without an ID may be signed by any.
func fitting(keys []verifyKey, algorithm, id string) []crypto.PublicKey {
	var named, nameless []crypto.PublicKey
	for _, key := range keys {
		if key.algorithm != "" && key.algorithm != algorithm || !takes(algorithm, key.key) {
			continue
		}
		switch {
		case id == "" || key.id == id:
			named = append(named, key.key)
		case key.id == "":
			nameless = append(nameless, key.key)
		}
	}
	if len(named) > 0 {
		return named
	}
	return nameless
}

// curves :: algorithm → the curve of its keys
var curves = map[string]elliptic.Curve{"ES256": elliptic.P256(), "ES384": elliptic.P384(), "ES512": elliptic.P521()}

// takes reports whether a key is of the kind that the algorithm takes. A secret
// is none: no public key is ever used as one.
func takes(algorithm string, key crypto.PublicKey) bool {
	switch key := key.(type) {
	case *rsa.PublicKey:
		return algorithm[:2] == "RS" || algorithm[:2] == "PS"
	case *ecdsa.PublicKey:
		return curves[algorithm] != nil && key.Curve == curves[algorithm]
	case ed25519.PublicKey:
		return algorithm == "EdDSA"
	}
	return false
}
