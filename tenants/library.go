package tenants

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"
	"runtime"
	"sync"
	"weak"

	"golang.org/x/sync/singleflight"

	"github.com/gatehouse-authz/gatehouse/bundles"
	"github.com/gatehouse-authz/gatehouse/policy"
)

// content is one bundle's content, ready to be compiled.
type content struct {
	digest digest
	part   *policy.Part
	size   int64 // of its archive, in bytes
}

func (c content) equal(d content) bool { return c.digest == d.digest }

type digest [sha256.Size]byte

// library keeps one of each: parts by their content, policies by the content
// and the options they are compiled with. What no tenant uses is collected: the
// library itself holds nothing alive.
type library struct {
	parts    shelf[policy.Part]
	policies shelf[policy.Policy]
	prints   bool // policies are compiled with print

	// turns has room for as many as prepare or compile at once: more would
	// not be faster, and each may take many times the memory of its bundle.
	turns chan struct{}
}

func newLibrary(turns int) *library { return &library{turns: make(chan struct{}, turns)} }

func (l *library) turn() (end func()) {
	l.turns <- struct{}{}
	return func() { <-l.turns }
}

// maxPatched bounds what a bundle may take in memory after a delta, in bytes.
const maxPatched = 1 << 30

// prepare returns the content of b, which may be a delta to base.
func (l *library) prepare(b *bundles.Bundle, base content) (content, error) {
	part, err := l.parts.get(b.Digest, func() (*policy.Part, error) {
		defer l.turn()()
		if b.Delta {
			return base.part.Patch(b.Bundle, maxPatched)
		}
		return policy.Prepare(b.Bundle)
	})
	return content{b.Digest, part, b.Size}, err
}

// compile returns the policy of an instance with these contents.
func (l *library) compile(in *instance, contents []content) (*policy.Policy, error) {
	opts := in.options()
	opts.Print = opts.Print || l.prints
	named := make([]policy.Named, len(contents))
	h := sha256.New()
	for i, c := range contents {
		named[i] = policy.Named{Name: in.settings.Bundles[i].Name, Part: c.part}
		hashString(h, named[i].Name)
		h.Write(c.digest[:])
	}
	for _, list := range [][]string{opts.Entries, opts.Optional, opts.AllowHeaders} {
		hashString(h, fmt.Sprint(len(list)))
		for _, s := range list {
			hashString(h, s)
		}
	}
	hashString(h, fmt.Sprint(opts.Network))
	hashString(h, string(opts.Evaluator))
	return l.policies.get(digest(h.Sum(nil)), func() (*policy.Policy, error) {
		defer l.turn()()
		return policy.Compile(named, opts)
	})
}

// document returns the policy that answers what the discovery bundle c says.
func (l *library) document(c content, decision string, network bool) (*policy.Policy, error) {
	defer l.turn()()
	return policy.Compile([]policy.Named{{Name: "discovery", Part: c.part}}, policy.Options{Entries: []string{decision}, Network: network})
}

// hashString hashes s with its length, so that no two lists hash alike.
func hashString(h hash.Hash, s string) {
	h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(s))))
	h.Write([]byte(s))
}

// shelf holds values by digest for as long as somebody else uses them.
type shelf[T any] struct {
	making singleflight.Group
	mu     sync.Mutex
	byKey  map[digest]weak.Pointer[T] // guarded by mu
}

// get returns the value of key, made by make where there is none: once,
// however many ask at the same time.
func (s *shelf[T]) get(key digest, make func() (*T, error)) (*T, error) {
	if v := s.find(key); v != nil {
		return v, nil
	}
	v, err, _ := s.making.Do(string(key[:]), func() (any, error) {
		if v := s.find(key); v != nil {
			return v, nil
		}
		v, err := make()
		if err != nil {
			return nil, err
		}
		s.put(key, v)
		return v, nil
	})
	if err != nil {
		return nil, err
	}
	return v.(*T), nil
}

func (s *shelf[T]) find(key digest) *T {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.byKey[key].Value()
}

func (s *shelf[T]) put(key digest, v *T) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byKey == nil {
		s.byKey = map[digest]weak.Pointer[T]{}
	}
	s.byKey[key] = weak.Make(v)
	runtime.AddCleanup(v, s.drop, key)
}

// drop forgets key, unless it holds a new value by now.
func (s *shelf[T]) drop(key digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byKey[key].Value() == nil {
		delete(s.byKey, key)
	}
}

func (s *shelf[T]) len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.byKey)
}
