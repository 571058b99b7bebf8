package extauthz

import (
	"encoding/base64"
	"net/url"
	"slices"
	"strings"
	"sync"

	"google.golang.org/protobuf/proto"

	"github.com/gatehouse-authz/gatehouse/tenants"
)

// Estimates, in bytes, of what is kept of a check beside its text: the check
// itself, an entry of a map for which it has no room, and what protobuf makes of a
// byte.
const (
	sizeCheck  = 3 << 10
	sizePair   = 64
	sizeParsed = 16
)

var (
	_ tenants.Recorded = (*check)(nil)
	_ tenants.Recorded = (*plainInput)(nil)
)

// Weight implements tenants.Recorded.
func (c *check) Weight() int64 { return c.weight + c.asked.weight() }

// WriteInput implements tenants.Recorded.
func (c *check) WriteInput(w tenants.Writer, needs tenants.Needs) bool {
	return writeInput(w, &c.asked, c.question[0].DecisionID, needs, c.descriptors)
}

// Weight implements tenants.Recorded.
func (in *plainInput) Weight() int64 {
	n := int64(sizeCheck)
	if a := in.made(); a != nil {
		n += a.weight() + int64(a.http.bodySize())
		for _, h := range a.http.headers {
			n += int64(len(h.key) + len(h.value))
		}
	}
	return n
}

// WriteInput implements tenants.Recorded.
func (in *plainInput) WriteInput(w tenants.Writer, needs tenants.Needs) bool {
	a := in.made()
	return a != nil && writeInput(w, a, in.decisionID, needs, in.descriptors)
}

// weight estimates what is kept of a request beside itself and its text.
func (a *asked) weight() int64 {
	n := sizePair * int64(len(a.source.labels)+len(a.destination.labels)+
		max(0, len(a.http.headers)-len(a.headerRoom))+max(0, len(a.extensions)-len(a.extensionRoom)))
	parsed := func(there bool, m proto.Message) {
		if there {
			n += sizeParsed * int64(proto.Size(m))
		}
	}
	parsed(a.metadata.message != nil, a.metadata.message)
	parsed(a.routeMetadata.message != nil, a.routeMetadata.message)
	parsed(a.http.headerMap != nil, a.http.headerMap)
	parsed(a.source.address.other != nil, a.source.address.other)
	parsed(a.destination.address.other != nil, a.destination.address.other)
	return n
}

// writeInput writes the document that inputOf returns, all of it and without
// making it. It reports false where inputOf is to be asked.
func writeInput(w tenants.Writer, a *asked, decisionID string, needs tenants.Needs, descriptors map[string]*Descriptors) bool {
	d := documentWriters.Get().(*documentWriter)
	defer d.free()
	d.w = w
	path, query, _ := strings.Cut(a.http.path, "?")
	if int64(a.http.bodySize()) > needs.BodyBytes || !d.path.parse(path) || !d.query.parse(query) {
		return false
	}
	headers := headersOf(&a.http)

	w.Object()
	if a.there || decisionID != "" {
		w.Key("attributes")
		d.attributes(a, headers, decisionID)
	}
	truncated := false
	if !needs.SkipBody {
		r := bodyReader{terms: &d.terms, http: &a.http, headers: headers}
		if needs.ProtoDescriptor != "" {
			r.descriptorFile, r.descriptors = needs.ProtoDescriptor, descriptors[needs.ProtoDescriptor]
		}
		body, cut, err := r.read()
		if err != nil {
			return false
		}
		truncated = cut
		w.Key("parsed_body")
		if body == nil {
			w.Null()
		} else {
			w.Value(body.Value)
		}
	}
	w.Key("parsed_path")
	w.Array()
	for _, s := range d.path.segments {
		w.String(s)
	}
	w.EndArray()
	w.Key("parsed_query")
	d.parameters()
	d.text("source_principal", a.source.principal)
	if !needs.SkipBody {
		w.Key("truncated_body")
		w.Bool(truncated)
	}
	w.Key("version")
	w.Value(version.Value)
	w.EndObject()
	return true
}

// documentWriter writes the messages of a CheckRequest as the functions of
// attributes.go return them: their fields in the order of their names. What is rare
// it has these return, and writes that.
type documentWriter struct {
	w     tenants.Writer
	terms termMaker
	path  pathValues
	query queryValues
}

var documentWriters = sync.Pool{New: func() any { return new(documentWriter) }}

// free has d used for another document.
func (d *documentWriter) free() {
	*d = documentWriter{}
	documentWriters.Put(d)
}

// text writes a string field, which is absent where it is empty.
func (d *documentWriter) text(key, s string) {
	if s != "" {
		d.w.Key(key)
		d.w.String(s)
	}
}

// number writes a number field, which is absent where it is 0.
func (d *documentWriter) number(key string, n int64) {
	if n != 0 {
		d.w.Key(key)
		d.w.Int(n)
	}
}

// parameters writes an object of lists: the values of each name, in their order.
func (d *documentWriter) parameters() {
	q := &d.query
	d.w.Object()
	for i := 0; i < len(q.list); {
		name := q.list[i].key
		d.w.Key(name)
		d.w.Array()
		for ; i < len(q.list) && q.list[i].key == name; i++ {
			d.w.String(q.list[i].value)
		}
		d.w.EndArray()
	}
	d.w.EndObject()
}

func (d *documentWriter) pairs(key string, entries pairs) {
	if len(entries) == 0 {
		return
	}
	var room [32]pair
	sorted := append(room[:0], entries...)
	slices.SortFunc(sorted, func(a, b pair) int { return strings.Compare(a.key, b.key) })
	d.w.Key(key)
	d.w.Object()
	for i := range sorted {
		d.w.Key(sorted[i].key)
		d.w.String(sorted[i].value)
	}
	d.w.EndObject()
}

