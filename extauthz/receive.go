package extauthz

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/gatehouse-authz/gatehouse/tenants"
)

// transport is what the streams of grpc-go offer below RecvMsg. RecvMsg ends the
// call with an RPC error when a message is too large or cannot be decoded; a
// handler that is to answer such a call has to read the message itself.
type transport interface {
	ReadMessageHeader(header []byte) error
	Read(n int) (mem.BufferSlice, error)
	RecvCompress() string
}

// receive reads the one message of a unary call, and returns its text and how much
// of the memory it reserved, which is the caller's to release. Its error wraps
// ErrTooLarge for a message over the limit, whether before or after it is
// decompressed, ErrInvalid for one that is not whole, and ErrBusy where the
// memory has no room. The call can still be answered.
func receive(stream grpc.ServerStream, limit int, memory *memory) (text string, reserved int64, err error) {
	ctx := stream.Context()
	t, ok := grpc.ServerTransportStreamFromContext(ctx).(transport)
	if !ok { // a stream of another kind, with the bounds that it has itself
		req := new(authv3.CheckRequest)
		if err := stream.RecvMsg(req); err != nil {
			return "", 0, err
		}
		data, err := proto.Marshal(req)
		return string(data), 0, err
	}
	text, err = receiveFrom(t, limit, func(n int64) error {
		if err := memory.reserve(n); err != nil {
			return err
		}
		reserved += n
		return nil
	})
	if err != nil && ctx.Err() != nil {
		return "", reserved, ctx.Err()
	}
	return text, reserved, err
}

func receiveFrom(t transport, limit int, reserve func(int64) error) (string, error) {
	var header [5]byte // flag and length, as PROTOCOL-HTTP2.md has it
	if err := t.ReadMessageHeader(header[:]); err != nil {
		return "", receiveError(err)
	}
	length := binary.BigEndian.Uint32(header[1:])
	if int64(length) > int64(limit) {
		return "", fmt.Errorf("%w: message has %d bytes, limit %d", tenants.ErrTooLarge, length, limit)
	}
	if err := reserve(int64(length)); err != nil {
		return "", err
	}
	data, err := t.Read(int(length))
	if err != nil {
		return "", receiveError(err)
	}
	defer data.Free()

	switch header[0] {
	case 0:
	case 1:
		if data, err = decompress(t.RecvCompress(), data, limit); err != nil {
			return "", err
		}
		if err := reserve(int64(data.Len())); err != nil {
			return "", err
		}
	default:
		return "", fmt.Errorf("%w: message has flag %d", tenants.ErrInvalid, header[0])
	}
	text := textOf(data)

	switch err := t.ReadMessageHeader(header[:]); err {
	case io.EOF:
		return text, nil
	case nil:
		return "", fmt.Errorf("%w: more than one message", tenants.ErrInvalid)
	default:
		return "", receiveError(err)
	}
}

// textOf returns what buffers hold, which are the transport's, as a string of its
// own: it is kept as long as anything that is a part of it.
func textOf(buffers mem.BufferSlice) string {
	var text strings.Builder
	text.Grow(buffers.Len())
	for _, b := range buffers {
		text.Write(b.ReadOnlyData())
	}
	return text.String()
}

// decompress returns what data holds, as far as it is within the limit.
func decompress(name string, data mem.BufferSlice, limit int) (mem.BufferSlice, error) {
	compressor := encoding.GetCompressor(name)
	if compressor == nil {
		return nil, fmt.Errorf("%w: message is compressed as %q", tenants.ErrInvalid, name)
	}
	compressed := data.Reader()
	defer compressed.Close()
	r, err := compressor.Decompress(compressed)
	if err != nil {
		return nil, fmt.Errorf("%w: decompressing: %w", tenants.ErrInvalid, err)
	}
	plain, err := io.ReadAll(io.LimitReader(r, int64(limit)+1))
	if err != nil {
		return nil, fmt.Errorf("%w: decompressing: %w", tenants.ErrInvalid, err)
	}
	if len(plain) > limit {
		return nil, fmt.Errorf("%w: message has more than %d bytes when decompressed", tenants.ErrTooLarge, limit)
	}
	return mem.BufferSlice{mem.SliceBuffer(plain)}, nil
}

// receiveError returns an error of the transport: one that says that the call
// ended early is the client's.
func receiveError(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: message is incomplete", tenants.ErrInvalid)
	}
	return err
}
