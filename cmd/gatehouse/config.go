package main

import (
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/gatehouse-authz/gatehouse/extauthz"
)

// Config is the operator's file, in YAML (or JSON, which is YAML). Its fields
// are the manual: what a key means, its unit, its default. Unknown keys are
// faults; an absent key is its default.
type Config struct {
	// GRPC is where Envoy asks.
	GRPC GRPC `yaml:"grpc"`

	// HTTP is where front ends, services and other proxies ask.
	HTTP HTTP `yaml:"http"`

	// Admin is where operators look: /healthz, /readyz, /metrics, /tenants.
	Admin Admin `yaml:"admin"`

	// Drain says how the server stops.
	Drain Drain `yaml:"drain"`

	// Tenants says who the tenants are and what each may use.
	Tenants Tenants `yaml:"tenants"`

	// OPA is the OPA configuration of every tenant: each string is a template
	// of {{ .tenant }} (or {{ .bundlename }}). ${NAME} is replaced by the
	// environment variable NAME, which must be set.
	OPA yaml.Node `yaml:"opa"`

	// Overrides are settings of single tenants, by name: the keys of tenants
	// that are a tenant's, and opa, merged over those of all.
	Overrides map[string]yaml.Node `yaml:"overrides"`

	// OverridesDir is a folder with overrides in files of their own, one
	// NAME.yaml for each tenant. A tenant may stand there or in overrides, not
	// in both. Default "": none.
	OverridesDir string `yaml:"overrides_dir"`

	// Guard is the operator's own policy, which must allow too.
	Guard Guard `yaml:"guard"`

	// Persist keeps the last good bundles on disk.
	Persist Persist `yaml:"persist"`

	// Log says what Gatehouse logs of itself, on standard error.
	Log Log `yaml:"log"`

	// Redact is default: secrets in the headers of a request, of a result and of
	// what builtins gave, and certificates, are hidden in decision logs, whatever
	// else a policy's mask hides; or none. Default default.
	Redact string `yaml:"redact"`

	// Telemetry is what Gatehouse tells an OpenTelemetry collector.
	Telemetry Telemetry `yaml:"telemetry"`
}

// GRPC configures the listener for Envoy.
type GRPC struct {
	// Listen is host:port, or unix:///path of a socket. Default
	// "127.0.0.1:9191".
	Listen string `yaml:"listen"`

	// MaxMessageBytes bounds a check request; one that is larger is denied
	// with 413. Default 64MiB.
	MaxMessageBytes Size `yaml:"max_message_bytes"`

	// Reflection offers gRPC reflection. Default false.
	Reflection bool `yaml:"reflection"`

	// TLS secures the listener. Default: it is plain.
	TLS TLS `yaml:"tls"`

	// SocketMode is the mode of a socket's file, like "0660", its default.
	SocketMode string `yaml:"socket_mode"`

	// MaxConnectionAge is how long a connection lives, give or take a tenth,
	// so that proxies spread over replicas that are new. What was begun on it
	// ends first. Default 1h.
	MaxConnectionAge Duration `yaml:"max_connection_age"`
}

// Log says what Gatehouse logs of itself. -log-level and -log-format, and what
// stands for them in the environment, hold before it.
type Log struct {
	// Level is debug, info, warn or error: what is below it is not logged. It
	// changes while the server runs; PUT /log on the admin listener changes it
	// for a while. Default info.
	Level string `yaml:"level"`

	// Format is json or text. Default json.
	Format string `yaml:"format"`
}

// Drain says how the server stops.
type Drain struct {
	// Delay is how long it goes on as before after it has said that it is not
	// ready, so that proxies look elsewhere. Default 2s.
	Delay Delay `yaml:"delay"`

	// Timeout bounds the wait for checks that were begun. Default 10s.
	Timeout Duration `yaml:"timeout"`
}

// HTTP configures the listener of the HTTP API. What a tenant offers there, and to
// whom, is plugins.gatehouse_http of its OPA configuration.
type HTTP struct {
	// Listen is host:port, or unix:///path of a socket; "" turns it off.
	// Default "127.0.0.1:8181", which is listened on where a tenant may offer
	// something. Off loopback, a tenant that does not say who may ask is
	// refused.
	Listen string `yaml:"listen"`

	// URL is the public address of the API, like https://authz.example.com.
	// Default "": not known.
	URL string `yaml:"url"`

	// TrustedPeers are those whose word about other callers is believed, for
	// identity headers and forward-auth: addresses, CIDRs, patterns of the IDs
	// of certificates like spiffe://example.org/*, or unix for whoever reaches
	// the socket. Default: nobody.
	TrustedPeers []string `yaml:"trusted_peers"`

	// TLS secures the listener. Default: it is plain.
	TLS TLS `yaml:"tls"`
}

