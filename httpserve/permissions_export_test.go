package httpserve

import (
	"maps"
	"slices"
)

// Remembered returns how many bytes, lists and streams there are.
func (s *Server) Remembered() (bytes int64, lists, streams int) {
	l := s.lists
	l.mu.Lock()
	defer l.mu.Unlock()
	sum := int64(0)
	for _, t := range l.tenants {
		sum += t.bytes
		lists += len(t.entries)
		if len(t.entries) == 0 && t.recent.Len() > 1 {
			panic("a tenant has entries that it does not know")
		}
	}
	if sum != l.bytes {
		panic("the bytes of the tenants are not those of all")
	}
	return l.bytes, lists, l.streams
}

// Forget forgets all lists.
func (s *Server) Forget() {
	s.lists.mu.Lock()
	all := slices.Collect(maps.Values(s.lists.tenants))
	s.lists.mu.Unlock()
	for _, t := range all {
		s.lists.forget(t)
	}
}
