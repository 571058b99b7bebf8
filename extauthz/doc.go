// Package extauthz speaks Envoy's external authorization protocol, ext_authz v3.
//
// In the common case Envoy sends a CheckRequest that names its tenant in the
// route's context extensions. Server finds the tenant, makes the input document
// when the tenant's policy asks for it, and renders the decision as a
// CheckResponse: tenantOf, inputOf, Pool.Decide, responseOf.
//
// A message is read from its bytes: of a small one a copy is made, of which all
// strings of the input are parts. What Envoy does not send, such as a field
// twice, protobuf reads first (decode.go), so that each message means, and is
// refused as, what protobuf defines. Of the input only those parts are made that
// the policy can read (slice.go), and a response that says no more than yes or no
// is bytes at once (reply.go), which Codec sends.
//
// The input document and the meaning of a decision are those of
// opa-envoy-plugin, and so are the answers, but for what follows.
//
// The answer:
//   - What goes wrong is answered by an explicit denial with the decision ID, so
//     that the failure_mode_allow of an Envoy never lets a request in. The table
//     in failure.go says which HTTP status a fault has. A tenant may set
//     on_error to have its own faults allowed, or answered by an RPC error.
//   - Nothing that a client sends makes a Check an RPC error: a message that is
//     too large or that protobuf refuses is denied, too, and a panic is.
//   - The headers of an allowing decision carry append flags: the first value of
//     a name overwrites what the client sent, the others are added to it.
//   - A string in a decision that is not UTF-8 makes its result ill-typed.
//
// The input:
//   - A content type is JSON whatever its case, and so is one that ends in
//     "+json", also for a part of a multipart body.
//   - An object of a JSON body that has a key twice, a path segment that decodes
//     to "..", and a NUL in the decoded path are refused.
//   - Where a request has no headers but a header map (Envoy's
//     encode_raw_headers), the headers are made from the map.
//   - An Any inside a gRPC body may have a type of the descriptor set.
//   - input.attributes.metadataContext.filterMetadata.open_policy_agent.decision_id
//     is the decision ID. What stood there is overwritten.
//
// The trace: a check belongs to the trace and the span that the call's metadata
// name, or else, where they name none, those of the checked request: by the W3C
// traceparent, or in the ways that Config.Propagators lists.
//
// Bounds: the size of a message is bounded by Config.MaxMessageBytes, the size of
// a request's body by tenants.Needs.BodyBytes. A query string and a form have at
// most 10,000 parameters (as in net/url), JSON nests at most 10,000 deep, a part
// of a multipart body has at most 10,000 header lines (as in mime/multipart), a
// gRPC body holds at most 1,000 values of type Any, and a descriptor set is at
// most 64 MiB.
package extauthz
