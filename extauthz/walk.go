package extauthz

import (
	"encoding/base64"
	"encoding/json"
	"math"
	"strconv"

	"github.com/open-policy-agent/opa/v1/ast"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/structpb"
)

// message returns any message as an object: its populated fields under their
// JSON names, numbers and enums as numbers, bytes in base64. A Struct is the
// object that it stands for; no other message is special.
//
// The messages of every check have their own functions in attributes.go, which
// give the same.
func (t *termMaker) message(m protoreflect.Message) *ast.Term {
	if s, ok := m.Interface().(*structpb.Struct); ok {
		return t.structOf(s)
	}
	var items []item
	m.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		items = append(items, item{t.string(fd.JSONName()), t.field(fd, v)})
		return true
	})
	return t.object(items)
}

func (t *termMaker) field(fd protoreflect.FieldDescriptor, v protoreflect.Value) *ast.Term {
	switch {
	case fd.IsMap():
		items := make([]item, 0, v.Map().Len())
		v.Map().Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
			items = append(items, item{t.string(k.String()), t.single(fd.MapValue(), v)})
			return true
		})
		return t.object(items)
	case fd.IsList():
		terms := make([]*ast.Term, v.List().Len())
		for i := range terms {
			terms[i] = t.single(fd, v.List().Get(i))
		}
		return t.of(ast.NewArray(terms...))
	default:
		return t.single(fd, v)
	}
}

func (t *termMaker) single(fd protoreflect.FieldDescriptor, v protoreflect.Value) *ast.Term {
	switch fd.Kind() {
	case protoreflect.MessageKind, protoreflect.GroupKind:
		return t.message(v.Message())
	case protoreflect.StringKind:
		return t.string(v.String())
	case protoreflect.BytesKind:
		return t.bytes(v.Bytes())
	case protoreflect.BoolKind:
		return ast.InternedTerm(v.Bool())
	case protoreflect.EnumKind:
		return t.int(int64(v.Enum()))
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind, protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		return t.uint(v.Uint())
	case protoreflect.FloatKind, protoreflect.DoubleKind:
		return t.float(v.Float())
	default:
		return t.int(v.Int())
	}
}

// structOf returns the object that a Struct stands for.
func (t *termMaker) structOf(s *structpb.Struct) *ast.Term {
	var buf [16]item
	items := buf[:0]
	for k, v := range s.GetFields() {
		items = append(items, item{t.string(k), t.valueOf(v)})
	}
	return t.object(items)
}

func (t *termMaker) valueOf(v *structpb.Value) *ast.Term {
	switch v := v.GetKind().(type) {
	case *structpb.Value_BoolValue:
		return ast.InternedTerm(v.BoolValue)
	case *structpb.Value_NumberValue:
		return t.float(v.NumberValue)
	case *structpb.Value_StringValue:
		return t.string(v.StringValue)
	case *structpb.Value_StructValue:
		return t.structOf(v.StructValue)
	case *structpb.Value_ListValue:
		values := v.ListValue.GetValues()
		terms := make([]*ast.Term, len(values))
		for i, v := range values {
			terms[i] = t.valueOf(v)
		}
		return t.of(ast.NewArray(terms...))
	default:
		return ast.InternedNullTerm
	}
}

func (t *termMaker) bytes(b []byte) *ast.Term {
	return t.of(ast.String(base64.StdEncoding.EncodeToString(b)))
}

func (t *termMaker) int(i int64) *ast.Term {
	if int64(int(i)) == i && ast.HasInternedIntNumberTerm(int(i)) {
		return ast.InternedTerm(int(i))
	}
	return t.of(ast.Number(strconv.FormatInt(i, 10)))
}

func (t *termMaker) uint(u uint64) *ast.Term {
	if u <= math.MaxInt64 {
		return t.int(int64(u))
	}
	return t.of(ast.Number(strconv.FormatUint(u, 10)))
}

// float returns a number as a Struct has it: what is none in JSON is a string.
func (t *termMaker) float(f float64) *ast.Term {
	switch {
	case math.IsNaN(f):
		return t.string("NaN")
	case math.IsInf(f, 1):
		return t.string("Infinity")
	case math.IsInf(f, -1):
		return t.string("-Infinity")
	}
	text := strconv.FormatFloat(f, 'g', -1, 64)
	if term := ast.InternedIntNumberTermFromString(text); term != nil {
		return term
	}
	return t.of(ast.Number(json.Number(text)))
}
