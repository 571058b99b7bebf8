package extauthz

import (
	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/policy"
)

// The functions of this file return those parts of a message that a policy can
// read, as the functions of attributes.go return all of it. A part that is a small
// message is there as a whole or not at all.

// slice returns an object of the members of s that there are: get returns one, or
// nil.
func (t *termMaker) slice(s *policy.Slice, get func(m *policy.Member) *ast.Term) *ast.Term {
	var buf [16]item
	items := buf[:0]
	for i := range s.Members {
		if v := get(&s.Members[i]); v != nil {
			items = append(items, item{s.Members[i].Key, v})
		}
	}
	return t.object(items)
}

// attributesSlice is to attributes what slice is to all.
func (t *termMaker) attributesSlice(s *policy.Slice, a *asked, headers pairs, decisionID string) *ast.Term {
	if s.Whole {
		return t.attributes(a, headers, decisionID)
	}
	return t.slice(s, func(m *policy.Member) *ast.Term {
		switch {
		case m.Name == "source" && a.source.there:
			return t.partySlice(m.Slice, &a.source)
		case m.Name == "destination" && a.destination.there:
			return t.partySlice(m.Slice, &a.destination)
		case m.Name == "request" && a.request.there:
			return t.requestSlice(m.Slice, a, headers)
		case m.Name == "contextExtensions" && len(a.extensions) > 0:
			return t.stringMapSlice(m.Slice, a.extensions)
		case m.Name == "metadataContext" && (a.metadata.there || decisionID != ""):
			return t.metadata(a.metadata.message, decisionID)
		case m.Name == "routeMetadataContext" && a.routeMetadata.there:
			return t.metadata(a.routeMetadata.message, "")
		case m.Name == "tlsSession" && a.tls.there:
			return t.tlsSession(a)
		}
		return nil
	})
}

func (t *termMaker) partySlice(s *policy.Slice, p *party) *ast.Term {
	if s.Whole {
		return t.party(p)
	}
	return t.slice(s, func(m *policy.Member) *ast.Term {
		switch {
		case m.Name == "address" && p.address.there:
			return t.address(&p.address)
		case m.Name == "service":
			return t.notEmpty(p.service)
		case m.Name == "labels" && len(p.labels) > 0:
			return t.stringMapSlice(m.Slice, p.labels)
		case m.Name == "principal":
			return t.notEmpty(p.principal)
		case m.Name == "certificate":
			return t.notEmpty(p.certificate)
		}
		return nil
	})
}

func (t *termMaker) requestSlice(s *policy.Slice, a *asked, headers pairs) *ast.Term {
	if s.Whole {
		return t.request(a, headers)
	}
	return t.slice(s, func(m *policy.Member) *ast.Term {
		switch {
		case m.Name == "time" && a.time.there:
			return t.instant(&a.time)
		case m.Name == "http" && a.http.there:
			return t.exchangeSlice(m.Slice, &a.http, headers)
		}
		return nil
	})
}

func (t *termMaker) exchangeSlice(s *policy.Slice, http *exchange, headers pairs) *ast.Term {
	if s.Whole {
		return t.exchange(http, headers)
	}
	return t.slice(s, func(m *policy.Member) *ast.Term {
		switch m.Name {
		case "headers":
			if len(headers) > 0 {
				return t.stringMapSlice(m.Slice, headers)
			}
		case "headerMap":
			if http.headerMap != nil {
				return t.message(http.headerMap.ProtoReflect())
			}
		case "size":
			if http.size != 0 {
				return t.int(http.size)
			}
		case "rawBody":
			if http.rawBody != "" {
				return t.bytes([]byte(http.rawBody))
			}
		case "id":
			return t.notEmpty(http.id)
		case "method":
			return t.notEmpty(http.method)
		case "path":
			return t.notEmpty(http.path)
		case "host":
			return t.notEmpty(http.host)
		case "scheme":
			return t.notEmpty(http.scheme)
		case "query":
			return t.notEmpty(http.query)
		case "fragment":
			return t.notEmpty(http.fragment)
		case "protocol":
			return t.notEmpty(http.protocol)
		case "body":
			return t.notEmpty(http.body)
		}
		return nil
	})
}

func (t *termMaker) stringMapSlice(s *policy.Slice, entries pairs) *ast.Term {
	if s.Whole {
		return t.stringMap(entries)
	}
	return t.slice(s, func(m *policy.Member) *ast.Term {
		if value, ok := entries.get(m.Name); ok {
			return t.string(value)
		}
		return nil
	})
}

// notEmpty returns a string field, which is absent where it is empty.
func (t *termMaker) notEmpty(s string) *ast.Term {
	if s == "" {
		return nil
	}
	return t.string(s)
}
