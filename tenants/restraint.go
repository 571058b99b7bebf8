package tenants

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/gatehouse-authz/gatehouse/bundles"
)

// Bounds of what a service that fails is asked.
const (
	// failing is after how many failures in a row, of whatever bundles, a
	// service is asked no more than failingRate times a second.
	failing     = 10
	failingRate = 50
)

// restraint bounds the requests to one service while it fails: ten thousand
// tenants that try again, each at its own pace, would be what keeps it down.
type restraint struct {
	mu     sync.Mutex
	fails  int // in a row; guarded by mu
	second int64
	asked  int // in that second
}

// errRestraint: the service fails, and has been asked enough.
var errRestraint = errors.New("service fails for many, and is asked again later")

// ask reports whether the service may be asked now.
func (r *restraint) ask(now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fails < failing {
		return true
	}
	if second := now.Unix(); second != r.second {
		r.second, r.asked = second, 0
	}
	r.asked++
	return r.asked <= failingRate
}

// answered notes what came of asking. That there is no such bundle, or a bad
// one, is an answer.
func (r *restraint) answered(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err == nil || errors.Is(err, bundles.ErrNotModified) || errors.Is(err, bundles.ErrNotFound) || errors.Is(err, bundles.ErrRefused) {
		r.fails = 0
		return
	}
	r.fails++
}

// restraint returns the restraint of a service.
func (fs *feeds) restraint(service string) *restraint {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return fs.restraintOf(service)
}

// restraintOf is restraint; fs.mu is held.
func (fs *feeds) restraintOf(service string) *restraint {
	r := fs.restraints[service]
	if r == nil {
		if len(fs.restraints) >= maxRestraints {
			fs.restraints = map[string]*restraint{} // what fails is found out again
		}
		r = new(restraint)
		fs.restraints[service] = r
	}
	return r
}

// maxRestraints bounds the services that are remembered, of which there may be
// one for each tenant.
const maxRestraints = 20_000

// backoff is the jittered time after a failure, which was one of so many in a
// row: anywhere up to a bound that doubles with each, up to the longest; and not
// before the service wants to be asked.
func backoff(fails int, longest time.Duration, err error) time.Duration {
	ceiling := min(minBackoff<<min(fails, 20), max(longest, minBackoff))
	wait := minBackoff/2 + rand.N(ceiling)
	if status, ok := errors.AsType[*bundles.StatusError](err); ok {
		wait += status.RetryAfter
	}
	return wait
}

// held is the error of a bundle that is not asked for.
func held(name string) error { return fmt.Errorf("bundle %q: %w", name, errRestraint) }
