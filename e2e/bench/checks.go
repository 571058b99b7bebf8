package main

import (
	"context"
	"fmt"
	"strings"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/protobuf/proto"

	"github.com/gatehouse-authz/gatehouse/e2e/traffic"
)

const concurrency = 16 // checks in flight, over one connection

// enter verifies what a server answers, and returns a contender that asks it.
func (b *bench) enter(s *server, c policyCase, rate float64, names ...string) (*contender, error) {
	client, err := traffic.New(traffic.Config{Target: s.grpc, Requests: c.requests, Concurrency: concurrency, Duration: b.roundTime, Rate: rate})
	if err != nil {
		return nil, err
	}
	b.closing = append(b.closing, client.Close)
	verify := func(req *authv3.CheckRequest, want bool) error {
		resp, err := client.Check(context.Background(), req)
		if got := traffic.OutcomeOf(resp, err); (got == "allowed") != want || err != nil {
			return fmt.Errorf("%q: %s, want allowed to be %v: %v", names, got, want, err)
		}
		return nil
	}
	for _, req := range c.requests {
		if err := verify(req, true); err != nil {
			return nil, err
		}
	}
	if c.denied != nil && names[0] != alwaysAllowName {
		if err := verify(c.denied, false); err != nil {
			return nil, err
		}
	}
	return &contender{names: names, server: s, load: client.Run}, nil
}

const alwaysAllowName = "always-allow"

// contest enters servers for some policies: the always-allow server, gatehouse by
// each evaluator, that of -base beside it, and the peer, with the decision log off
// and on, at a rate or, with 0, in a closed loop.
func (b *bench) contest(ctx context.Context, policies []policyCase, rate float64) ([]*contender, error) {
	s, err := b.alwaysAllow(ctx)
	if err != nil {
		return nil, err
	}
	first, err := b.enter(s, trivial(), rate, alwaysAllowName, "trivial", "off")
	if err != nil {
		return nil, err
	}
	contenders := []*contender{first}
	enter := func(s *server, c policyCase, name string, logged string) error {
		entry, err := b.enter(s, c, rate, name, c.name, onOff(logged != ""))
		contenders = append(contenders, entry)
		return err
	}
	shelf := map[string]map[string]string{}
	for i, c := range policies {
		shelf[tenantOf(i)] = c.files
		c.ask(tenantOf(i))
	}
	for _, logs := range []string{"", b.sink()} {
		for _, evaluator := range b.evaluators {
			for _, binary := range b.binaries() {
				s, err := b.gatehouse(setting{binary: binary.path, evaluator: evaluator, logged: logs, tenants: shelf})
				if err != nil {
					return nil, err
				}
				for _, c := range policies {
					if err := enter(s, c, binary.name+", "+evaluator, logs); err != nil {
						return nil, err
					}
				}
			}
		}
		if b.peerBinary == "" {
			continue
		}
		for _, c := range policies {
			s, err := b.peer(c.files, logs)
			if err != nil {
				return nil, err
			}
			if err := enter(s, c, "peer", logs); err != nil {
				return nil, err
			}
		}
	}
	return contenders, nil
}

// binary is one that is measured.
type binary struct{ name, path string }

// binaries are that of the bench and that of -base, if there is one.
func (b *bench) binaries() []binary {
	all := []binary{{"gatehouse", b.binary}}
	if b.base != "" {
		all = append(all, binary{"base", b.base})
	}
	return all
}

// ask has the requests name a tenant.
func (c *policyCase) ask(tenant string) {
	for _, req := range c.requests {
		traffic.Name(req, tenant)
	}
	if c.denied != nil {
		traffic.Name(c.denied, tenant)
	}
}

func tenantOf(i int) string { return fmt.Sprintf("tenant-%d", i) }

const checkNames = "server, policy, log"

// checks measures what a check costs, in a closed loop.
func (b *bench) checks(ctx context.Context) ([]table, error) {
	contenders, err := b.contest(ctx, []policyCase{trivial(), roles(users), jwt()}, 0)
	if err != nil {
		return nil, err
	}
	if err := b.rounds(ctx, contenders); err != nil {
		return nil, err
	}
	sample := trivial().requests[0]
	return []table{tableOf("check", fmt.Sprintf("%d checks in flight, one after the other, over one connection; %d headers, %d bytes a check",
		concurrency, len(sample.GetAttributes().GetRequest().GetHttp().GetHeaders()), proto.Size(sample)), checkNames, contenders)}, nil
}

// rate measures checks that are due at a constant rate.
func (b *bench) rate(ctx context.Context) ([]table, error) {
	contenders, err := b.contest(ctx, []policyCase{roles(users)}, b.perSecond)
	if err != nil {
		return nil, err
	}
	if err := b.rounds(ctx, contenders); err != nil {
		return nil, err
	}
	return []table{tableOf("rate", fmt.Sprintf("checks at a constant rate of %.0f a second, each measured from when it was due; at most %d in flight",
		b.perSecond, concurrency), checkNames, contenders)}, nil
}

