package extauthz

import (
	"context"
	"errors"
	"strings"
	"testing"

	"google.golang.org/grpc/metadata"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/gatehouse-authz/gatehouse/tenants"
)

// routed is a check as a test of resolvers has it: "key=value" is a context
// extension, "route.ns.key=value" route metadata, ":authority=value" of the call,
// "host=value" of the request, "header.name=value" a header.
func routed(t testing.TB, text string) (context.Context, *authv3.CheckRequest) {
	t.Helper()
	req := request(t, `{"attributes":{"request":{"http":{}}}}`)
	ctx := t.Context()
	for field := range strings.FieldsSeq(text) {
		key, value, _ := strings.Cut(field, "=")
		http := req.Attributes.Request.Http
		switch {
		case key == ":authority":
			ctx = metadata.NewIncomingContext(ctx, metadata.Pairs(":authority", value))
		case key == "host":
			http.Host = value
		case strings.HasPrefix(key, "header."):
			if http.Headers == nil {
				http.Headers = map[string]string{}
			}
			http.Headers[key[len("header."):]] = value
		case strings.HasPrefix(key, "raw."):
			if http.HeaderMap == nil {
				http.HeaderMap = &corev3.HeaderMap{}
			}
			http.HeaderMap.Headers = append(http.HeaderMap.Headers, &corev3.HeaderValue{Key: key[len("raw."):], RawValue: []byte(value)})
		case strings.HasPrefix(key, "route."):
			parts := strings.SplitN(key, ".", 3)
			if value == "7" {
				req.Attributes.RouteMetadataContext = request(t, `{"attributes":{"routeMetadataContext":{"filterMetadata":{"`+parts[1]+`":{"`+parts[2]+`":7}}}}}`).Attributes.RouteMetadataContext
			} else {
				req.Attributes.RouteMetadataContext = request(t, `{"attributes":{"routeMetadataContext":{"filterMetadata":{"`+parts[1]+`":{"`+parts[2]+`":"`+value+`"}}}}}`).Attributes.RouteMetadataContext
			}
		default:
			if req.Attributes.ContextExtensions == nil {
				req.Attributes.ContextExtensions = map[string]string{}
			}
			req.Attributes.ContextExtensions[key] = value
		}
	}
	return ctx, req
}

func TestTenantOf(t *testing.T) {
	extension := Resolver{ContextExtension: "tenant"}
	route := Resolver{RouteMetadata: &MetadataKey{"gatehouse", "tenant"}}
	authority := Resolver{Authority: &NameMap{Map: map[string]string{"authz-a": "a", "Authz-B:9191": "b", "authz-b": "c", "[::1]": "v6"}}}
	authorityPattern := Resolver{Authority: &NameMap{Pattern: `([^.]*)\.authz(?::\d+)?`}}
	host := Resolver{Host: &NameMap{Map: map[string]string{
		"example.com": "exact", "*.example.com": "wild", "*.eu.example.com": "eu", "a.eu.example.com": "a", "[::1]": "v6",
	}}}
	hostPattern := Resolver{Host: &NameMap{Pattern: `(?:([a-z]+)\.)?example\.com`}}
	header := Resolver{Header: "X-Tenant"}

	for _, c := range []struct {
		resolver Resolver
		check    string
		want     string // "" refused, "-" not named
	}{
		{extension, "tenant=orders", "orders"},
		{extension, "", "-"},
		{extension, "tenant=", ""},
		{extension, "tenant=Orders", ""},
		{extension, "tenant=a/../b", ""},

		{route, "route.gatehouse.tenant=orders", "orders"},
		{route, "route.gatehouse.other=orders", "-"},
		{route, "route.other.tenant=orders", "-"},
		{route, "route.gatehouse.tenant=7", ""},
		{route, "route.gatehouse.tenant=", ""},
		{route, "", "-"},

		{authority, ":authority=authz-a", "a"},
		{authority, ":authority=AUTHZ-A:9191", "a"},
		{authority, ":authority=authz-b:9191", "b"},
		{authority, ":authority=authz-b:1", "c"},
		{authority, ":authority=[::1]:9191", "v6"},
		{authority, ":authority=[::1]", "v6"},
		{authority, ":authority=other", "-"},
		{authority, "", "-"},
		{authorityPattern, ":authority=Orders.authz:9191", "orders"},
		{authorityPattern, ":authority=orders.authz.evil", "-"},
		{authorityPattern, ":authority=.authz", ""},
		{authorityPattern, ":authority=-.authz", ""},

		{host, "host=example.com", "exact"},
		{host, "host=EXAMPLE.com.:8443", "exact"},
		{host, "host=x.example.com", "wild"},
		{host, "host=x.y.example.com", "wild"},
		{host, "host=x.eu.example.com", "eu"},
		{host, "host=eu.example.com", "wild"},
		{host, "host=a.eu.example.com", "a"},
		{host, "host=[::1]:80", "v6"},
		{host, "host=notexample.com", "-"},
		{host, "", "-"},
		{host, "host=example.com..", ""},
		{host, "host=.example.com", ""},
		{host, "host=a..example.com", ""},
		{host, "host=éx.example.com", ""},
		{host, "host=example.com:", ""},
		{host, "host=example.com:80x", ""},
		{host, "host=user@example.com", ""},
		{host, "host=example.com%00", ""},
		{host, "host=a,example.com", ""},
		{host, "host=[::1", ""},
		{host, "host=" + strings.Repeat("a.", 130) + "example.com", ""},
		{hostPattern, "host=Orders.example.com:80", "orders"},
		{hostPattern, "host=orders.example.com.evil.org", "-"},
		{hostPattern, "host=example.com", ""}, // matches, with no name

		{header, "header.x-tenant=orders", "orders"},
		{header, "header.x-tenant=orders,billing", ""},
		{header, "header.x-other=orders", "-"},
		{header, "raw.X-Tenant=orders", "orders"},
		{header, "raw.x-tenant=orders raw.X-TENANT=billing", ""},
		{header, "raw.x-tenant=orders raw.x-tenant=orders", ""},
		{header, "raw.x-tenant=\xff", ""},
		{header, "", "-"},
	} {
		r, err := newRouter([]Resolver{c.resolver}, "fallback", nil)
		if err != nil {
			t.Fatal(err)
		}
		ctx, req := routed(t, c.check)
		id, err := r.tenantOf(ctx, askedOf(req))
		got := string(id)
		if got == "fallback" {
			got = "-"
		}
		if got != c.want || (c.want == "") != errors.Is(err, errTenant) {
			t.Errorf("%+v of %q: got %q, %v, want %q", c.resolver, c.check, got, err, c.want)
		}
	}
}

