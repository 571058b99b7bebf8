package extauthz

import (
	"github.com/open-policy-agent/opa/v1/ast"
)

// The keys of an input document and of its common messages.
var (
	keyAttributes      = intern("attributes")
	keyParsedBody      = intern("parsed_body")
	keyParsedPath      = intern("parsed_path")
	keyParsedQuery     = intern("parsed_query")
	keySourcePrincipal = intern("source_principal")
	keyTruncatedBody   = intern("truncated_body")
	keyVersion         = intern("version")

	keyAddress                  = intern("address")
	keyBody                     = intern("body")
	keyCertificate              = intern("certificate")
	keyContextExtensions        = intern("contextExtensions")
	keyDestination              = intern("destination")
	keyFilterMetadata           = intern("filterMetadata")
	keyFragment                 = intern("fragment")
	keyHeaderMap                = intern("headerMap")
	keyHeaders                  = intern("headers")
	keyHost                     = intern("host")
	keyHTTP                     = intern("http")
	keyID                       = intern("id")
	keyIPv4Compat               = intern("ipv4Compat")
	keyLabels                   = intern("labels")
	keyMetadataContext          = intern("metadataContext")
	keyMethod                   = intern("method")
	keyNamedPort                = intern("namedPort")
	keyNanos                    = intern("nanos")
	keyNetworkNamespaceFilepath = intern("networkNamespaceFilepath")
	keyPath                     = intern("path")
	keyPortValue                = intern("portValue")
	keyPrincipal                = intern("principal")
	keyProtocol                 = intern("protocol")
	keyQuery                    = intern("query")
	keyRawBody                  = intern("rawBody")
	keyRequest                  = intern("request")
	keyResolverName             = intern("resolverName")
	keyRouteMetadataContext     = intern("routeMetadataContext")
	keyScheme                   = intern("scheme")
	keySeconds                  = intern("seconds")
	keyService                  = intern("service")
	keySize                     = intern("size")
	keySNI                      = intern("sni")
	keySocketAddress            = intern("socketAddress")
	keySource                   = intern("source")
	keyTime                     = intern("time")
	keyTLSSession               = intern("tlsSession")
	keyTypedFilterMetadata      = intern("typedFilterMetadata")

	keyDecisionID      = intern("decision_id")
	keyOpenPolicyAgent = intern("open_policy_agent")
)

// common are strings that most requests have: names of headers and short values.
var common = internAll( // :: string → its term
	":authority", ":method", ":path", ":scheme",
	"accept", "accept-charset", "accept-encoding", "accept-language", "authorization", "cache-control",
	"content-encoding", "content-length", "content-type", "cookie", "dnt", "host", "if-modified-since",
	"if-none-match", "origin", "pragma", "range", "referer", "sec-ch-ua", "sec-ch-ua-mobile",
	"sec-ch-ua-platform", "sec-fetch-dest", "sec-fetch-mode", "sec-fetch-site", "sec-fetch-user", "te",
	"traceparent", "tracestate", "upgrade-insecure-requests", "user-agent", "via",
	"x-amzn-trace-id", "x-api-key", "x-b3-parentspanid", "x-b3-sampled", "x-b3-spanid", "x-b3-traceid",
	"x-envoy-attempt-count", "x-envoy-auth-partial-body", "x-envoy-decorator-operation",
	"x-envoy-expected-rq-timeout-ms", "x-envoy-external-address", "x-envoy-internal",
	"x-envoy-original-path", "x-envoy-peer-metadata", "x-envoy-peer-metadata-id",
	"x-forwarded-client-cert", "x-forwarded-for", "x-forwarded-host", "x-forwarded-port",
	"x-forwarded-proto", "x-real-ip", "x-request-id", "x-requested-with",

	"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE",
	"http", "https", "HTTP/1.0", "HTTP/1.1", "HTTP/2", "HTTP/3", "/", "true", "false", "tenant",
	"application/json", "application/grpc", "application/x-www-form-urlencoded", "*/*", "gzip",
)

// intern returns the term of s that the whole process shares. It is for the
// initialization of variables alone: what it fills is read without a lock.
func intern(s string) *ast.Term {
	ast.InternStringTerm(s)
	return ast.InternedTerm(s)
}

func internAll(strings ...string) map[string]*ast.Term {
	m := make(map[string]*ast.Term, len(strings))
	for _, s := range strings {
		m[s] = intern(s)
	}
	return m
}

// item is a member of an object.
type item = [2]*ast.Term

// termMaker makes the terms of one input document, many at a time: they live
// and die together.
type termMaker struct {
	free []ast.Term
	slab int // terms made last
}

// slabs are how many terms are made at once: what is read of an input has a few
// that are not shared, a typical one about 50.
const minSlab, maxSlab = 16, 48

func (t *termMaker) of(v ast.Value) *ast.Term {
	if len(t.free) == 0 {
		t.slab = min(max(4*t.slab, minSlab), maxSlab)
		t.free = make([]ast.Term, t.slab)
	}
	term := &t.free[0]
	t.free = t.free[1:]
	term.Value = v
	return term
}

func (t *termMaker) string(s string) *ast.Term {
	if term, ok := common[s]; ok {
		return term
	}
	return t.of(ast.String(s))
}

// strings returns an array of the strings.
func (t *termMaker) strings(list []string) *ast.Term {
	terms := make([]*ast.Term, len(list)) // the array keeps it
	for i, s := range list {
		terms[i] = t.string(s)
	}
	return t.of(ast.NewArray(terms...))
}

// stringMap returns an object of the strings.
func (t *termMaker) stringMap(entries pairs) *ast.Term {
	var buf [32]item
	items := buf[:0]
	for _, p := range entries {
		items = append(items, item{t.string(p.key), t.string(p.value)})
	}
	return t.object(items)
}

// object returns an object of the items, whose keys differ.
func (t *termMaker) object(items []item) *ast.Term {
	if len(items) == 0 {
		return ast.InternedEmptyObject
	}
	return t.of(ast.NewObject(items...))
}
