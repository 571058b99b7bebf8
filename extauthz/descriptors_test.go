package extauthz

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// field declares a field as its .proto file does: "int64 isbn = 1" is
// field("isbn", 1, "int64").
func field(name string, number int32, kind string) *descriptorpb.FieldDescriptorProto {
	f := &descriptorpb.FieldDescriptorProto{
		Name:   proto.String(name),
		Number: proto.Int32(number),
		Label:  descriptorpb.FieldDescriptorProto_LABEL_OPTIONAL.Enum(),
	}
	switch kind {
	case "int64":
		f.Type = descriptorpb.FieldDescriptorProto_TYPE_INT64.Enum()
	case "string":
		f.Type = descriptorpb.FieldDescriptorProto_TYPE_STRING.Enum()
	default:
		f.Type, f.TypeName = descriptorpb.FieldDescriptorProto_TYPE_MESSAGE.Enum(), proto.String("."+kind)
	}
	return f
}

func message(name string, fields ...*descriptorpb.FieldDescriptorProto) *descriptorpb.DescriptorProto {
	return &descriptorpb.DescriptorProto{Name: proto.String(name), Field: fields}
}

func rpc(name, input, output string) *descriptorpb.MethodDescriptorProto {
	m := &descriptorpb.MethodDescriptorProto{Name: proto.String(name)}
	if rest, ok := strings.CutPrefix(input, "stream "); ok {
		input, m.ClientStreaming = rest, proto.Bool(true)
	}
	if rest, ok := strings.CutPrefix(output, "stream "); ok {
		output, m.ServerStreaming = rest, proto.Bool(true)
	}
	m.InputType, m.OutputType = proto.String("."+input), proto.String("."+output)
	return m
}

// exampleSet is what protoc makes of testdata/book.proto and example.proto.
func exampleSet() *descriptorpb.FileDescriptorSet {
	const text = "google.protobuf.StringValue"
	return &descriptorpb.FileDescriptorSet{File: []*descriptorpb.FileDescriptorProto{
		{
			Name: proto.String("book.proto"), Package: proto.String("com.book"), Syntax: proto.String("proto3"),
			MessageType: []*descriptorpb.DescriptorProto{
				message("Book", field("isbn", 1, "int64"), field("title", 2, "string"), field("author", 3, "string")),
				message("GetBookRequest", field("isbn", 1, "int64")),
				message("GetBookViaAuthor", field("author", 1, "string")),
			},
			Service: []*descriptorpb.ServiceDescriptorProto{{
				Name: proto.String("BookService"),
				Method: []*descriptorpb.MethodDescriptorProto{
					rpc("GetBook", "com.book.GetBookRequest", "com.book.Book"),
					rpc("GetBooksViaAuthor", "com.book.GetBookViaAuthor", "stream com.book.Book"),
					rpc("GetGreatestBook", "stream com.book.GetBookRequest", "com.book.Book"),
				},
			}},
		},
		protodesc.ToFileDescriptorProto(anypb.File_google_protobuf_any_proto),
		protodesc.ToFileDescriptorProto(wrapperspb.File_google_protobuf_wrappers_proto),
		{
			Name: proto.String("example.proto"), Package: proto.String("Example.Test.GRPC"), Syntax: proto.String("proto3"),
			Dependency: []string{"google/protobuf/any.proto", "google/protobuf/wrappers.proto"},
			MessageType: []*descriptorpb.DescriptorProto{
				message("Labels", field("SeverityText", 1, text), field("SeverityNumber", 2, text)),
				message("Content", field("Body", 1, text), field("Name", 2, text)),
				message("Registration",
					field("Metadata", 1, "Example.Test.GRPC.Labels"),
					field("Data", 2, "Example.Test.GRPC.Content"),
					field("Extra", 3, "google.protobuf.Any")),
			},
			Service: []*descriptorpb.ServiceDescriptorProto{{
				Name: proto.String("ProtoServiceIExampleApplication"),
				Method: []*descriptorpb.MethodDescriptorProto{
					rpc("RegisterExample", "Example.Test.GRPC.Registration", "Example.Test.GRPC.Content"),
				},
			}},
		},
	}}
}

// exampleFile is under which name the tests have exampleSet.
const exampleFile = "example.pb"

// exampleDescriptors returns exampleSet as a Config has it, read from a file.
func exampleDescriptors(t testing.TB) map[string]*Descriptors {
	t.Helper()
	data, err := proto.Marshal(exampleSet())
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), exampleFile)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := LoadDescriptors(path)
	if err != nil {
		t.Fatal(err)
	}
	return map[string]*Descriptors{exampleFile: d}
}

func TestLoadDescriptorsRefuses(t *testing.T) {
	incomplete := exampleSet()
	incomplete.File = incomplete.File[3:] // without what it imports
	data, err := proto.Marshal(incomplete)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, content := range map[string][]byte{"incomplete.pb": data, "garbage.pb": []byte("\xff\xff")} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadDescriptors(path); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("LoadDescriptors(%s) = %v, want an error that names the file", name, err)
		}
	}
	if _, err := LoadDescriptors(filepath.Join(dir, "absent.pb")); err == nil {
		t.Error("LoadDescriptors of no file: no error")
	}
	large := filepath.Join(dir, "large.pb")
	f, err := os.Create(large)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(maxDescriptorBytes + 1); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadDescriptors(large); err == nil || !strings.Contains(err.Error(), "64 MiB") {
		t.Errorf("LoadDescriptors of a large file = %v", err)
	}
}