// Admin configures the listener for operators.
type Admin struct {
	// Listen is host:port; "" turns it off. Default "127.0.0.1:8282". On an
	// address that is not loopback only /healthz, /readyz and /metrics answer,
	// unless tls has a client_ca.
	Listen string `yaml:"listen"`

	// TLS secures the listener. Default: it is plain.
	TLS TLS `yaml:"tls"`
}

// Tenants configures the pool of tenants.
type Tenants struct {
	// Resolve says how a check names its tenant. The first of the list that
	// names one wins; one that names an invalid name refuses the check. Each
	// has one key: context_extension, route_metadata {namespace, key},
	// authority, peer_id or host {map or pattern}, or header.
	// Default: [{context_extension: tenant}].
	Resolve []extauthz.Resolver `yaml:"resolve"`

	// Default is the tenant of a check that names none. Default "": such
	// checks are refused.
	Default string `yaml:"default"`

	// Peers says which proxy may name which tenants: from the ID of its
	// certificate (its URI, or its DNS name where it has none) to names, both
	// patterns in which "*" stands for anything. It needs grpc.tls.client_ca,
	// and is in force for forward-auth, too.
	// Default {}: all may name all.
	Peers map[string][]string `yaml:"peers"`

	// Capacity is how many tenants are kept warm. Default 10000.
	Capacity Count `yaml:"capacity"`

	// Parked is how many tenants that were pushed out stay within their grace
	// period. Default 1000.
	Parked Count `yaml:"parked"`

	// GracePeriod is how long such a tenant stays. Default 5m.
	GracePeriod Duration `yaml:"grace_period"`

	// Memory bounds the estimate of what all policies and data take; tenants
	// that were not asked for longest are forgotten to stay within it. Default
	// half of the memory limit, or none where there is no limit.
	Memory Size `yaml:"memory"`

	// BodyMemory bounds the bodies of all tenants that are being read at once;
	// what is over it is answered with 503. Default a sixteenth of the memory
	// limit, at most 256MiB.
	BodyMemory Size `yaml:"body_memory"`

	// LogMemory bounds what the decision logs of all tenants buffer; each has a
	// bound of its own beside. Default an eighth of the memory limit, at most
	// 256MiB.
	LogMemory Size `yaml:"log_memory"`

	// RecentDecisions is how many of its last decisions are remembered of each
	// tenant, for /tenants/{tenant}/decisions and /explain on the admin listener,
	// at most 1000. Default 100; 0: none.
	RecentDecisions Count `yaml:"recent_decisions"`

	// RecentMemory bounds what the last decisions of all tenants take; the oldest
	// of all are forgotten to stay within it. Default 1/64 of the memory limit,
	// at most 16MiB.
	RecentMemory Size `yaml:"recent_memory"`

	// MaxLongPolls is how many bundles are waited for at once at services that
	// answer when there is something new. The others are polled. Default 100.
	MaxLongPolls Count `yaml:"max_long_polls"`

	// MetricLabels is how many tenants have a label of their own in metrics: those
	// that came first. The others share the label _other. Default 10000; 0: all
	// share it.
	MetricLabels Count `yaml:"metric_labels"`

	// Preload names tenants that are loaded at start; ["*"] all those of the
	// directory. Default none.
	Preload []string `yaml:"preload"`

	// Required names tenants that are loaded at start and that /readyz waits
	// for. Default none.
	Required []string `yaml:"required"`

	// TenantKeys are those that an override may change for one tenant.
	TenantKeys `yaml:",inline"`
}

// TenantKeys are the keys of tenants that are a tenant's own.
type TenantKeys struct {
	Limits Limits `yaml:"limits"`

	// OnError is what a fault (an undefined, conflicting or ill-typed result,
	// an evaluation error, a tenant that is not ready or busy, no answer in
	// time) is answered with: deny; allow; or upstream, an error of gRPC, so
	// that Envoy's failure_mode_allow decides. Default deny.
	OnError OnError `yaml:"on_error"`

	// AllowHeaders names reserved headers that a policy may change: names, or
	// prefixes that end with "*". Reserved are names that begin with ":",
	// host, x-envoy-* and hop-by-hop headers. Default none.
	AllowHeaders []string `yaml:"allow_headers"`

	// OnPartialBody is evaluate; or deny, which refuses with 403 a request
	// whose body the policy reads and that is truncated, missing in part, or
	// of a type that is not parsed. Default evaluate.
	OnPartialBody string `yaml:"on_partial_body"`

	// Network opens http.send to policies. Default: there is no http.send.
	Network Network `yaml:"network"`

	// DecisionID is the header that names the decision, towards the backend and
	// the client.
	DecisionID DecisionID `yaml:"decision_id"`

	// Evaluator says how policies are evaluated: topdown, by OPA's evaluator;
	// plan, by OPA's plan of each entry point, which is faster and gives the same
	// answers, and by topdown where there is no such plan; auto, which is plan in
	// this version. Default auto.
	Evaluator string `yaml:"evaluator"`

	// Verify, as 1/1000, is the share of decisions by plan that are made again by
	// plan and topdown, beside the requests. A difference is logged with both
	// answers, and topdown evaluates that revision from then on. Default "": none.
	Verify string `yaml:"verify"`
}

