package extauthz

import (
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // is what Codec is made of
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/gatehouse-authz/gatehouse/tenants"
)

// reply is the response to a check: its bytes, where it says no more than yes or
// no, else the message.
type reply struct {
	plain   []byte
	message *authv3.CheckResponse // made of plain when somebody asks for it
}

// replyOf renders an answer as responseOf does.
func replyOf(a *tenants.Answer, decisionID string) (reply, error) {
	if plain := plainOf(a, decisionID); plain != nil {
		return reply{plain: plain}, nil
	}
	resp, err := responseOf(a, decisionID)
	if a.Naming.On() {
		name(resp, a.Naming, decisionID)
	}
	return reply{message: resp}, err
}

// response returns the message of a reply; nil: there is none, but an RPC error.
func (r *reply) response() *authv3.CheckResponse {
	if r.message == nil && r.plain != nil {
		r.message = new(authv3.CheckResponse)
		if err := proto.Unmarshal(r.plain, r.message); err != nil {
			panic(err) // we have written it
		}
	}
	return r.message
}

// ProtoReflect makes a reply a message for every codec.
func (r *reply) ProtoReflect() protoreflect.Message { return r.response().ProtoReflect() }

// plainOf returns the bytes of the response to what is a boolean, or a fault that
// is denied, as protobuf writes them. Nil: the response says more.
func plainOf(a *tenants.Answer, decisionID string) []byte {
	d := &a.Decision
	if a.Naming.On() || len(decisionID) > 64 { // lengths have one byte below
		return nil
	}
	buf := make([]byte, 0, 2+2+8+2+2+2+len(keyOfID)+2+2+len(decisionID))
	switch {
	case a.Err != nil:
		if a.OnError != tenants.OnErrorDeny {
			return nil
		}
		status, _ := statusOf(a.Err)
		http := protowire.AppendVarint(append(make([]byte, 0, 4), 1<<3|varint), uint64(status)) // HttpStatus
		buf = append(buf, 1<<3|chunk, 2, 1<<3|varint, byte(statusDenied.Code),
			2<<3|chunk, byte(2+len(http)), // denied_response
			1<<3|chunk, byte(len(http)))
		buf = append(buf, http...)
	case d.Object || d.Metadata != nil || a.DryRun && !d.Allowed:
		return nil
	case d.Allowed:
		buf = append(buf, 1<<3|chunk, 0)
	default:
		buf = append(buf, 1<<3|chunk, 2, 1<<3|varint, byte(statusDenied.Code))
	}
	// dynamic_metadata {fields {key, value {string_value}}}
	value := 2 + len(decisionID)
	entry := 2 + len(keyOfID) + 2 + value
	buf = append(buf, 4<<3|chunk, byte(2+entry), 1<<3|chunk, byte(entry), 1<<3|chunk, byte(len(keyOfID)))
	buf = append(buf, keyOfID...)
	buf = append(buf, 2<<3|chunk, byte(value), 3<<3|chunk, byte(len(decisionID)))
	return append(buf, decisionID...)
}

// keyOfID is where a response's metadata has the decision ID.
const keyOfID = "decision_id"

// codec is protobuf's, and sends the bytes of a reply as they are.
type codec struct{ encoding.CodecV2 }

// Codec is the codec of protobuf for a grpc.Server that serves a Server: it has less
// to do for most responses. It is that of any other message, too.
func Codec() encoding.CodecV2 { return codec{encoding.GetCodecV2("proto")} }

// Marshal returns the bytes of a message.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if r, ok := v.(*reply); ok && r.plain != nil {
		return mem.BufferSlice{mem.SliceBuffer(r.plain)}, nil
	}
	return c.CodecV2.Marshal(v)
}
