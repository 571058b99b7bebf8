package main

import (
	"fmt"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// fault is one thing that is wrong with the operator's file.
type fault struct {
	line int    // 0: of no line
	path string // of the key, with dots; may be empty
	text string
}

// faults is an error that holds all that is wrong, each with its place.
type faults struct {
	file string
	all  []fault
}

func (f *faults) Error() string {
	lines := make([]string, len(f.all))
	for i, one := range f.all {
		var b strings.Builder
		if f.file != "" {
			b.WriteString(f.file)
			if one.line > 0 {
				fmt.Fprintf(&b, ":%d", one.line)
			}
			b.WriteString(": ")
		}
		if one.path != "" {
			b.WriteString(one.path + ": ")
		}
		b.WriteString(one.text)
		lines[i] = b.String()
	}
	return strings.Join(lines, "\n")
}

// places finds the lines of keys in a YAML document.
type places struct{ root *yaml.Node }

// line returns the line of the key at path, like "opa.services.s3.url" or
// "tenants.resolve[1]". Where there is no such key it is that of the nearest
// one on the way to it; 0 where there is none at all.
func (p *places) line(path string) int {
	if p == nil || p.root == nil {
		return 0
	}
	n, line := p.root, 0
	for path != "" && n != nil {
		var at int
		n, at, path = step(n, path)
		if n != nil {
			line = at
		}
	}
	return line
}

// step goes one step down from n along path. Keys may themselves have dots, so
// the longest key that path begins with is taken.
func step(n *yaml.Node, path string) (child *yaml.Node, line int, rest string) {
	for n.Kind == yaml.DocumentNode || n.Kind == yaml.AliasNode {
		if n.Kind == yaml.AliasNode {
			n = n.Alias
		} else {
			n = n.Content[0]
		}
	}
	switch n.Kind {
	case yaml.MappingNode:
		best := ""
		for i := 0; i+1 < len(n.Content); i += 2 {
			key := n.Content[i].Value
			after, ok := strings.CutPrefix(path, key)
			if ok && len(key) > len(best) && (after == "" || after[0] == '.' || after[0] == '[') {
				best, child, line, rest = key, n.Content[i+1], n.Content[i].Line, strings.TrimPrefix(after, ".")
			}
		}
	case yaml.SequenceNode:
		index, after, ok := strings.Cut(strings.TrimPrefix(path, "["), "]")
		if i, err := strconv.Atoi(index); ok && err == nil && i < len(n.Content) {
			child, line, rest = n.Content[i], n.Content[i].Line, strings.TrimPrefix(after, ".")
		}
	}
	return child, line, rest
}