// manyTenants is how many are asked in turn.
const manyTenants = 1000

// tenants measures what it costs that checks are for many tenants, each with a
// bundle of its own, in turn.
func (b *bench) tenants(ctx context.Context) ([]table, error) {
	s, err := b.alwaysAllow(ctx)
	if err != nil {
		return nil, err
	}
	first, err := b.enter(s, trivial(), 0, alwaysAllowName, "1", "off")
	if err != nil {
		return nil, err
	}
	contenders := []*contender{first}
	one, all := roles(20), roles(20)
	one.ask(tenantOf(0))
	shelf, requests := map[string]map[string]string{}, []*authv3.CheckRequest(nil)
	for i := range manyTenants {
		c := roles(20)
		c.files[".manifest"] = fmt.Sprintf(`{"revision": "%d"}`, i)
		c.files["data.json"] = strings.Replace(c.files["data.json"], "{", fmt.Sprintf(`{"tenant": %d, `, i), 1)
		shelf[tenantOf(i)] = c.files
		req := c.requests[i%len(c.requests)]
		traffic.Name(req, tenantOf(i))
		requests = append(requests, req)
	}
	all.requests, all.denied = requests, nil
	for _, logs := range []string{"", b.sink()} {
		for _, evaluator := range b.evaluators {
			for _, binary := range b.binaries() {
				s, err := b.gatehouse(setting{binary: binary.path, evaluator: evaluator, logged: logs, tenants: shelf})
				if err != nil {
					return nil, err
				}
				for _, c := range []policyCase{one, all} {
					in := "1"
					if len(c.requests) == manyTenants {
						in = "1,000"
					}
					entry, err := b.enter(s, c, 0, binary.name+", "+evaluator, in, onOff(logs != ""))
					if err != nil {
						return nil, err
					}
					contenders = append(contenders, entry)
				}
			}
		}
	}
	if err := b.rounds(ctx, contenders); err != nil {
		return nil, err
	}
	return []table{tableOf("tenants", fmt.Sprintf("one tenant of %d asked, and all of them in turn; role-based, 20 users, each tenant with a bundle of its own", manyTenants),
		"server, tenants asked, log", contenders)}, nil
}

// bodies measures checks with a body, which the policy reads or not.
func (b *bench) bodies(ctx context.Context) ([]table, error) {
	s, err := b.alwaysAllow(ctx)
	if err != nil {
		return nil, err
	}
	policies := []policyCase{trivial(), unread(), readBody()}
	var contenders []*contender
	for _, c := range policies[:2] {
		entry, err := b.enter(s, c, 0, alwaysAllowName, c.name)
		if err != nil {
			return nil, err
		}
		contenders = append(contenders, entry)
	}
	shelf := map[string]map[string]string{}
	for i, c := range policies {
		shelf[tenantOf(i)] = c.files
		c.ask(tenantOf(i))
	}
	for _, evaluator := range b.evaluators {
		for _, binary := range b.binaries() {
			s, err := b.gatehouse(setting{binary: binary.path, evaluator: evaluator, tenants: shelf})
			if err != nil {
				return nil, err
			}
			for _, c := range policies[1:] {
				entry, err := b.enter(s, c, 0, binary.name+", "+evaluator, c.name)
				if err != nil {
					return nil, err
				}
				contenders = append(contenders, entry)
			}
		}
	}
	if err := b.rounds(ctx, contenders); err != nil {
		return nil, err
	}
	return []table{tableOf("body", fmt.Sprintf("checks with a body of JSON of %d KiB", bodyBytes>>10), "server, policy", contenders)}, nil
}

// large measures a policy of many rules, and one with much data, each in a process
// of its own.
func (b *bench) large(ctx context.Context) ([]table, error) {
	s, err := b.alwaysAllow(ctx)
	if err != nil {
		return nil, err
	}
	first, err := b.enter(s, trivial(), 0, alwaysAllowName, "trivial")
	if err != nil {
		return nil, err
	}
	contenders := []*contender{first}
	for _, c := range []policyCase{rules(), entries()} {
		c.ask(tenantOf(0))
		for _, evaluator := range b.evaluators {
			for _, binary := range b.binaries() {
				s, err := b.gatehouse(setting{binary: binary.path, evaluator: evaluator, tenants: map[string]map[string]string{tenantOf(0): c.files}})
				if err != nil {
					return nil, err
				}
				entry, err := b.enter(s, c, 0, binary.name+", "+evaluator, c.name)
				if err != nil {
					return nil, err
				}
				contenders = append(contenders, entry)
			}
		}
	}
	if err := b.rounds(ctx, contenders); err != nil {
		return nil, err
	}
	return []table{tableOf("large", "policies that are large, log off", "server, policy", contenders)}, nil
}
