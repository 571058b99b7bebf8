package extauthz

import (
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/gatehouse-authz/gatehouse/tenants"
)

// asked is what a CheckRequest says. Its strings are parts of the text of the
// message. It is never changed once it is read, so that an input can be made of it
// at any time.
//
// The fields are those of envoy.service.auth.v3.AttributeContext; "there" says that
// a message is there, also one that is empty.
type asked struct {
	there               bool // the attributes
	source, destination party
	request             struct{ there bool }
	time                instant
	http                exchange
	extensions          pairs
	metadata            namespaces
	routeMetadata       namespaces
	tls                 struct {
		there bool
		sni   string
	}

	// Room for the entries of what most messages have.
	headerRoom    [20]pair
	extensionRoom [2]pair
}

// party is a Peer.
type party struct {
	there       bool
	address     address
	service     string
	labels      pairs
	principal   string
	certificate string
}

// address is an Address: a SocketAddress, or, where other is set, any.
type address struct {
	there, socket bool
	other         *corev3.Address

	protocol    int32
	address     string
	port        portKind
	portValue   uint32
	namedPort   string
	resolver    string
	ipv4Compat  bool
	networkFile string
}

type portKind int8

const (
	portNone portKind = iota
	portValue
	portNamed
)

// instant is a Timestamp.
type instant struct {
	there   bool
	seconds int64
	nanos   int32
}

// exchange is an HttpRequest.
type exchange struct {
	there     bool
	id        string
	method    string
	headers   pairs
	headerMap *corev3.HeaderMap
	path      string
	host      string
	scheme    string
	query     string
	fragment  string
	size      int64
	protocol  string
	body      string
	rawBody   string
}

// bodySize is that of the larger of the bodies.
func (http *exchange) bodySize() int { return max(len(http.body), len(http.rawBody)) }

// namespaces are a Metadata, which has nothing in it where message is nil.
type namespaces struct {
	there   bool
	message *corev3.Metadata
}

// small bounds the messages of which an input has parts, in bytes. Whoever keeps one
// string of such a message, like a cache of tokens, keeps all of it. Of a larger
// one each string is a copy.
const small = 16 << 10

// decode reads a CheckRequest from its text, of which it may keep parts. Its error
// wraps tenants.ErrInvalid: protobuf refuses the message.
//
// What Envoy sends is read here. Any other message is read by protobuf, which
// writes it again as everybody would: what comes twice, merged or overwritten as
// it is defined, comes once then, and what is not known is gone.
func (a *asked) decode(text string) error {
	d := decoder{own: len(text) > small}
	if d.checkRequest(a, text); !d.odd {
		return nil
	}
	usual, err := again(text)
	if err != nil {
		return fmt.Errorf("%w: %w", tenants.ErrInvalid, err)
	}
	*a, d = asked{}, decoder{own: len(usual) > small}
	if d.checkRequest(a, usual); d.odd {
		return fmt.Errorf("%w: message cannot be read", tenants.ErrInvalid)
	}
	return nil
}

