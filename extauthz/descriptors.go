package extauthz

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
)

// maxDescriptorBytes bounds a file of descriptors.
const maxDescriptorBytes = 64 << 20

// maxAny bounds the values of type Any in one body: each is decoded by itself,
// so that deeply nested ones would be decoded again and again.
const maxAny = 1000

// Descriptors are the services and messages by which gRPC bodies are read. They
// are never changed.
type Descriptors struct {
	files *protoregistry.Files
	types *dynamicpb.Types
}

// LoadDescriptors reads a file that holds one FileDescriptorSet with all that it
// imports, as protoc --include_imports --descriptor_set_out writes it.
func LoadDescriptors(path string) (*Descriptors, error) {
	d, err := loadDescriptors(path)
	if err != nil {
		return nil, fmt.Errorf("loading protobuf descriptors: %w", err)
	}
	return d, nil
}

func loadDescriptors(path string) (*Descriptors, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxDescriptorBytes+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxDescriptorBytes {
		return nil, fmt.Errorf("%s has more than %d MiB", path, maxDescriptorBytes>>20)
	}
	var set descriptorpb.FileDescriptorSet
	if err := proto.Unmarshal(data, &set); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	d, err := newDescriptors(&set)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return d, nil
}

func newDescriptors(set *descriptorpb.FileDescriptorSet) (*Descriptors, error) {
	files, err := protodesc.NewFiles(set)
	if err != nil {
		return nil, err
	}
	return &Descriptors{files: files, types: dynamicpb.NewTypes(files)}, nil
}

// errTruncated: a frame says that it is longer than what there is.
var errTruncated = errors.New("message is truncated")

// messageJSON returns the first message of the body of a gRPC call as
// protobuf-JSON. It returns nil where the body cannot be read for lack of
// knowledge: a compressed message, an unknown method, a method with a stream of
// requests.
func (d *Descriptors) messageJSON(service, method string, body []byte) ([]byte, error) {
	// Length-Prefixed-Message of PROTOCOL-HTTP2.md: flag, length, message.
	if len(body) < 5 {
		return nil, fmt.Errorf("gRPC frame has %d bytes", len(body))
	}
	if body[0] != 0 {
		return nil, nil
	}
	length, body := binary.BigEndian.Uint32(body[1:5]), body[5:]
	if int64(length) > int64(len(body)) {
		return nil, errTruncated
	}
	input := d.inputType(service, method)
	if input == nil {
		return nil, nil
	}
	message := dynamicpb.NewMessage(input)
	if err := proto.Unmarshal(body[:length], message); err != nil {
		return nil, err
	}
	return protojson.MarshalOptions{Resolver: &resolver{Types: d.types}}.Marshal(message)
}

func (d *Descriptors) inputType(service, method string) protoreflect.MessageDescriptor {
	desc, err := d.files.FindDescriptorByName(protoreflect.FullName(service))
	if err != nil {
		return nil
	}
	s, ok := desc.(protoreflect.ServiceDescriptor)
	if !ok {
		return nil
	}
	m := s.Methods().ByName(protoreflect.Name(method))
	if m == nil || m.IsStreamingClient() {
		return nil
	}
	return m.Input()
}

// resolver finds the types of the Any values in one body: first in the
// descriptor set, then among those that are built in.
type resolver struct {
	*dynamicpb.Types
	found int
}

func (r *resolver) FindMessageByURL(url string) (protoreflect.MessageType, error) {
	if r.found++; r.found > maxAny {
		return nil, fmt.Errorf("more than %d values of type Any", maxAny)
	}
	t, err := r.Types.FindMessageByURL(url)
	if err != nil {
		return protoregistry.GlobalTypes.FindMessageByURL(url)
	}
	return t, nil
}
