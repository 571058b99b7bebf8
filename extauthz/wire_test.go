package extauthz

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"

	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/gatehouse-authz/gatehouse/tenants"
)

// askedOf returns what protobuf has read of a CheckRequest.
func askedOf(req *authv3.CheckRequest) *asked {
	a := new(asked)
	attributes := req.GetAttributes()
	if attributes == nil {
		return a
	}
	a.there = true
	a.source, a.destination = partyOf(attributes.Source), partyOf(attributes.Destination)
	a.extensions = pairsOf(attributes.ContextExtensions)
	a.metadata = namespaces{attributes.MetadataContext != nil, attributes.MetadataContext}
	a.routeMetadata = namespaces{attributes.RouteMetadataContext != nil, attributes.RouteMetadataContext}
	a.tls.there, a.tls.sni = attributes.TlsSession != nil, attributes.TlsSession.GetSni()
	a.request.there = attributes.Request != nil
	if t := attributes.Request.GetTime(); t != nil {
		a.time = instant{true, t.Seconds, t.Nanos}
	}
	if h := attributes.Request.GetHttp(); h != nil {
		a.http = exchange{
			there: true, id: h.Id, method: h.Method, headers: pairsOf(h.Headers), headerMap: h.HeaderMap, path: h.Path, host: h.Host,
			scheme: h.Scheme, query: h.Query, fragment: h.Fragment, size: h.Size, protocol: h.Protocol, body: h.Body, rawBody: string(h.RawBody),
		}
	}
	return a
}

func pairsOf(m map[string]string) (p pairs) {
	for k, v := range m {
		p = append(p, pair{k, v})
	}
	return p
}

func partyOf(p *authv3.AttributeContext_Peer) party {
	if p == nil {
		return party{}
	}
	own := party{there: true, service: p.Service, labels: pairsOf(p.Labels), principal: p.Principal, certificate: p.Certificate}
	if p.Address == nil {
		return own
	}
	own.address.there = true
	socket, ok := p.Address.Address.(*corev3.Address_SocketAddress)
	if !ok {
		own.address.other = p.Address
		return own
	}
	s := socket.SocketAddress
	own.address = address{
		there: true, socket: true, protocol: int32(s.Protocol), address: s.Address, resolver: s.ResolverName,
		ipv4Compat: s.Ipv4Compat, networkFile: s.NetworkNamespaceFilepath,
	}
	switch port := s.PortSpecifier.(type) {
	case *corev3.SocketAddress_PortValue:
		own.address.port, own.address.portValue = portValue, port.PortValue
	case *corev3.SocketAddress_NamedPort:
		own.address.port, own.address.namedPort = portNamed, port.NamedPort
	}
	return own
}

