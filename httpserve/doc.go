// Package httpserve speaks HTTP: each tenant is a small OPA at its own base URL,
// /t/{tenant}.
//
// In the common case a request names its tenant and one of the routes in
// routes.go in its path. The Server looks at what the tenant offers, finds out
// who asks, reads the body within its bounds and has the tenant's policy decide:
// routeOf, callerOf, bodyOf, Pool.Decide, and the route's own answer.
//
// What every route promises:
//   - A part that the tenant's configuration does not name is not there: 404, as
//     for a tenant that does not exist.
//   - Whoever asks is known by a credential that was verified: a token, a
//     certificate, or headers of a peer that the operator trusts. Tenants that
//     ask for none answer on a listener of this machine alone.
//   - Paths are read as they were sent, segment by segment. None is ever cleaned,
//     redirected or made into a query.
//   - What is too large is refused with 413 before anything is evaluated.
//   - An error is JSON that names the field and the bound, and has nothing of a
//     parser's text in it. One table, in errors.go, gives each its status, and
//     one in check.go those that forward-auth has as checks over gRPC.
//   - A page in a browser is answered, but for forward-auth, only if its origin is one that the tenant
//     names, and a cookie or certificate that a browser adds by itself counts
//     only for requests that such a page, or none, has made.
//
// Bounds: of a path 8 KiB, of a token 16 KiB, of the bodies that are being
// answered Config.Memory, of one body what its route says, of the time in which
// it must arrive bodyTime, and of the time for an answer answerTime.
package httpserve
