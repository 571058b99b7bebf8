//go:build !race

package plan

const garbage = 1
