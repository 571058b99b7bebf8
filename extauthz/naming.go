package extauthz

import (
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"

	"github.com/gatehouse-authz/gatehouse/tenants"
)

// name has a response name its decision in a header, where the tenant wants that.
// Whatever the client, or the policy, says in a header of this name is overwritten
// or taken away. A nil response, of an RPC error, has none.
func name(resp *authv3.CheckResponse, n *tenants.Naming, decisionID string) {
	if resp == nil {
		return
	}
	header := &corev3.HeaderValueOption{
		Header: &corev3.HeaderValue{Key: n.Header, Value: decisionID},
		//lint:ignore SA1019 Envoy reads append_action of such a header only where append is absent, and not in all versions
		Append: overwrite,
	}
	if resp.GetStatus().GetCode() != 0 {
		if !n.Client {
			return
		}
		denied := resp.GetDeniedResponse()
		if denied == nil { // what Envoy answers where there is none
			denied = &authv3.DeniedHttpResponse{Status: &typev3.HttpStatus{Code: typev3.StatusCode_Forbidden}}
			resp.HttpResponse = &authv3.CheckResponse_DeniedResponse{DeniedResponse: denied}
		}
		denied.Headers = append(others(denied.Headers, n.Header), header)
		return
	}
	old := resp.GetOkResponse() // may be one that responses share
	allowed := &authv3.OkHttpResponse{
		Headers:                 others(old.GetHeaders(), n.Header),
		HeadersToRemove:         slices.DeleteFunc(slices.Clone(old.GetHeadersToRemove()), func(h string) bool { return strings.EqualFold(h, n.Header) }),
		ResponseHeadersToAdd:    others(old.GetResponseHeadersToAdd(), n.Header),
		QueryParametersToSet:    old.GetQueryParametersToSet(),
		QueryParametersToRemove: old.GetQueryParametersToRemove(),
	}
	if n.Upstream {
		allowed.Headers = append(allowed.Headers, header)
	} else {
		allowed.HeadersToRemove = append(allowed.HeadersToRemove, n.Header)
	}
	if n.Client {
		allowed.ResponseHeadersToAdd = append(allowed.ResponseHeadersToAdd, header)
	}
	resp.HttpResponse = &authv3.CheckResponse_OkResponse{OkResponse: allowed}
}

// others returns the headers that have another name, and room for one more.
func others(headers []*corev3.HeaderValueOption, name string) []*corev3.HeaderValueOption {
	rest := make([]*corev3.HeaderValueOption, 0, len(headers)+1)
	for _, h := range headers {
		if !strings.EqualFold(h.GetHeader().GetKey(), name) {
			rest = append(rest, h)
		}
	}
	return rest
}
