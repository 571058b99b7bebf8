package policy

import "github.com/open-policy-agent/opa/v1/ast"

// Estimates, in bytes, of what values and modules take in memory on a 64-bit
// machine. They are for budgets: TestSizes keeps them within a factor of two.
const (
	sizeTerm   = 24       // a term in its slice or slab
	sizeScalar = 16       // the header of a boxed string or number
	sizeMember = 76       // of an object: its element, its key's slot and its place in the map
	sizeElem   = 24       // of an array: its pointer and its hash
	sizeObject = 180      // an object or set without members
	sizeArray  = 96       // an array without elements
	sizeParsed = 40       // for each byte of Rego, parsed
	sizeRules  = 27       // for each byte of Rego, compiled
	sizePolicy = 2 << 10  // of a policy without rules
	sizeFixed  = 64 << 10 // of what evaluates rules, without any
	sizeTypes  = 44 << 10 // of that, what is not kept where nothing needs it
)

// sizeOf estimates what a value takes.
func sizeOf(v ast.Value) int64 {
	switch v := v.(type) {
	case ast.String:
		return sizeTerm + sizeScalar + int64(len(v))
	case ast.Number:
		return sizeTerm + sizeScalar + int64(len(v))
	case *ast.Array:
		n := int64(sizeTerm + sizeArray)
		v.Foreach(func(t *ast.Term) { n += sizeElem + sizeOf(t.Value) })
		return n
	case ast.Object:
		n := int64(sizeTerm + sizeObject)
		v.Foreach(func(k, v *ast.Term) { n += sizeMember + sizeOf(k.Value) + sizeOf(v.Value) })
		return n
	case ast.Set:
		n := int64(sizeTerm + sizeObject)
		v.Foreach(func(t *ast.Term) { n += sizeMember + sizeOf(t.Value) })
		return n
	}
	return sizeTerm
}

// Size estimates what the part takes in memory, in bytes. It grows with what its data
// is asked for: see document.
func (p *Part) Size() int64 { return p.data.Size() + p.manifest.Size() + sizeParsed*p.source }

// Size estimates what the policy takes in memory beside its parts, in bytes. It
// grows where rules are made again: see rules.
func (p *Policy) Size() int64 {
	if p.rules.current.Load() == nil {
		return p.size
	}
	return p.size + p.rules.size
}
