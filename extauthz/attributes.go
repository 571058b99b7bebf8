package extauthz

import (
	"github.com/open-policy-agent/opa/v1/ast"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
)

// The functions of this file return the messages that every check has as
// message in walk.go does, without reflection.

// attributes returns an AttributeContext with headers as the headers of its
// request and, unless it is empty, the decision ID in its metadata.
func (t *termMaker) attributes(a *authv3.AttributeContext, headers map[string]string, decisionID string) *ast.Term {
	var buf [8]item
	items := buf[:0]
	if p := a.GetSource(); p != nil {
		items = append(items, item{keySource, t.peer(p)})
	}
	if p := a.GetDestination(); p != nil {
		items = append(items, item{keyDestination, t.peer(p)})
	}
	if r := a.GetRequest(); r != nil {
		items = append(items, item{keyRequest, t.request(r, headers)})
	}
	if m := a.GetContextExtensions(); len(m) > 0 {
		items = append(items, item{keyContextExtensions, t.stringMap(m)})
	}
	if m := a.GetMetadataContext(); m != nil || decisionID != "" {
		items = append(items, item{keyMetadataContext, t.metadata(m, decisionID)})
	}
	if m := a.GetRouteMetadataContext(); m != nil {
		items = append(items, item{keyRouteMetadataContext, t.metadata(m, "")})
	}
	if s := a.GetTlsSession(); s != nil {
		var tls []item
		if s.Sni != "" {
			tls = append(tls, item{keySNI, t.string(s.Sni)})
		}
		items = append(items, item{keyTLSSession, t.object(tls)})
	}
	return t.object(items)
}

func (t *termMaker) peer(p *authv3.AttributeContext_Peer) *ast.Term {
	var buf [5]item
	items := buf[:0]
	if a := p.Address; a != nil {
		items = append(items, item{keyAddress, t.address(a)})
	}
	items = t.appendString(items, keyService, p.Service)
	if len(p.Labels) > 0 {
		items = append(items, item{keyLabels, t.stringMap(p.Labels)})
	}
	items = t.appendString(items, keyPrincipal, p.Principal)
	items = t.appendString(items, keyCertificate, p.Certificate)
	return t.object(items)
}

func (t *termMaker) address(a *corev3.Address) *ast.Term {
	socket, ok := a.Address.(*corev3.Address_SocketAddress)
	if !ok || socket.SocketAddress == nil {
		return t.message(a.ProtoReflect())
	}
	return t.object([]item{{keySocketAddress, t.socketAddress(socket.SocketAddress)}})
}

func (t *termMaker) socketAddress(a *corev3.SocketAddress) *ast.Term {
	var buf [7]item
	items := buf[:0]
	if a.Protocol != 0 {
		items = append(items, item{keyProtocol, t.int(int64(a.Protocol))})
	}
	items = t.appendString(items, keyAddress, a.Address)
	switch port := a.PortSpecifier.(type) {
	case *corev3.SocketAddress_PortValue:
		items = append(items, item{keyPortValue, t.uint(uint64(port.PortValue))})
	case *corev3.SocketAddress_NamedPort:
		items = append(items, item{keyNamedPort, t.string(port.NamedPort)})
	}
	items = t.appendString(items, keyResolverName, a.ResolverName)
	if a.Ipv4Compat {
		items = append(items, item{keyIPv4Compat, ast.InternedTerm(true)})
	}
	items = t.appendString(items, keyNetworkNamespaceFilepath, a.NetworkNamespaceFilepath)
	return t.object(items)
}

func (t *termMaker) request(r *authv3.AttributeContext_Request, headers map[string]string) *ast.Term {
	var buf [2]item
	items := buf[:0]
	if r.Time != nil {
		items = append(items, item{keyTime, t.timestamp(r.Time)})
	}
	if r.Http != nil {
		items = append(items, item{keyHTTP, t.http(r.Http, headers)})
	}
	return t.object(items)
}

func (t *termMaker) timestamp(ts *timestamppb.Timestamp) *ast.Term {
	var buf [2]item
	items := buf[:0]
	if ts.Seconds != 0 {
		items = append(items, item{keySeconds, t.int(ts.Seconds)})
	}
	if ts.Nanos != 0 {
		items = append(items, item{keyNanos, t.int(int64(ts.Nanos))})
	}
	return t.object(items)
}

func (t *termMaker) http(r *authv3.AttributeContext_HttpRequest, headers map[string]string) *ast.Term {
	var buf [13]item
	items := buf[:0]
	items = t.appendString(items, keyID, r.Id)
	items = t.appendString(items, keyMethod, r.Method)
	if len(headers) > 0 {
		items = append(items, item{keyHeaders, t.stringMap(headers)})
	}
	if r.HeaderMap != nil {
		items = append(items, item{keyHeaderMap, t.message(r.HeaderMap.ProtoReflect())})
	}
	items = t.appendString(items, keyPath, r.Path)
	items = t.appendString(items, keyHost, r.Host)
	items = t.appendString(items, keyScheme, r.Scheme)
	items = t.appendString(items, keyQuery, r.Query)
	items = t.appendString(items, keyFragment, r.Fragment)
	if r.Size != 0 {
		items = append(items, item{keySize, t.int(r.Size)})
	}
	items = t.appendString(items, keyProtocol, r.Protocol)
	items = t.appendString(items, keyBody, r.Body)
	if len(r.RawBody) > 0 {
		items = append(items, item{keyRawBody, t.bytes(r.RawBody)})
	}
	return t.object(items)
}

// metadata returns a Metadata with, unless it is empty, the decision ID at
// filterMetadata.open_policy_agent.decision_id. What stands there is overwritten.
func (t *termMaker) metadata(m *corev3.Metadata, decisionID string) *ast.Term {
	var buf [2]item
	items := buf[:0]
	if len(m.GetFilterMetadata()) > 0 || decisionID != "" {
		items = append(items, item{keyFilterMetadata, t.filterMetadata(m.GetFilterMetadata(), decisionID)})
	}
	if typed := m.GetTypedFilterMetadata(); len(typed) > 0 {
		members := make([]item, 0, len(typed))
		for namespace, value := range typed {
			members = append(members, item{t.string(namespace), t.message(value.ProtoReflect())})
		}
		items = append(items, item{keyTypedFilterMetadata, t.object(members)})
	}
	return t.object(items)
}

// openPolicyAgent is the namespace in which a policy finds the decision ID.
const openPolicyAgent = "open_policy_agent"

func (t *termMaker) filterMetadata(m map[string]*structpb.Struct, decisionID string) *ast.Term {
	var buf [8]item
	items := buf[:0]
	for namespace, s := range m {
		if namespace != openPolicyAgent || decisionID == "" {
			items = append(items, item{t.string(namespace), t.structOf(s)})
		}
	}
	if decisionID != "" {
		items = append(items, item{keyOpenPolicyAgent, t.openPolicyAgent(m[openPolicyAgent], decisionID)})
	}
	return t.object(items)
}

func (t *termMaker) openPolicyAgent(s *structpb.Struct, decisionID string) *ast.Term {
	var buf [4]item
	items := buf[:0]
	for k, v := range s.GetFields() {
		if k != "decision_id" {
			items = append(items, item{t.string(k), t.valueOf(v)})
		}
	}
	items = append(items, item{keyDecisionID, t.of(ast.String(decisionID))})
	return t.object(items)
}

// appendString appends a string field, which is absent where it is empty.
func (t *termMaker) appendString(items []item, key *ast.Term, s string) []item {
	if s == "" {
		return items
	}
	return append(items, item{key, t.string(s)})
}
