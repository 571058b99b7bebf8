// Package e2e plays the client: a real Envoy asks the real gatehouse binary, and
// what counts is what a client gets and what the backend sees.
//
// The tests run with Envoy 1.40.0 and 1.37.0. Their binaries are those that
// fetch-envoy leaves in .cache at the root of the repository, or those that
// GATEHOUSE_E2E_ENVOY_1_40 and GATEHOUSE_E2E_ENVOY_1_37 name. Those of S3 run a
// real S3 server, versitygw, which fetch-tools leaves there. Before the HTTP API
// stand nginx and Caddy too, which fetch-proxies installs. A test fails where one
// is missing. GATEHOUSE_BIN names the gatehouse to test; without it, it is
// built. PEER names an opa-envoy-plugin to compare with what was recorded of it in
// testdata/peer; without it the recordings stand.
//
// Beside the tests there are commands: load drives checks at any server of
// ext_authz, bench measures what a check costs, demo shows gatehouse at work,
// simulate says what a fleet would do with many tenants.
// Package faults makes ill what gatehouse depends on, while others ask it. The
// folders web and clients have tests in JavaScript: Chromium at the order desk of
// the demo, and OPA's own client at the API.
package e2e