// wireRouter finds tenants in every way in which a message can name one.
func wireRouter(t testing.TB) *router {
	t.Helper()
	r, err := newRouter([]Resolver{
		{ContextExtension: "tenant"}, {RouteMetadata: &MetadataKey{"a", "s"}},
		{Header: "x-tenant"}, {Host: &NameMap{Pattern: `(.+)\.example\.com`}},
	}, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// compareWire checks that a message gives what protobuf makes of it: an error
// where that has one, the same tenant, the same trace, the same document or the
// same refusal.
func compareWire(t testing.TB, r *router, data []byte) (taken bool) {
	t.Helper()
	req := new(authv3.CheckRequest)
	wantErr := proto.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(data, req)
	got := new(asked)
	err := got.decode(string(data))
	if (err != nil) != (wantErr != nil) || err != nil && !errors.Is(err, tenants.ErrInvalid) {
		t.Fatalf("%x: got error %v, protobuf has %v", data, err, wantErr)
	}
	if err != nil {
		return false
	}
	want := askedOf(req)

	ctx := metadata.NewIncomingContext(context.Background(), metadata.MD{})
	id, err := r.tenantOf(ctx, got)
	wantID, wantErr := r.tenantOf(ctx, want)
	if id != wantID || (err != nil) != (wantErr != nil) {
		t.Fatalf("%v: got tenant %q, %v, want %q, %v", req, id, err, wantID, wantErr)
	}
	if g, w := traceOf(ctx, got, nil), traceOf(ctx, want, nil); g != w {
		t.Fatalf("%v: got trace %v, want %v", req, g, w)
	}
	if g, w := entryOf(got), entryOf(want); g != w || got.http.bodySize() != want.http.bodySize() {
		t.Fatalf("%v: got entry point %q and a body of %d, want %q, %d", req, g, got.http.bodySize(), w, want.http.bodySize())
	}
	for _, id := range []string{"", "id"} {
		needs := tenants.Needs{All: true, BodyBytes: 100}
		v, err := inputOf(got, id, needs, nil)
		w, wantErr := inputOf(want, id, needs, nil)
		if (err == nil) != (wantErr == nil) || err != nil && err.Error() != wantErr.Error() {
			t.Fatalf("%v: got %v, want %v", req, err, wantErr)
		}
		if err == nil && (v.Compare(w) != 0 || v.Hash() != w.Hash() || v.String() != w.String()) {
			t.Fatalf("%v:\ngot  %v\nwant %v", req, v, w)
		}
	}
	compareWalk(t, req)
	return true
}

// pieces writes a message field by field, as nobody would: in any order, what is
// there once again, with parts that are not known or not of their type.
type pieces struct {
	*rand.Rand
	wrong bool // it may be refused
}

func (p *pieces) message(d protoreflect.MessageDescriptor, depth int) (data []byte) {
	for range p.IntN(1 + min(8, 2*d.Fields().Len())) {
		if p.IntN(12) == 0 {
			data = p.unknown(data, depth)
			continue
		}
		data = p.field(data, d.Fields().Get(p.IntN(d.Fields().Len())), depth)
	}
	if p.wrong && len(data) > 0 && p.IntN(60) == 0 {
		data[p.IntN(len(data))] ^= 1 << p.IntN(8)
	}
	return data
}

func (p *pieces) field(data []byte, fd protoreflect.FieldDescriptor, depth int) []byte {
	kind := protowire.BytesType
	switch fd.Kind() {
	case protoreflect.StringKind, protoreflect.BytesKind, protoreflect.MessageKind:
	case protoreflect.DoubleKind:
		kind = protowire.Fixed64Type
	default:
		kind = protowire.VarintType
	}
	if p.IntN(40) == 0 {
		kind = []protowire.Type{protowire.VarintType, protowire.Fixed32Type, protowire.Fixed64Type, protowire.BytesType}[p.IntN(4)]
	}
	data = protowire.AppendTag(data, fd.Number(), kind)
	switch kind {
	case protowire.VarintType:
		return p.number(data)
	case protowire.Fixed32Type:
		return protowire.AppendFixed32(data, p.Uint32())
	case protowire.Fixed64Type:
		return protowire.AppendFixed64(data, p.Uint64())
	}
	if fd.Message() != nil {
		if depth > 12 {
			return protowire.AppendBytes(data, nil)
		}
		return protowire.AppendBytes(data, p.message(fd.Message(), depth+1))
	}
	text := []string{
		"", "a", "s", "tenant", "orders", "x-tenant", "ä", "content-type", "application/json", "a.example.com", "/a/b?c=d", "{}", `{"a":1,"a":2}`,
		"open_policy_agent", "decision_id", "traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", strings.Repeat("x", 200),
	}[p.IntN(18)]
	if p.wrong && p.IntN(60) == 0 {
		text = "\xff" + text
	}
	return protowire.AppendString(data, text)
}

// number appends a number, sometimes longer than it must be.
func (p *pieces) number(data []byte) []byte {
	v := []uint64{0, 1, 2, 80, 300, 1 << 31, 1<<32 + 1, 1<<63 - 1, 1 << 63, 1<<64 - 1}[p.IntN(10)]
	data = protowire.AppendVarint(data, v)
	if p.IntN(10) == 0 && v < 1<<60 {
		data[len(data)-1] |= 0x80
		data = append(data, 0)
	}
	return data
}

// unknown appends a field of a number that no message has, or something that is no
// field at all.
func (p *pieces) unknown(data []byte, depth int) []byte {
	number := protowire.Number(100 + p.IntN(3)*1000)
	kind := protowire.Type(p.IntN(6))
	switch {
	case kind == protowire.StartGroupType && depth < 12:
		data = protowire.AppendTag(data, number, kind)
		data = p.unknown(data, depth+1)
		return protowire.AppendTag(data, number, protowire.EndGroupType)
	case kind == protowire.BytesType:
		return protowire.AppendString(protowire.AppendTag(data, number, kind), "unknown")
	case kind == protowire.Fixed32Type:
		return protowire.AppendFixed32(protowire.AppendTag(data, number, kind), 1)
	case kind == protowire.Fixed64Type:
		return protowire.AppendFixed64(protowire.AppendTag(data, number, kind), 1)
	case p.wrong && p.IntN(20) == 0:
		return [][]byte{append(data, 0, 0), append(data, 0x0c), append(data, 0x0e), append(data, 0x0f), append(data, 0x0b), append(data, 0x82)}[p.IntN(6)]
	}
	return p.number(protowire.AppendTag(data, number, protowire.VarintType))
}

// TestWirePieces: any mixture of fields gives what protobuf makes of it.
func TestWirePieces(t *testing.T) {
	r := wireRouter(t)
	taken := 0
	const rounds = 4000
	for seed := range uint64(rounds) {
		p := pieces{rand.New(rand.NewPCG(seed, 0)), seed%2 == 0}
		if compareWire(t, r, p.message((*authv3.CheckRequest)(nil).ProtoReflect().Descriptor(), 0)) {
			taken++
		}
	}
	if taken < rounds/2 || taken == rounds {
		t.Errorf("%d of %d messages were taken", taken, rounds)
	}
}

// nested is a field that is a chunk.
func nested(number protowire.Number, data []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, number, protowire.BytesType), data)
}

