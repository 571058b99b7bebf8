package httpserve

// Stats are figures of a Server at one moment.
type Stats struct {
	BodyBytes int64 // of request bodies that are being answered

	// Of permission lists: what those that are remembered take, how many streams of
	// events are open, and how many were asked for and were remembered, or had to
	// be waited for.
	ListBytes            int64
	Streams              int
	Remembered, Computed uint64
}

// Stats returns the figures of this moment.
func (s *Server) Stats() Stats {
	l := s.lists
	l.mu.Lock()
	defer l.mu.Unlock()
	return Stats{
		BodyBytes: s.memory.used.Load(),
		ListBytes: l.bytes, Streams: l.streams,
		Remembered: l.remembered, Computed: l.computed,
	}
}
