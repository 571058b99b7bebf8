package extauthz

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"

	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// failures says how what went wrong is answered: with which HTTP status, or,
// where a tenant wants its callers to see an RPC error, with which code. The
// first that an error is counts.
var failures = []struct {
	err    error
	status typev3.StatusCode
	code   codes.Code
}{
	{tenants.ErrInvalid, typev3.StatusCode_BadRequest, codes.InvalidArgument},
	{tenants.ErrTooLarge, typev3.StatusCode_PayloadTooLarge, codes.ResourceExhausted},
	{tenants.ErrPartialBody, typev3.StatusCode_Forbidden, codes.PermissionDenied},
	{errTenant, typev3.StatusCode_Forbidden, codes.PermissionDenied},
	{tenants.ErrUnknown, typev3.StatusCode_Forbidden, codes.PermissionDenied},
	{tenants.ErrEntry, typev3.StatusCode_Forbidden, codes.PermissionDenied},
	{tenants.ErrNotLogged, typev3.StatusCode_ServiceUnavailable, codes.Unavailable},
	{policy.ErrUndefined, typev3.StatusCode_Forbidden, codes.Unknown},
	{policy.ErrConflict, typev3.StatusCode_Forbidden, codes.Unknown},
	{policy.ErrResult, typev3.StatusCode_Forbidden, codes.Unknown},
	{tenants.ErrPanic, typev3.StatusCode_InternalServerError, codes.Unknown},
	{tenants.ErrNotReady, typev3.StatusCode_ServiceUnavailable, codes.Unavailable},
	{tenants.ErrBusy, typev3.StatusCode_ServiceUnavailable, codes.Unavailable},
	{tenants.ErrDeadline, typev3.StatusCode_ServiceUnavailable, codes.DeadlineExceeded},
	{context.DeadlineExceeded, typev3.StatusCode_ServiceUnavailable, codes.DeadlineExceeded},
	{policy.ErrCanceled, typev3.StatusCode_ServiceUnavailable, codes.Canceled},
	{context.Canceled, typev3.StatusCode_ServiceUnavailable, codes.Canceled},
	{policy.ErrEval, typev3.StatusCode_InternalServerError, codes.Unknown},
	{policy.ErrEntry, typev3.StatusCode_InternalServerError, codes.Unknown},
}

// statusOf returns how what went wrong is answered.
func statusOf(err error) (typev3.StatusCode, codes.Code) {
	for _, f := range failures {
		if errors.Is(err, f.err) {
			return f.status, f.code
		}
	}
	return typev3.StatusCode_InternalServerError, codes.Unknown
}

// failureOf renders what went wrong. A response says no more than its HTTP
// status and the decision ID: what was wrong is for the log. An error is a gRPC
// status, as opa-envoy-plugin gives it.
func failureOf(err error, onError tenants.OnError, decisionID string) (*authv3.CheckResponse, error) {
	httpStatus, code := statusOf(err)
	metadata, _ := metadataOf(nil, decisionID)
	switch onError {
	case tenants.OnErrorUpstream:
		return nil, status.Error(code, err.Error())
	case tenants.OnErrorAllow:
		return &authv3.CheckResponse{Status: statusOK, HttpResponse: emptyOK, DynamicMetadata: metadata}, nil
	}
	return &authv3.CheckResponse{
		Status: statusDenied,
		HttpResponse: &authv3.CheckResponse_DeniedResponse{DeniedResponse: &authv3.DeniedHttpResponse{
			Status: &typev3.HttpStatus{Code: httpStatus},
		}},
		DynamicMetadata: metadata,
	}, nil
}
