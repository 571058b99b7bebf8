package traffic

import (
	"math/bits"
	"time"
)

// Histogram counts durations in buckets that are at most 1/64 wide, whatever
// their number. The zero Histogram is empty.
type Histogram struct {
	counts [64 * subBuckets]uint64
	total  uint64
	max    time.Duration
}

const (
	subBits    = 6
	subBuckets = 1 << subBits
)

// Record counts one duration.
func (h *Histogram) Record(d time.Duration) {
	d = max(d, 0)
	h.counts[bucketOf(uint64(d))]++
	h.total++
	h.max = max(h.max, d)
}

// Add adds the counts of another.
func (h *Histogram) Add(other *Histogram) {
	for i, n := range other.counts {
		h.counts[i] += n
	}
	h.total += other.total
	h.max = max(h.max, other.max)
}

// Max returns the longest duration.
func (h *Histogram) Max() time.Duration { return h.max }

// Quantile returns a duration that the share q of all does not exceed.
func (h *Histogram) Quantile(q float64) time.Duration {
	rank := uint64(q * float64(h.total))
	seen := uint64(0)
	for i, n := range h.counts {
		if seen += n; n > 0 && seen > rank {
			return min(upperOf(i), h.max)
		}
	}
	return h.max
}

// bucketOf returns the bucket of n: its exponent, and the bits that follow the
// first.
func bucketOf(n uint64) int {
	if n < subBuckets {
		return int(n)
	}
	shift := bits.Len64(n) - 1 - subBits
	return (shift+1)*subBuckets + int(n>>shift)&(subBuckets-1)
}

// upperOf returns the largest duration of a bucket.
func upperOf(bucket int) time.Duration {
	if bucket < subBuckets {
		return time.Duration(bucket)
	}
	shift := bucket/subBuckets - 1
	return time.Duration((uint64(subBuckets+bucket%subBuckets+1) << shift) - 1)
}
