package extauthz

import (
	"encoding/json"
	"fmt"
	"unicode/utf8"

	"github.com/open-policy-agent/opa/v1/ast"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"

	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// Messages that responses share. They are never changed.
var (
	statusOK     = &rpcstatus.Status{}
	statusDenied = &rpcstatus.Status{Code: int32(codes.PermissionDenied)}

	emptyOK = &authv3.CheckResponse_OkResponse{OkResponse: &authv3.OkHttpResponse{}}

	overwrite = wrapperspb.Bool(false)
	add       = wrapperspb.Bool(true)
)

// responseOf renders an answer. Its error is a gRPC status, for a fault of a
// tenant that wants its callers to see one.
func responseOf(a *tenants.Answer, decisionID string) (*authv3.CheckResponse, error) {
	if a.Err != nil {
		return failureOf(a.Err, a.OnError, decisionID)
	}
	resp, err := decided(&a.Decision, decisionID)
	if err != nil {
		return failureOf(err, a.OnError, decisionID)
	}
	if a.DryRun && !a.Decision.Allowed {
		resp.Status, resp.HttpResponse = statusOK, emptyOK
	}
	return resp, nil
}

// decided renders a decision. Its error wraps policy.ErrResult: its metadata has
// what no response can carry.
func decided(d *policy.Decision, decisionID string) (*authv3.CheckResponse, error) {
	metadata, err := metadataOf(d.Metadata, decisionID)
	if err != nil {
		return nil, err
	}
	resp := &authv3.CheckResponse{Status: statusDenied, DynamicMetadata: metadata}
	if d.Allowed {
		resp.Status = statusOK
	}
	switch {
	case !d.Object: // a boolean says nothing about the HTTP response
	case d.Allowed:
		resp.HttpResponse = &authv3.CheckResponse_OkResponse{OkResponse: &authv3.OkHttpResponse{
			Headers:                 overwriting(d.Headers),
			HeadersToRemove:         d.RemoveHeaders,
			ResponseHeadersToAdd:    plain(d.ResponseHeaders),
			QueryParametersToSet:    parameters(d.SetQuery),
			QueryParametersToRemove: d.RemoveQuery,
		}}
	default:
		status := typev3.StatusCode_Forbidden
		if d.Status != 0 {
			status = typev3.StatusCode(d.Status)
		}
		resp.HttpResponse = &authv3.CheckResponse_DeniedResponse{DeniedResponse: &authv3.DeniedHttpResponse{
			Status:  &typev3.HttpStatus{Code: status},
			Headers: plain(d.Headers),
			Body:    d.Body,
		}}
	}
	return resp, nil
}

// overwriting returns the headers for an allowed request. The first value of a
// name takes the place of what the client sent, the others are added to it. The
// flag is always there: which is meant is not left to a default.
func overwriting(headers []policy.Header) []*corev3.HeaderValueOption {
	options := plain(headers)
	var seen map[string]bool
	if len(headers) > 1 {
		seen = make(map[string]bool, len(headers))
	}
	for i, h := range headers {
		flag := overwrite
		if seen != nil {
			if name := lower(h.Name); seen[name] {
				flag = add
			} else {
				seen[name] = true
			}
		}
		//lint:ignore SA1019 Envoy reads append_action of such a header only where append is absent, and not in all versions
		options[i].Append = flag
	}
	return options
}

// plain returns headers without flags, as those of a denial and those for the
// client are sent.
func plain(headers []policy.Header) []*corev3.HeaderValueOption {
	if len(headers) == 0 {
		return nil
	}
	options := make([]*corev3.HeaderValueOption, len(headers))
	for i, h := range headers {
		options[i] = &corev3.HeaderValueOption{Header: &corev3.HeaderValue{Key: h.Name, Value: h.Value}}
	}
	return options
}

func parameters(list []policy.Header) []*corev3.QueryParameter {
	if len(list) == 0 {
		return nil
	}
	set := make([]*corev3.QueryParameter, len(list))
	for i, p := range list {
		set[i] = &corev3.QueryParameter{Key: p.Name, Value: p.Value}
	}
	return set
}

// metadataOf returns the dynamic metadata of a response: that of the policy, with
// the decision ID. Its error wraps policy.ErrResult.
func metadataOf(object ast.Object, decisionID string) (*structpb.Struct, error) {
	s := &structpb.Struct{Fields: make(map[string]*structpb.Value, 1)}
	if object != nil {
		if err := setFields(s, object); err != nil {
			return nil, fmt.Errorf("%w: dynamic metadata: %w", policy.ErrResult, err)
		}
	}
	s.Fields[keyOfID] = structpb.NewStringValue(decisionID)
	return s, nil
}

func setFields(s *structpb.Struct, object ast.Object) error {
	return object.Iter(func(k, v *ast.Term) error {
		key, err := keyOf(k.Value)
		if err != nil {
			return err
		}
		s.Fields[key], err = structValue(v.Value)
		return err
	})
}

// keyOf returns the key of an object as its JSON has it: one that is no string
// is the text of its JSON.
func keyOf(v ast.Value) (string, error) {
	if s, ok := v.(ast.String); ok {
		return validString(s)
	}
	x, err := ast.JSON(v)
	if err != nil {
		return "", err
	}
	text, err := json.Marshal(x)
	return string(text), err
}

func structValue(v ast.Value) (*structpb.Value, error) {
	switch v := v.(type) {
	case ast.Null:
		return structpb.NewNullValue(), nil
	case ast.Boolean:
		return structpb.NewBoolValue(bool(v)), nil
	case ast.Number:
		f, err := json.Number(v).Float64()
		if err != nil {
			return nil, fmt.Errorf("a number is out of range")
		}
		return structpb.NewNumberValue(f), nil
	case ast.String:
		s, err := validString(v)
		return structpb.NewStringValue(s), err
	case *ast.Array:
		list := &structpb.ListValue{Values: make([]*structpb.Value, 0, v.Len())}
		err := v.Iter(appendTo(list))
		return structpb.NewListValue(list), err
	case ast.Set:
		list := &structpb.ListValue{Values: make([]*structpb.Value, 0, v.Len())}
		err := v.Iter(appendTo(list))
		return structpb.NewListValue(list), err
	case ast.Object:
		s := &structpb.Struct{Fields: make(map[string]*structpb.Value, v.Len())}
		err := setFields(s, v)
		return structpb.NewStructValue(s), err
	}
	return nil, fmt.Errorf("a value of type %s", ast.TypeName(v))
}

func appendTo(list *structpb.ListValue) func(*ast.Term) error {
	return func(t *ast.Term) error {
		v, err := structValue(t.Value)
		list.Values = append(list.Values, v)
		return err
	}
}

func validString(s ast.String) (string, error) {
	if !utf8.ValidString(string(s)) {
		return "", fmt.Errorf("%q is not UTF-8", string(s))
	}
	return string(s), nil
}