// TestWire: what protobuf defines for messages that nobody writes.
func TestWire(t *testing.T) {
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	text := func(number protowire.Number, s string) []byte { return nested(number, []byte(s)) }
	http := func(parts ...[]byte) []byte { return nested(1, nested(4, nested(2, join(parts...)))) }
	source := func(parts ...[]byte) []byte { return nested(1, nested(1, join(parts...))) }
	number := func(number protowire.Number, v uint64) []byte {
		return protowire.AppendVarint(protowire.AppendTag(nil, number, protowire.VarintType), v)
	}
	value := func(depth int) []byte { // a Value that holds lists that hold lists
		data := number(4, 1)
		for range depth {
			data = nested(6, nested(1, data))
		}
		return data
	}
	metadata := func(field protowire.Number, v []byte) []byte {
		return nested(1, nested(field, nested(1, join(text(1, "a"), nested(2, nested(1, join(text(1, "s"), nested(2, v))))))))
	}
	group := func(n int) []byte {
		var data []byte
		for range n {
			data = protowire.AppendTag(data, 100, protowire.StartGroupType)
		}
		for range n {
			data = protowire.AppendTag(data, 100, protowire.EndGroupType)
		}
		return data
	}
	many := func(n int) (entries [][]byte) { // the first key is there again
		for i := range n {
			entries = append(entries, nested(3, join(text(1, strings.Repeat("a", max(i, 1))), number(7, 1))))
		}
		return entries
	}
	r := wireRouter(t)
	for name, c := range map[string]struct {
		data  []byte
		taken bool
	}{
		"nothing":                       {nil, true},
		"attributes twice":              {join(http(text(2, "GET")), http(text(4, "/a"))), true},
		"string twice":                  {http(text(2, "GET"), text(2, "POST")), true},
		"string twice, once not UTF-8":  {http(text(2, "\xff"), text(2, "POST")), false},
		"key twice":                     {http(nested(3, join(text(1, "a"), text(2, "1"))), nested(3, join(text(1, "a"), text(2, "2")))), true},
		"key twice among many":          {http(many(40)...), true},
		"many keys":                     {http(many(40)[1:]...), true},
		"key after value":               {http(nested(3, join(text(2, "1"), text(1, "a")))), true},
		"no key":                        {http(nested(3, text(2, "1"))), true},
		"no value":                      {http(nested(3, text(1, "a"))), true},
		"empty entry":                   {http(nested(3, nil)), true},
		"entry that says all twice":     {http(nested(3, join(text(1, "a"), text(2, "1"), text(1, "b"), text(2, "2")))), true},
		"entry with more":               {http(nested(3, join(text(1, "a"), number(7, 1), text(2, "1")))), true},
		"entry with a group":            {http(nested(3, join(text(1, "a"), group(1)))), true},
		"entry whose value is a number": {http(nested(3, join(text(1, "a"), number(2, 1)))), true},
		"key that is not UTF-8":         {http(nested(3, text(1, "\xff"))), false},
		"value that is not UTF-8":       {http(nested(3, join(text(1, "a"), text(2, "\xc3")))), false},
		"bytes that are not UTF-8":      {http(nested(12, []byte("\xff"))), true},
		"unknown that is not UTF-8":     {http(text(99, "\xff")), true},
		"known as another type":         {http(number(2, 7), text(9, "x")), true},
		"two ports":                     {source(nested(1, nested(1, join(number(3, 80), text(4, "http"))))), true},
		"two ports, the number last":    {source(nested(1, nested(1, join(text(4, "http"), number(3, 80))))), true},
		"two kinds of address":          {source(nested(1, join(nested(1, text(2, "10.0.0.1")), nested(2, text(1, "/p"))))), true},
		"socket address last":           {source(nested(1, join(nested(2, text(1, "/p")), nested(1, text(2, "10.0.0.1"))))), true},
		"socket address twice":          {source(nested(1, join(nested(1, text(2, "10.0.0.1")), nested(1, number(3, 80))))), true},
		"address twice":                 {source(nested(1, nested(1, text(2, "10.0.0.1"))), nested(1, nested(2, text(1, "/p")))), true},
		"port over 32 bits":             {source(nested(1, nested(1, number(3, 1<<32+80)))), true},
		"long varint":                   {http([]byte{9 << 3, 0x81, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x00}), true},
		"varint of 11 bytes":            {http([]byte{9 << 3, 0x81, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x00}), false},
		"varint over 64 bits":           {http([]byte{9 << 3, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02}), false},
		"varint without an end":         {http([]byte{9 << 3, 0x81}), false},
		"tag longer than it must be":    {http(append([]byte{2<<3 | 2 | 0x80, 0x00, 3}, "GET"...)), true},
		"field 0":                       {http([]byte{0, 0}), false},
		"field over the last":           {http(protowire.AppendVarint(nil, 1<<32)), false},
		"last field":                    {http(protowire.AppendVarint(nil, (1<<29-1)<<3), []byte{0}), true},
		"longer than it is":             {http([]byte{2<<3 | 2, 4, 'G', 'E', 'T'}), false},
		"no length":                     {http([]byte{2<<3 | 2}), false},
		"huge length":                   {http(append([]byte{2<<3 | 2}, protowire.AppendVarint(nil, 1<<64-1)...)), false},
		"group":                         {http(group(1)), true},
		"groups in groups":              {http(group(100)), true},
		"group without an end":          {http(group(1)[:2]), false},
		"end of no group":               {http(group(1)[2:]), false},
		"type 6":                        {http([]byte{1<<3 | 6}), false},
		"fixed":                         {http(protowire.AppendFixed32(protowire.AppendTag(nil, 50, protowire.Fixed32Type), 1)), true},
		"half of one":                   {http(protowire.AppendTag(nil, 50, protowire.Fixed64Type), []byte{1, 2, 3}), false},
		"half of one of 32 bits":        {http(protowire.AppendTag(nil, 50, protowire.Fixed32Type), []byte{1, 2, 3}), false},
		"much that is not known":        {http(text(2, "GET"), nested(77, make([]byte, 3*small))), true},
		"much that is said again":       {http(text(4, strings.Repeat("/", 3*small)), text(4, "/a")), true},
		"metadata":                      {metadata(11, value(1)), true},
		"metadata twice":                {join(metadata(11, value(1)), metadata(11, value(2))), true},
		"route metadata":                {metadata(13, text(3, "orders")), true},
		"metadata, the deepest":         {metadata(13, value(4996)), true},
		"metadata, too deep":            {metadata(11, value(4997)), false},
		"metadata, not UTF-8":           {metadata(11, text(3, "\xff")), false},
		"groups, too deep":              {http(group(10_002)), false},
		"header map twice":              {http(nested(13, nested(1, text(1, "a"))), nested(13, nested(1, text(1, "b")))), true},
		"header map, not UTF-8":         {http(nested(13, nested(1, text(2, "\xff")))), false},
		"pipe, not UTF-8":               {source(nested(1, nested(2, text(1, "\xff")))), false},
		"no session":                    {nested(1, nested(12, nil)), true},
		"session twice":                 {nested(1, join(nested(12, text(1, "a")), nested(12, nil))), true},
		"time twice":                    {nested(1, nested(4, join(nested(1, number(1, 5)), nested(1, number(2, 6))))), true},
	} {
		t.Run(name, func(t *testing.T) {
			if got := compareWire(t, r, c.data); got != c.taken {
				t.Errorf("taken: got %t, want %t", got, c.taken)
			}
		})
	}
}

// TestKept: of a large message nobody keeps all who keeps a string of it.
func TestKept(t *testing.T) {
	for _, size := range []int{small / 2, small, 1 << 20} {
		req := benchmarkRequest()
		req.Attributes.Request.Http.Body = strings.Repeat("x", size)
		data, err := proto.Marshal(req)
		if err != nil {
			t.Fatal(err)
		}
		text := string(data)
		a := new(asked)
		if n := testing.AllocsPerRun(1, func() { *a = asked{}; err = a.decode(text) }); err != nil || (n < 1) != (len(text) <= small) {
			t.Errorf("a message of %d bytes: %v, %v allocations", len(text), err, n)
		}
	}
}

func FuzzWire(f *testing.F) {
	seedRequests(f)
	for seed := range uint64(50) {
		p := pieces{rand.New(rand.NewPCG(seed, 1)), true}
		f.Add(p.message((*authv3.CheckRequest)(nil).ProtoReflect().Descriptor(), 0))
	}
	for i, req := range recordedRequests(f) {
		if i%8 != 0 {
			continue
		}
		data, err := proto.Marshal(req)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	r := wireRouter(f)
	f.Fuzz(func(t *testing.T, data []byte) { compareWire(t, r, data) })
}