// again returns the text of a message as protobuf writes it.
func again(text string) (string, error) {
	req := new(authv3.CheckRequest)
	if err := (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal([]byte(text), req); err != nil {
		return "", err
	}
	usual, err := proto.Marshal(req)
	return string(usual), err
}

func (d *decoder) checkRequest(a *asked, text string) {
	f := fields{rest: text}
	for f.next() {
		if f.tag == 1<<3|chunk {
			d.once(&a.there)
			d.attributes(a, f.text)
		}
	}
	d.done(&f)
}

func (d *decoder) attributes(a *asked, text string) {
	a.http.headers, a.extensions = a.headerRoom[:0], a.extensionRoom[:0]
	f := fields{rest: text}
	for f.next() {
		switch f.tag {
		case 1<<3 | chunk:
			d.once(&a.source.there)
			d.party(&a.source, f.text)
		case 2<<3 | chunk:
			d.once(&a.destination.there)
			d.party(&a.destination, f.text)
		case 4<<3 | chunk:
			d.once(&a.request.there)
			d.request(a, f.text)
		case 10<<3 | chunk:
			a.extensions = append(a.extensions, d.pair(f.text))
		case 11<<3 | chunk:
			d.once(&a.metadata.there)
			d.namespaces(&a.metadata, f.text)
		case 12<<3 | chunk:
			d.once(&a.tls.there)
			a.tls.sni = d.session(f.text)
		case 13<<3 | chunk:
			d.once(&a.routeMetadata.there)
			d.namespaces(&a.routeMetadata, f.text)
		}
	}
	d.distinct(a.extensions)
	d.done(&f)
}

func (d *decoder) party(p *party, text string) {
	f := fields{rest: text}
	for f.next() {
		switch f.tag {
		case 1<<3 | chunk:
			d.once(&p.address.there)
			d.address(&p.address, f.text)
		case 2<<3 | chunk:
			p.service = d.string(&f)
		case 3<<3 | chunk:
			p.labels = append(p.labels, d.pair(f.text))
		case 4<<3 | chunk:
			p.principal = d.string(&f)
		case 5<<3 | chunk:
			p.certificate = d.string(&f)
		}
	}
	d.distinct(p.labels)
	d.done(&f)
}

// address takes an Address: of its kinds there is one at a time.
func (d *decoder) address(a *address, text string) {
	f := fields{rest: text}
	for f.next() {
		switch f.tag {
		case 1<<3 | chunk:
			d.once(&a.socket)
			d.socketAddress(a, f.text)
		case 2<<3 | chunk, 3<<3 | chunk:
			a.other = new(corev3.Address)
		}
	}
	if d.done(&f); a.other != nil {
		d.message(text, a.other, 3)
	}
}

func (d *decoder) socketAddress(a *address, text string) {
	f := fields{rest: text}
	for f.next() {
		switch f.tag {
		case 1<<3 | varint:
			a.protocol = int32(f.number)
		case 2<<3 | chunk:
			a.address = d.string(&f)
		case 3<<3 | varint:
			a.port, a.portValue = portValue, uint32(f.number)
		case 4<<3 | chunk:
			a.port, a.namedPort = portNamed, d.string(&f)
		case 5<<3 | chunk:
			a.resolver = d.string(&f)
		case 6<<3 | varint:
			a.ipv4Compat = protowire.DecodeBool(f.number)
		case 7<<3 | chunk:
			a.networkFile = d.string(&f)
		}
	}
	d.done(&f)
}

func (d *decoder) request(a *asked, text string) {
	f := fields{rest: text}
	for f.next() {
		switch f.tag {
		case 1<<3 | chunk:
			d.once(&a.time.there)
			d.instant(&a.time, f.text)
		case 2<<3 | chunk:
			d.once(&a.http.there)
			d.exchange(&a.http, f.text)
		}
	}
	d.done(&f)
}

func (d *decoder) instant(t *instant, text string) {
	f := fields{rest: text}
	for f.next() {
		switch f.tag {
		case 1<<3 | varint:
			t.seconds = int64(f.number)
		case 2<<3 | varint:
			t.nanos = int32(f.number)
		}
	}
	d.done(&f)
}

func (d *decoder) exchange(http *exchange, text string) {
	f := fields{rest: text}
	for f.next() {
		switch f.tag {
		case 1<<3 | chunk:
			http.id = d.string(&f)
		case 2<<3 | chunk:
			http.method = d.string(&f)
		case 3<<3 | chunk:
			http.headers = append(http.headers, d.pair(f.text))
		case 4<<3 | chunk:
			http.path = d.string(&f)
		case 5<<3 | chunk:
			http.host = d.string(&f)
		case 6<<3 | chunk:
			http.scheme = d.string(&f)
		case 7<<3 | chunk:
			http.query = d.string(&f)
		case 8<<3 | chunk:
			http.fragment = d.string(&f)
		case 9<<3 | varint:
			http.size = int64(f.number)
		case 10<<3 | chunk:
			http.protocol = d.string(&f)
		case 11<<3 | chunk:
			http.body = d.string(&f)
		case 12<<3 | chunk:
			http.rawBody = d.bytes(&f)
		case 13<<3 | chunk:
			there := http.headerMap != nil
			d.once(&there)
			http.headerMap = new(corev3.HeaderMap)
			d.message(f.text, http.headerMap, 4)
		}
	}
	d.distinct(http.headers)
	d.done(&f)
}

func (d *decoder) namespaces(m *namespaces, text string) {
	if text == "" {
		return
	}
	m.message = new(corev3.Metadata)
	d.message(text, m.message, 2)
}

func (d *decoder) session(text string) (sni string) {
	f := fields{rest: text}
	for f.next() {
		if f.tag == 1<<3|chunk {
			sni = d.string(&f)
		}
	}
	d.done(&f)
	return sni
}

// message has protobuf read a message, which lies in so many others.
func (d *decoder) message(text string, m proto.Message, depth int) {
	options := proto.UnmarshalOptions{DiscardUnknown: true, RecursionLimit: protowire.DefaultRecursionLimit - depth}
	if err := options.Unmarshal([]byte(text), m); err != nil {
		d.odd = true
	}
}