// DecisionID says where a header names the decision. Where it is on, a client
// cannot set the header: it is overwritten, or taken away.
type DecisionID struct {
	// Header is its name. Default x-gatehouse-decision-id.
	Header string `yaml:"header"`

	// Upstream has requests that are allowed carry it. Default false.
	Upstream bool `yaml:"upstream"`

	// Client has answers to clients carry it, of requests that are allowed and of
	// those that are denied. Default false.
	Client bool `yaml:"client"`
}

// Override is what the file says of a single tenant.
type Override struct {
	TenantKeys `yaml:",inline"`
	OPA        yaml.Node `yaml:"opa"`
}

// Limits bound what one tenant may use.
type Limits struct {
	// EvaluationTime bounds the time to an answer, waiting included. Where the
	// caller has less time, a margin below that bounds it. Default 500ms.
	EvaluationTime Duration `yaml:"evaluation_time"`

	// Concurrency is how many evaluations of a tenant run at once. Default 0:
	// as many as there are CPUs, at least 2.
	Concurrency Count `yaml:"concurrency"`

	// BundleBytes bounds a bundle as it is fetched, compressed. Default 64MiB.
	BundleBytes Size `yaml:"bundle_bytes"`

	// BundleExpandedBytes bounds the files of a bundle. Default 256MiB.
	BundleExpandedBytes Size `yaml:"bundle_expanded_bytes"`

	// BodyBytes bounds the body of a request; a larger one is denied with
	// 413. Default 1MiB.
	BodyBytes Size `yaml:"body_bytes"`

	// BodyMemory bounds the tenant's bodies that are being read at once; what
	// is over it is answered with 503. Default 64MiB.
	BodyMemory Size `yaml:"body_memory"`
}

// Guard names the operator's own policy. It is asked before each tenant's, with
// the same input: what it denies is denied, and nothing is allowed before it is
// loaded or when it fails, whatever on_error and dry-run say.
type Guard struct {
	// Bundle is a folder, or an archive whose name ends in .tar.gz. It is read
	// again when it changes. Default "": there is no guard.
	Bundle string `yaml:"bundle"`

	// Path is its entry point. Default envoy/authz/allow.
	Path string `yaml:"path"`
}

// Persist says where the last good bundles are kept, for a start while their
// sources are away. Whoever can write there can put any bundle in the place of a
// tenant's that is not signed.
type Persist struct {
	// Directory is made where it is missing. At most 10 GiB and 100,000 files
	// are kept; those that were confirmed longest ago go first. Default "":
	// none are kept.
	Directory string `yaml:"directory"`

	// MaxStale is how long a tenant may go on deciding by bundles that its
	// sources do not confirm, also without a directory; then it is not ready.
	// Default 0s: for ever.
	MaxStale Delay `yaml:"max_stale"`
}

// Network is what policies may reach.
type Network struct {
	// AllowHosts names hosts, host:port, addresses, address:port and prefixes
	// like 10.1.0.0/16, that http.send may reach, and nothing else. A name is
	// reached at public addresses alone, unless its addresses are listed too.
	// Default none.
	AllowHosts []string `yaml:"allow_hosts"`
}

// defaultHTTP is where the HTTP API listens.
const defaultHTTP = "127.0.0.1:8181"

func defaultConfig() *Config {
	return &Config{
		GRPC: GRPC{
			Listen: "127.0.0.1:9191", MaxMessageBytes: 64 << 20,
			SocketMode: "0660", MaxConnectionAge: Duration(time.Hour),
		},
		Drain: Drain{Delay: Delay(2 * time.Second), Timeout: Duration(10 * time.Second)},
		HTTP:  HTTP{Listen: defaultHTTP},
		Admin: Admin{Listen: "127.0.0.1:8282"},
		Tenants: Tenants{
			Resolve:      []extauthz.Resolver{{ContextExtension: "tenant"}},
			Capacity:     10_000,
			Parked:       1000,
			MaxLongPolls: 100,
			MetricLabels: 10_000,

			RecentDecisions: 100,
			GracePeriod:     Duration(5 * time.Minute),
			TenantKeys: TenantKeys{
				Limits: Limits{
					EvaluationTime:      Duration(500 * time.Millisecond),
					BundleBytes:         64 << 20,
					BundleExpandedBytes: 256 << 20,
					BodyBytes:           1 << 20,
					BodyMemory:          64 << 20,
				},
				DecisionID:    DecisionID{Header: "x-gatehouse-decision-id"},
				OnPartialBody: "evaluate",
				Evaluator:     "auto",
			},
		},
		Redact: "default",

		Telemetry: defaultTelemetry(),
		Log:       Log{Level: "info", Format: "json"},
	}
}
