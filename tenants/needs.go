package tenants

import (
	"sync/atomic"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/policy"
)

// Needs says what an input must hold, and how it is to be read: the parts that
// the policy of this moment can read, and the tenant's own settings.
type Needs struct {
	// All asks for the whole document, whatever Slice says.
	All bool

	// Slice is what of the document is read. An input may hold more. Whatever
	// it is, a request that makes no input is refused as if all were read. Nil
	// asks for the whole document.
	Slice *policy.Slice

	// SkipBody leaves the request body unparsed (skip-request-body-parse).
	SkipBody bool

	// ProtoDescriptor is the file of the protobuf descriptor set by which
	// gRPC bodies are read (proto-descriptor). Empty: they are not.
	ProtoDescriptor string

	// BodyBytes bounds the body of a request. A larger one is ErrTooLarge.
	BodyBytes int64

	// Cancel is set when nobody waits for the input any more. What takes long
	// looks at it, and returns policy.ErrCanceled. Nil: it never is.
	Cancel *policy.Cancel

	// WholeBody refuses a request, with ErrPartialBody, of whose body a part
	// is missing, or whose body is not one that can be parsed.
	WholeBody bool
}

// Reads is what of the document is read.
func (n *Needs) Reads() *policy.Slice {
	if n.All || n.Slice == nil {
		return policy.All
	}
	return n.Slice
}

// whole are these needs of somebody who looks at the whole document, later.
func (n Needs) whole() Needs {
	n.All, n.Slice, n.Cancel, n.WholeBody = true, nil, nil, false
	return n
}

// needs says what a question to an entry point needs. The guard, which is asked
// first, sees the same input. What is recorded has the whole of it, which is made
// here unless the input is Recorded.
func (c *call) needs(q *Question, entry string, guard *revision) Needs {
	needs := c.in.needs
	if _, recorded := q.Input.(Recorded); !recorded && c.in.observes() {
		needs.All = true
	} else if needs.Slice = c.rev.policy.Slice(entry); guard != nil {
		needs.Slice = c.in.joined.of(needs.Slice, guard.policy.Slice(c.pool.guard.settings.Entry))
	}
	if c.in.settings.WholeBody {
		needs.WholeBody = c.rev.policy.ReadsBody(entry) ||
			guard != nil && guard.policy.ReadsBody(c.pool.guard.settings.Entry)
	}
	return needs
}

// joins remembers what two policies read that were asked last.
type joins struct{ last atomic.Pointer[join] }

type join struct{ a, b, both *policy.Slice }

func (js *joins) of(a, b *policy.Slice) *policy.Slice {
	if j := js.last.Load(); j != nil && j.a == a && j.b == b {
		return j.both
	}
	both := a.Join(b)
	js.last.Store(&join{a, b, both})
	return both
}

// wholeInput is the input of a question as somebody else than the policy is to
// see it; nil: there is none. It was made before, so that there is hardly an error.
func wholeInput(input Input, made ast.Value, needs Needs) (ast.Value, error) {
	if made == nil || needs.Reads().Whole {
		return made, nil
	}
	return input.Input(needs.whole())
}
