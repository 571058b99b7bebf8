// Package kubernetes holds what is in deploy to what reads it: the Helm chart and
// the manifests to helm, to the published schemas and to the APIs' own types, and
// what proxies make of them to a real Envoy that asks a real gatehouse.
//
// No cluster runs here. What Kubernetes would do between a manifest and a process
// (mount a ConfigMap, give a Service an address) the tests do, each saying so where
// it does.
package kubernetes
