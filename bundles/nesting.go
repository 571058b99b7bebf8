package bundles

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"

	"github.com/open-policy-agent/opa/v1/ast"
)

// These checks run before a decoder or parser sees the bytes. They measure and
// judge nothing else: what they let pass may still be malformed.

// What documents, or modules, have too many of together.
var (
	errValues = errors.New("too many values")
	errTokens = errors.New("too many tokens")
)

func nestingError(limit int) error {
	return fmt.Errorf("is nested deeper than %d", limit)
}

// checkJSON bounds the nesting of a document, and takes its values from left.
func checkJSON(doc []byte, nesting int, left *int64) error {
	depth, n := 0, int64(1)
	for i := 0; i < len(doc); i++ {
		switch doc[i] {
		case '"':
			for i++; i < len(doc) && doc[i] != '"'; i++ {
				if doc[i] == '\\' {
					i++
				}
			}
		case '[', '{':
			n++
			if depth++; depth > nesting {
				return nestingError(nesting)
			}
		case ']', '}':
			depth--
		case ',':
			n++
		}
	}
	if *left -= n; *left < 0 {
		return errValues
	}
	return nil
}

// checkYAML bounds the nesting of the first document, which is the one that
// OPA takes, and its values and bytes once each alias is written out: OPA goes
// from YAML to data by way of JSON, which has no aliases. The YAML parser has
// bounds of its own on what it nests (10,000 each of flow and block).
func checkYAML(doc []byte, nesting int, values, size int64) (err error) {
	defer recoverTo(&err)
	var root yaml.Node
	if err := yaml.NewDecoder(bytes.NewReader(doc)).Decode(&root); err != nil {
		if err == io.EOF {
			return nil
		}
		return fmt.Errorf("is not YAML: %w", err)
	}
	m := measure{
		nesting: nesting,
		values:  values,
		bytes:   size,
		done:    make(map[*yaml.Node]extent),
	}
	_, err = m.node(&root, 0)
	return err
}

// extent is what a node comes to with its aliases written out.
type extent struct {
	values, bytes int64
	depth         int  // collections in each other, the node among them
	open          bool // being measured: an alias to it leads back to itself
}

// measure bounds the extents of a YAML document. Anchored nodes are measured
// once, so it takes time in the size of the document as written.
type measure struct {
	nesting       int
	values, bytes int64                 // bounds
	done          map[*yaml.Node]extent // :: anchored node → its extent
}

// node measures a node within depth collections.
func (m *measure) node(n *yaml.Node, depth int) (extent, error) {
	if n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	if e, ok := m.done[n]; ok {
		if e.open {
			return extent{}, errors.New("has an alias that leads back to itself")
		}
		if depth+e.depth > m.nesting {
			return extent{}, nestingError(m.nesting)
		}
		return e, nil
	}
	if n.Anchor != "" {
		m.done[n] = extent{open: true}
	}
	e := extent{values: 1, bytes: int64(len(n.Value)) + 2}
	if n.Kind == yaml.SequenceNode || n.Kind == yaml.MappingNode {
		if depth++; depth > m.nesting {
			return extent{}, nestingError(m.nesting)
		}
		e.depth = 1
	}
	own := e.depth
	for _, child := range n.Content {
		c, err := m.node(child, depth)
		if err != nil {
			return extent{}, err
		}
		// Each term is within its bound, so the sums cannot overflow.
		e.values += c.values
		e.bytes += c.bytes
		e.depth = max(e.depth, own+c.depth)
		if e.values > m.values {
			return extent{}, errValues
		}
		if e.bytes > m.bytes {
			return extent{}, fmt.Errorf("is larger than %s with its aliases written out", bytesText(m.bytes))
		}
	}
	if n.Anchor != "" {
		m.done[n] = e
	}
	return e, nil
}

// checkRego bounds how deep brackets nest in a module, counting those in the
// expressions of template strings, and takes its tokens from left: what a parser
// needs follows from both. It reads strings, escapes and comments as OPA's
// scanner does, so that no text hides brackets from it.
func checkRego(src []byte, nesting int, left *int64) error {
	var open []byte // closing brackets awaited; '"' and '`' for the '}' that resumes a template
	push := func(closing byte) error {
		if len(open) == nesting {
			return nestingError(nesting)
		}
		open = append(open, closing)
		return nil
	}
	word := false // the last byte was part of a name or a number
	for i := 0; i < len(src); {
		c := src[i]
		i++
		if c == ' ' || c == '\t' || c == '\r' || c == '\n' {
			word = false
			continue
		}
		last := word
		word = c == '_' || '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
		if word && last {
			continue
		}
		if *left--; *left < 0 {
			return errTokens
		}
		if word {
			continue
		}
		var err error
		switch c {
		case '#':
			if n := bytes.IndexByte(src[i:], '\n'); n >= 0 {
				i += n
			} else {
				i = len(src)
			}
		case '"':
			i, _ = skipString(src, i, c, false)
		case '`':
			if n := bytes.IndexByte(src[i:], '`'); n >= 0 {
				i += n + 1
			} else {
				i = len(src)
			}
		case '$':
			if i < len(src) && (src[i] == '"' || src[i] == '`') {
				quote := src[i]
				var expr bool
				if i, expr = skipString(src, i+1, quote, true); expr {
					err = push(quote)
				}
			}
		case '(':
			err = push(')')
		case '[':
			err = push(']')
		case '{':
			err = push('}')
		case ')', ']':
			if n := len(open); n > 0 && open[n-1] == c {
				open = open[:n-1]
			}
		case '}':
			n := len(open)
			if n == 0 {
				break
			}
			switch top := open[n-1]; top {
			case '}':
				open = open[:n-1]
			case '"', '`':
				var expr bool
				if i, expr = skipString(src, i, top, true); !expr {
					open = open[:n-1]
				}
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// skipString returns the index after a string, or after the '{' in a template
// that starts an expression, and whether it was that. src[i] is within.
func skipString(src []byte, i int, quote byte, template bool) (end int, expr bool) {
	raw := quote == '`'
	for i < len(src) {
		c := src[i]
		if c == '\n' && !raw {
			// Not terminated. OPA's parser goes on with an expression if it is
			// a template, so brackets are not all there is to nest.
			return i, template
		}
		i++
		switch {
		case c == quote:
			return i, false
		case c == '{' && template:
			return i, true
		case c == '\\' && i < len(src):
			switch e := src[i]; {
			case e == '{' && template:
				i++
			case raw:
			case e == 'u': // it skips four characters with the 'u', whatever they are
				for range 4 {
					if i < len(src) {
						_, n := utf8.DecodeRune(src[i:])
						i += n
					}
				}
			case bytes.IndexByte([]byte(`\"/bfnrt`), e) >= 0:
				i++
			}
		}
	}
	return i, false
}

// astDeeper reports whether a module nests deeper than limit. Chains of "else"
// and of operators nest without brackets.
func astDeeper(module *ast.Module, limit int) bool {
	depth, deepest := 0, 0
	ast.NewBeforeAfterVisitor(
		func(any) bool {
			depth++
			deepest = max(deepest, depth)
			return depth > limit
		},
		func(any) { depth-- },
	).Walk(module)
	return deepest > limit
}

// deeper reports whether a decoded value nests deeper than limit.
func deeper(v any, limit int) bool {
	switch v := v.(type) {
	case map[string]any:
		for _, x := range v {
			if limit == 0 || deeper(x, limit-1) {
				return true
			}
		}
	case []any:
		for _, x := range v {
			if limit == 0 || deeper(x, limit-1) {
				return true
			}
		}
	}
	return false
}
