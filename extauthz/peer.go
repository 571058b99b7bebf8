package extauthz

import (
	"context"
	"fmt"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/gatehouse-authz/gatehouse/peers"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// peerOf returns the ID of the proxy that asks; empty where it has shown no
// certificate that was verified.
func peerOf(ctx context.Context) string {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return ""
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return ""
	}
	return peers.Of(&info.State)
}

// permitted returns an error, which wraps errTenant, where the proxy that asks
// may not name the tenant.
func (r *router) permitted(ctx context.Context, id tenants.ID) error {
	if len(r.peers) == 0 {
		return nil
	}
	name := peerOf(ctx)
	if name == "" {
		return fmt.Errorf("%w: the proxy has no ID", errTenant)
	}
	for pattern, names := range r.peers {
		if peers.Match(pattern, name) && peers.MatchAny(names, string(id)) {
			return nil
		}
	}
	return fmt.Errorf("%w: proxy %q may not name tenant %q", errTenant, name, id)
}
