//go:build race

package plan

// Under the race detector sync.Pool forgets, so that builtins make more garbage.
const garbage = 4