func (d *documentWriter) attributes(a *asked, headers pairs, decisionID string) {
	d.w.Object()
	d.pairs("contextExtensions", a.extensions)
	d.party("destination", &a.destination)
	switch {
	case a.metadata.message != nil || a.metadata.there && decisionID == "":
		d.w.Key("metadataContext")
		d.w.Value(d.terms.metadata(a.metadata.message, decisionID).Value)
	case decisionID != "":
		d.w.Key("metadataContext")
		d.w.Object()
		d.w.Key("filterMetadata")
		d.w.Object()
		d.w.Key(openPolicyAgent)
		d.w.Object()
		d.w.Key("decision_id")
		d.w.String(decisionID)
		d.w.EndObject()
		d.w.EndObject()
		d.w.EndObject()
	}
	if a.request.there {
		d.w.Key("request")
		d.w.Object()
		if a.http.there {
			d.w.Key("http")
			d.exchange(&a.http, headers)
		}
		if a.time.there {
			d.w.Key("time")
			d.w.Object()
			d.number("nanos", int64(a.time.nanos))
			d.number("seconds", a.time.seconds)
			d.w.EndObject()
		}
		d.w.EndObject()
	}
	if a.routeMetadata.there {
		d.w.Key("routeMetadataContext")
		d.w.Value(d.terms.metadata(a.routeMetadata.message, "").Value)
	}
	d.party("source", &a.source)
	if a.tls.there {
		d.w.Key("tlsSession")
		d.w.Object()
		d.text("sni", a.tls.sni)
		d.w.EndObject()
	}
	d.w.EndObject()
}

func (d *documentWriter) party(key string, p *party) {
	if !p.there {
		return
	}
	d.w.Key(key)
	d.w.Object()
	if p.address.there {
		d.w.Key("address")
		d.address(&p.address)
	}
	d.text("certificate", p.certificate)
	d.pairs("labels", p.labels)
	d.text("principal", p.principal)
	d.text("service", p.service)
	d.w.EndObject()
}

func (d *documentWriter) address(a *address) {
	if a.other != nil || !a.socket {
		d.w.Value(d.terms.address(a).Value)
		return
	}
	d.w.Object()
	d.w.Key("socketAddress")
	d.w.Object()
	d.text("address", a.address)
	if a.ipv4Compat {
		d.w.Key("ipv4Compat")
		d.w.Bool(true)
	}
	if a.port == portNamed {
		d.w.Key("namedPort")
		d.w.String(a.namedPort)
	}
	d.text("networkNamespaceFilepath", a.networkFile)
	if a.port == portValue {
		d.w.Key("portValue")
		d.w.Int(int64(a.portValue))
	}
	d.number("protocol", int64(a.protocol))
	d.text("resolverName", a.resolver)
	d.w.EndObject()
	d.w.EndObject()
}

func (d *documentWriter) exchange(http *exchange, headers pairs) {
	d.w.Object()
	d.text("body", http.body)
	d.text("fragment", http.fragment)
	if http.headerMap != nil {
		d.w.Key("headerMap")
		d.w.Value(d.terms.message(http.headerMap.ProtoReflect()).Value)
	}
	d.pairs("headers", headers)
	d.text("host", http.host)
	d.text("id", http.id)
	d.text("method", http.method)
	d.text("path", http.path)
	d.text("protocol", http.protocol)
	d.text("query", http.query)
	if http.rawBody != "" {
		d.w.Key("rawBody")
		d.w.String(base64.StdEncoding.EncodeToString([]byte(http.rawBody)))
	}
	d.text("scheme", http.scheme)
	d.number("size", http.size)
	d.w.EndObject()
}

// pathValues are the segments of a path.
type pathValues struct {
	segments []string
	room     [16]string
}

// parse reads a path as split does. It reports false where that has an error.
func (p *pathValues) parse(path string) bool {
	path, err := url.PathUnescape(path)
	if err != nil || strings.IndexByte(path, 0) >= 0 {
		return false
	}
	p.segments = p.room[:0]
	path = strings.TrimLeft(path, "/")
	for more := true; more; {
		var s string
		if s, path, more = strings.Cut(path, "/"); s == ".." {
			return false
		}
		p.segments = append(p.segments, s)
	}
	return true
}

// queryValues are the parameters of a query string, by name.
type queryValues struct {
	list pairs
	room [8]pair
}

// parse reads a query string as url.ParseQuery does. It reports false where that
// has an error.
func (q *queryValues) parse(query string) bool {
	q.list = q.room[:0]
	if strings.ContainsRune(query, ';') || strings.Count(query, "&") >= len(q.room) {
		values, err := url.ParseQuery(query)
		for name, list := range values {
			for _, value := range list {
				q.list = append(q.list, pair{name, value})
			}
		}
		q.sort()
		return err == nil
	}
	for query != "" {
		var text string
		text, query, _ = strings.Cut(query, "&")
		if text == "" {
			continue
		}
		key, value, _ := strings.Cut(text, "=")
		key, err := url.QueryUnescape(key)
		if err != nil {
			return false
		}
		if value, err = url.QueryUnescape(value); err != nil {
			return false
		}
		q.list = append(q.list, pair{key, value})
	}
	q.sort()
	return true
}

// sort sorts by name; the values of one stay in their order.
func (q *queryValues) sort() {
	slices.SortStableFunc(q.list, func(a, b pair) int { return strings.Compare(a.key, b.key) })
}
