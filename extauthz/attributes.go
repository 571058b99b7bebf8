package extauthz

import (
	"github.com/open-policy-agent/opa/v1/ast"
	"google.golang.org/protobuf/types/known/structpb"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
)

// The functions of this file return the messages that every check has as
// message in walk.go does, without reflection.

// attributes returns an AttributeContext with headers as the headers of its
// request and, unless it is empty, the decision ID in its metadata.
func (t *termMaker) attributes(a *asked, headers pairs, decisionID string) *ast.Term {
	var buf [8]item
	items := buf[:0]
	if a.source.there {
		items = append(items, item{keySource, t.party(&a.source)})
	}
	if a.destination.there {
		items = append(items, item{keyDestination, t.party(&a.destination)})
	}
	if a.request.there {
		items = append(items, item{keyRequest, t.request(a, headers)})
	}
	if len(a.extensions) > 0 {
		items = append(items, item{keyContextExtensions, t.stringMap(a.extensions)})
	}
	if a.metadata.there || decisionID != "" {
		items = append(items, item{keyMetadataContext, t.metadata(a.metadata.message, decisionID)})
	}
	if a.routeMetadata.there {
		items = append(items, item{keyRouteMetadataContext, t.metadata(a.routeMetadata.message, "")})
	}
	if a.tls.there {
		items = append(items, item{keyTLSSession, t.tlsSession(a)})
	}
	return t.object(items)
}

func (t *termMaker) tlsSession(a *asked) *ast.Term {
	return t.object(t.appendString(nil, keySNI, a.tls.sni))
}

func (t *termMaker) party(p *party) *ast.Term {
	var buf [5]item
	items := buf[:0]
	if p.address.there {
		items = append(items, item{keyAddress, t.address(&p.address)})
	}
	items = t.appendString(items, keyService, p.service)
	if len(p.labels) > 0 {
		items = append(items, item{keyLabels, t.stringMap(p.labels)})
	}
	items = t.appendString(items, keyPrincipal, p.principal)
	items = t.appendString(items, keyCertificate, p.certificate)
	return t.object(items)
}

func (t *termMaker) address(a *address) *ast.Term {
	switch {
	case a.other != nil:
		return t.message(a.other.ProtoReflect())
	case !a.socket:
		return ast.InternedEmptyObject
	}
	return t.object([]item{{keySocketAddress, t.socketAddress(a)}})
}

func (t *termMaker) socketAddress(a *address) *ast.Term {
	var buf [7]item
	items := buf[:0]
	if a.protocol != 0 {
		items = append(items, item{keyProtocol, t.int(int64(a.protocol))})
	}
	items = t.appendString(items, keyAddress, a.address)
	switch a.port {
	case portValue:
		items = append(items, item{keyPortValue, t.uint(uint64(a.portValue))})
	case portNamed:
		items = append(items, item{keyNamedPort, t.string(a.namedPort)})
	}
	items = t.appendString(items, keyResolverName, a.resolver)
	if a.ipv4Compat {
		items = append(items, item{keyIPv4Compat, ast.InternedTerm(true)})
	}
	items = t.appendString(items, keyNetworkNamespaceFilepath, a.networkFile)
	return t.object(items)
}

func (t *termMaker) request(a *asked, headers pairs) *ast.Term {
	var buf [2]item
	items := buf[:0]
	if a.time.there {
		items = append(items, item{keyTime, t.instant(&a.time)})
	}
	if a.http.there {
		items = append(items, item{keyHTTP, t.exchange(&a.http, headers)})
	}
	return t.object(items)
}

func (t *termMaker) instant(i *instant) *ast.Term {
	var buf [2]item
	items := buf[:0]
	if i.seconds != 0 {
		items = append(items, item{keySeconds, t.int(i.seconds)})
	}
	if i.nanos != 0 {
		items = append(items, item{keyNanos, t.int(int64(i.nanos))})
	}
	return t.object(items)
}

func (t *termMaker) exchange(http *exchange, headers pairs) *ast.Term {
	var buf [13]item
	items := buf[:0]
	items = t.appendString(items, keyID, http.id)
	items = t.appendString(items, keyMethod, http.method)
	if len(headers) > 0 {
		items = append(items, item{keyHeaders, t.stringMap(headers)})
	}
	if http.headerMap != nil {
		items = append(items, item{keyHeaderMap, t.message(http.headerMap.ProtoReflect())})
	}
	items = t.appendString(items, keyPath, http.path)
	items = t.appendString(items, keyHost, http.host)
	items = t.appendString(items, keyScheme, http.scheme)
	items = t.appendString(items, keyQuery, http.query)
	items = t.appendString(items, keyFragment, http.fragment)
	if http.size != 0 {
		items = append(items, item{keySize, t.int(http.size)})
	}
	items = t.appendString(items, keyProtocol, http.protocol)
	items = t.appendString(items, keyBody, http.body)
	if http.rawBody != "" {
		items = append(items, item{keyRawBody, t.bytes([]byte(http.rawBody))})
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
