// Package compose tests the demo of deploy/compose from outside: the stack comes up
// in a real Docker engine, and what its README says is done to it.
//
// The engine is the test's own. It runs in namespaces of network, mounts and
// processes which end with the test, so that nothing of it stays on the machine and
// no engine that is there is touched; that needs root. Without a registry, images
// that others publish are made here, under their names, of the same versions
// (standins_test.go). "make compose-e2e" builds all that is needed.
package compose
