package envoy.authz

default allow := true
