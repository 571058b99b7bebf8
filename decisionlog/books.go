package decisionlog

// reason is why an event was dropped.
type reason uint8

// The reasons for which events are dropped.
const (
	notDropped   reason = iota
	dropFull            // the buffer had no room
	dropRate            // more decisions a second than the tenant logs
	dropPolicy          // the policy's drop rule said so
	dropFilter          // the drop or mask rule failed, or gave no mask
	dropTooLarge        // larger than a chunk may be
	dropEncoding        // a value that JSON cannot say
	dropRejected        // a sink refused it for good
	dropRetired         // the tenant was retired, and a sink did not take it in time
	dropShutdown        // not delivered when the process had to end
	reasons      int    = iota
)

var reasonNames = [reasons]string{
	"", "buffer_full", "rate_limit", "policy", "filter_error", "too_large", "encoding", "rejected", "retired", "shutdown",
}

// books count the events of a log, or of many. They do not lock; their owner does.
type books struct {
	recorded  uint64
	delivered uint64
	dropped   [reasons]uint64
}

func (b *books) add(o *books) {
	b.recorded += o.recorded
	b.delivered += o.delivered
	for i, n := range o.dropped {
		b.dropped[i] += n
	}
}

func (b *books) sub(o *books) {
	b.recorded -= o.recorded
	b.delivered -= o.delivered
	for i, n := range o.dropped {
		b.dropped[i] -= n
	}
}

func (b *books) allDropped() uint64 {
	var all uint64
	for _, n := range b.dropped {
		all += n
	}
	return all
}

// Books count events. At any instant Recorded is Delivered, and Dropped in all,
// and Buffered.
type Books struct {
	Recorded  uint64
	Delivered uint64
	Dropped   map[string]uint64 // :: reason → events; reasons without events are absent
	Buffered  uint64
}

func (b *books) export() Books {
	out := Books{Recorded: b.recorded, Delivered: b.delivered}
	for r, n := range b.dropped {
		if n > 0 {
			if out.Dropped == nil {
				out.Dropped = map[string]uint64{}
			}
			out.Dropped[reasonNames[r]] = n
		}
	}
	out.Buffered = b.recorded - b.delivered - b.allDropped()
	return out
}
