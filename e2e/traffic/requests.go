package traffic

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"

	"google.golang.org/protobuf/encoding/protojson"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// BuiltIn names the requests that are made here instead of read from a file.
const BuiltIn = "built-in"

// Read reads requests from a file: a JSON array of CheckRequests, as protobuf
// has them in JSON, or one CheckRequest. BuiltIn is one GET request of a browser.
func Read(name string) ([]*authv3.CheckRequest, error) {
	if name == BuiltIn {
		return []*authv3.CheckRequest{Get("/orders/42?expand=items", nil)}, nil
	}
	text, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	var list []json.RawMessage
	if err := json.Unmarshal(text, &list); err != nil {
		list = []json.RawMessage{text}
	}
	requests := make([]*authv3.CheckRequest, len(list))
	for i, raw := range list {
		requests[i] = new(authv3.CheckRequest)
		if err := protojson.Unmarshal(raw, requests[i]); err != nil {
			return nil, fmt.Errorf("%s: request %d: %w", name, i, err)
		}
	}
	return requests, nil
}

// Name sets the tenant of a request, in the context extension "tenant".
func Name(req *authv3.CheckRequest, tenant string) {
	if req.Attributes == nil {
		req.Attributes = &authv3.AttributeContext{}
	}
	if req.Attributes.ContextExtensions == nil {
		req.Attributes.ContextExtensions = map[string]string{}
	}
	req.Attributes.ContextExtensions["tenant"] = tenant
}

// Get returns what Envoy sends for a GET request of a browser, with the headers
// that are given beside the usual ones.
func Get(path string, headers map[string]string) *authv3.CheckRequest {
	all := map[string]string{
		":authority":        "shop.example.com",
		":method":           "GET",
		":path":             path,
		":scheme":           "https",
		"accept":            "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
		"accept-encoding":   "gzip, deflate, br",
		"accept-language":   "en-GB,en;q=0.5",
		"cookie":            "theme=dark; consent=1",
		"sec-fetch-mode":    "navigate",
		"user-agent":        "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0",
		"x-forwarded-for":   "203.0.113.7",
		"x-forwarded-proto": "https",
		"x-request-id":      "5d1d1b6e-6d3c-4f8e-9f0c-1f9a7c1f7f11",
	}
	maps.Copy(all, headers)
	return &authv3.CheckRequest{Attributes: &authv3.AttributeContext{
		Source:          peer("203.0.113.7", 51234),
		Destination:     peer("10.0.0.5", 8443),
		MetadataContext: &corev3.Metadata{},
		Request: &authv3.AttributeContext_Request{
			Time: &timestamppb.Timestamp{Seconds: 1_700_000_000, Nanos: 123_456_000},
			Http: &authv3.AttributeContext_HttpRequest{
				Id:       "7382093487234987",
				Method:   "GET",
				Path:     path,
				Host:     "shop.example.com",
				Scheme:   "https",
				Protocol: "HTTP/1.1",
				Headers:  all,
			},
		},
	}}
}

func peer(ip string, port uint32) *authv3.AttributeContext_Peer {
	return &authv3.AttributeContext_Peer{Address: &corev3.Address{Address: &corev3.Address_SocketAddress{
		SocketAddress: &corev3.SocketAddress{Address: ip, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port}},
	}}}
}