func TestTenantOrder(t *testing.T) {
	resolvers := []Resolver{{ContextExtension: "tenant"}, {Header: "x-tenant"}}
	for _, c := range []struct{ fallback, check, want string }{
		{"", "tenant=a header.x-tenant=b", "a"},
		{"", "header.x-tenant=b", "b"},
		{"c", "header.x-tenant=b", "b"},
		{"c", "", "c"},
		{"", "", ""},
		{"c", "tenant=- header.x-tenant=b", ""}, // an invalid name is not passed over
		{"c", "header.x-tenant=-", ""},
	} {
		r, err := newRouter(resolvers, c.fallback, nil)
		if err != nil {
			t.Fatal(err)
		}
		ctx, req := routed(t, c.check)
		id, err := r.tenantOf(ctx, askedOf(req))
		if string(id) != c.want || (c.want == "") != errors.Is(err, errTenant) {
			t.Errorf("%q: got %q, %v, want %q", c.check, id, err, c.want)
		}
	}
}

func TestResolverValidate(t *testing.T) {
	for _, r := range []Resolver{
		{}, {ContextExtension: "a", Header: "b"}, {RouteMetadata: &MetadataKey{Namespace: "a"}},
		{Authority: &NameMap{}}, {Host: &NameMap{Map: map[string]string{"a": "b"}, Pattern: "(.*)"}},
		{Authority: &NameMap{Pattern: "("}}, {Authority: &NameMap{Pattern: "a.*"}},
		{Authority: &NameMap{Map: map[string]string{"a": "No Tenant"}}}, {Authority: &NameMap{Map: map[string]string{"a": "x", "A": "y"}}},
		{Host: &NameMap{Map: map[string]string{"*": "a"}}}, {Host: &NameMap{Map: map[string]string{"a.*.b": "a"}}}, {Host: &NameMap{Map: map[string]string{"*.": "a"}}},
		{Header: ":path"}, {Header: "x tenant"},
	} {
		if r.Validate() == nil {
			t.Errorf("%+v: no error", r)
		}
	}
	if _, err := New(Config{Default: "No Tenant"}); err == nil {
		t.Error("invalid default: no error")
	}
	if _, err := New(Config{Resolve: []Resolver{{}}}); err == nil {
		t.Error("invalid resolver: no error")
	}
}

func TestEntryOf(t *testing.T) {
	for path, want := range map[string]string{"": "", "path=envoy/authz/allow": "envoy/authz/allow", "path=//a/b/": "a/b", "path=/": ""} {
		_, req := routed(t, path)
		if got := entryOf(askedOf(req)); got != want {
			t.Errorf("%q: got %q, want %q", path, got, want)
		}
	}
}

func FuzzTenantName(f *testing.F) {
	for _, name := range []string{"orders", "", "a..b", "-", "ORDERS", "a/b", "example.com:80", "[::1]:1", "a.example.com."} {
		f.Add(name)
	}
	routers := map[string]*router{}
	for kind, resolver := range map[string]Resolver{
		"extension": {ContextExtension: "tenant"}, "header": {Header: "x-tenant"}, "raw": {Header: "x-tenant"},
		"host": {Host: &NameMap{Pattern: `(.*)\.example\.com|(.*)`}}, "authority": {Authority: &NameMap{Pattern: `(.*)`}},
		"hosts": {Host: &NameMap{Map: map[string]string{"*.example.com": "a", "example.com": "b"}}},
	} {
		r, err := newRouter([]Resolver{resolver}, "", nil)
		if err != nil {
			f.Fatal(err)
		}
		routers[kind] = r
	}
	f.Fuzz(func(t *testing.T, name string) {
		http := &authv3.AttributeContext_HttpRequest{Host: name, Headers: map[string]string{"x-tenant": name}}
		req := httpRequest(http)
		req.Attributes.ContextExtensions = map[string]string{"tenant": name}
		ctx := metadata.NewIncomingContext(t.Context(), metadata.Pairs(":authority", name))
		for kind, r := range routers {
			if kind == "raw" {
				http.Headers, http.HeaderMap = nil, &corev3.HeaderMap{Headers: []*corev3.HeaderValue{{Key: "X-Tenant", RawValue: []byte(name)}}}
			}
			id, err := r.tenantOf(ctx, askedOf(req))
			if err != nil {
				if id != "" || !errors.Is(err, errTenant) {
					t.Fatalf("%s %q: got %q, %v", kind, name, id, err)
				}
				continue
			}
			if again, err := tenants.ParseID(string(id)); err != nil || again != id {
				t.Fatalf("%s %q: got %q, which is no name: %v", kind, name, id, err)
			}
		}
	})
}
