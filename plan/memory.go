package plan

import (
	"errors"
	"fmt"
	"math"
	"math/big"
	"net/netip"
	"regexp"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/topdown"
)

// ErrBound: the evaluation has come to a bound of its Env.
var ErrBound = errors.New("evaluation is over its bound")

// boundError is an error of topdown's form that is ErrBound.
type boundError struct{ err *topdown.Error }

func (e *boundError) Unwrap() []error { return []error{ErrBound, e.err} }
func (e *boundError) Error() string   { return e.err.Message }

func bound(format string, args ...any) error {
	return &boundError{&topdown.Error{Code: topdown.InternalErr, Message: fmt.Sprintf(format, args...)}}
}

// What parts of a value are reckoned to take, in bytes.
const (
	memoryElement = 48  // of an array
	memoryMember  = 120 // of an object or a set
	memoryValue   = 64  // itself
)

// charge reckons with n more bytes that the evaluation has built, and reports
// whether it may go on.
func (m *machine) charge(n int64) bool {
	m.left -= n
	if m.left >= 0 {
		return true
	}
	m.overMemory()
	return false
}

func (m *machine) overMemory() {
	if m.err == nil {
		m.err = bound("evaluation builds more than %d bytes of values", m.env.MaxMemory)
	}
}

// fits reports whether the evaluation may build something of n bytes. Where it may
// not, it has ended.
func (m *machine) fits(n int64) bool {
	if n <= m.left {
		return true
	}
	m.overMemory()
	return false
}

// chargeFor is charge for a value, without what is in it.
func (m *machine) chargeFor(t *ast.Term) bool { return m.charge(memoryOf(t)) }

// memoryOf estimates what a value takes, without the values in it.
func memoryOf(t *ast.Term) int64 {
	switch v := t.Value.(type) {
	case ast.String:
		return memoryValue + int64(len(v))
	case ast.Number:
		return memoryValue + int64(len(v))
	case *ast.Array:
		return memoryValue + memoryElement*int64(v.Len())
	case ast.Object:
		return memoryValue + memoryMember*int64(v.Len())
	case ast.Set:
		return memoryValue + memoryMember*int64(v.Len())
	}
	return 0
}

// growths say how much larger than its texts, together, the result of a builtin
// may be that is not in foreseen. The registry's builtins are called only where that
// fits into what is left, since most cannot be stopped.
var growths = map[string]int64{ // :: builtin → times
	ast.JSONUnmarshal.Name:                        16,
	ast.YAMLUnmarshal.Name:                        16,
	ast.URLQueryDecodeObject.Name:                 16,
	ast.RegexFindAllStringSubmatch.Name:           16,
	ast.RegexFind.Name:                            16,
	ast.RegexSplit.Name:                           16,
	ast.IndexOfN.Name:                             16,
	ast.GraphQLParse.Name:                         16,
	ast.GraphQLParseAndVerify.Name:                16,
	ast.GraphQLParseQuery.Name:                    16,
	ast.GraphQLParseSchema.Name:                   16,
	ast.RegoParseModule.Name:                      16,
	ast.JSONMarshal.Name:                          6,
	ast.JSONMarshalWithOptions.Name:               6,
	ast.YAMLMarshal.Name:                          6,
	ast.CryptoX509ParseCertificates.Name:          16,
	ast.CryptoX509ParseAndVerifyCertificates.Name: 16,
	ast.Base64Encode.Name:                         2,
	ast.Base64UrlEncode.Name:                      2,
	ast.Base64UrlEncodeNoPad.Name:                 2,
	ast.HexEncode.Name:                            2,
	ast.URLQueryEncode.Name:                       3,
}

const growth = 4 // of other builtins

// foreseen are the builtins whose result may be much larger than their operands: a
// bound of what it takes, and whether that can be told. Where it cannot, the call
// has an error.
var foreseen = map[string]func(left allowance, a []*ast.Term) (int64, bool){
	ast.NumbersRange.Name:     func(_ allowance, a []*ast.Term) (int64, bool) { return rangeMemory(a[0], a[1], nil) },
	ast.NumbersRangeStep.Name: func(_ allowance, a []*ast.Term) (int64, bool) { return rangeMemory(a[0], a[1], a[2]) },
	ast.NetCIDRExpand.Name:    cidrMemory,
	ast.Replace.Name: func(_ allowance, a []*ast.Term) (int64, bool) {
		s, ok1 := a[0].Value.(ast.String)
		old, ok2 := a[1].Value.(ast.String)
		with, ok3 := a[2].Value.(ast.String)
		return int64(len(s)) + product(int64(strings.Count(string(s), string(old))), int64(len(with))), ok1 && ok2 && ok3
	},
	ast.ReplaceN.Name: func(_ allowance, a []*ast.Term) (int64, bool) {
		patterns, ok1 := a[0].Value.(ast.Object)
		s, ok2 := a[1].Value.(ast.String)
		if !ok1 || !ok2 {
			return 0, false
		}
		n := int64(len(s))
		patterns.Foreach(func(k, v *ast.Term) {
			old, ok1 := k.Value.(ast.String)
			with, ok2 := v.Value.(ast.String)
			if ok1 && ok2 {
				n = sum(n, product(int64(strings.Count(string(s), string(old))), int64(len(with))))
			}
		})
		return n, true
	},
	ast.RegexReplace.Name: regexMemory,
	ast.Split.Name:        splitMemory,
	ast.SplitN.Name:       splitMemory,
	ast.Concat.Name: func(_ allowance, a []*ast.Term) (int64, bool) {
		sep, ok := a[0].Value.(ast.String)
		if !ok {
			return 0, false
		}
		n := int64(0)
		add := func(t *ast.Term) {
			if s, ok := t.Value.(ast.String); ok {
				n = sum(n, int64(len(s)+len(sep)))
			}
		}
		switch list := a[1].Value.(type) {
		case *ast.Array:
			list.Foreach(add)
		case ast.Set:
			list.Foreach(add)
		}
		return n, true
	},
	ast.ArrayConcat.Name: func(_ allowance, a []*ast.Term) (n int64, ok bool) {
		for _, t := range a {
			if list, isArray := t.Value.(*ast.Array); isArray {
				n += memoryElement * int64(list.Len())
			}
		}
		return n, true
	},
	ast.ArrayFlatten.Name: func(_ allowance, a []*ast.Term) (n int64, ok bool) {
		if list, isArray := a[0].Value.(*ast.Array); isArray {
			list.Foreach(func(t *ast.Term) {
				n += memoryElement
				if inner, isArray := t.Value.(*ast.Array); isArray {
					n += memoryElement * int64(inner.Len())
				}
			})
		}
		return n, true
	},
	ast.BitsShiftLeft.Name: func(_ allowance, a []*ast.Term) (int64, bool) {
		n, ok1 := a[0].Value.(ast.Number)
		by, ok2 := a[1].Value.(ast.Number)
		if !ok1 || !ok2 {
			return 0, false
		}
		shift, ok := by.Int64()
		if !ok {
			if f, isFloat := by.Float64(); isFloat && f < 0 {
				return 0, false
			}
			return math.MaxInt64, true
		}
		return sum(int64(len(n)), max(shift, 0)/3), true // as decimal digits
	},
	ast.JSONMarshal.Name:            textMemory,
	ast.JSONMarshalWithOptions.Name: textMemory,
	ast.YAMLMarshal.Name:            textMemory,
	ast.Sprintf.Name:                sprintfMemory,
	ast.InternalTemplateString.Name: textMemory,
	ast.URLQueryEncodeObject.Name:   textMemory,
	ast.JSONMatchSchema.Name:        textMemory,
	ast.JSONSchemaVerify.Name:       textMemory,
	ast.JWTEncodeSign.Name:          textMemory,
	ast.JSONPatch.Name:              textMemory,
	ast.WalkBuiltin.Name: func(left allowance, a []*ast.Term) (int64, bool) {
		return product(left.values(a[0].Value), memoryElement+memoryValue), true
	},
}

// splitMemory bounds the parts of a text.
func splitMemory(_ allowance, a []*ast.Term) (int64, bool) {
	s, ok1 := a[0].Value.(ast.String)
	by, ok2 := a[1].Value.(ast.String)
	return product(int64(strings.Count(string(s), string(by)))+1, memoryElement+memoryValue), ok1 && ok2
}

// sum and product do not overflow.
func sum(a, b int64) int64 {
	if a > math.MaxInt64-b {
		return math.MaxInt64
	}
	return a + b
}

func product(a, b int64) int64 {
	if a != 0 && b > math.MaxInt64/a {
		return math.MaxInt64
	}
	return a * b
}

// foresee reports whether the result of a builtin fits. Where it does not, the
// evaluation has ended.
func (m *machine) foresee(b *builtin, operands []*ast.Term) bool {
	if m.env.MaxMemory == 0 {
		return true
	}
	if b.memory != nil {
		if n, ok := b.memory(allowance(m.left), operands); ok && !m.fits(n) {
			return false
		}
	}
	return m.fits(product(textBytes(operands), b.growth))
}

// textBytes is how long the operands are that are texts, together.
func textBytes(operands []*ast.Term) (n int64) {
	for _, t := range operands {
		if s, ok := t.Value.(ast.String); ok {
			n += int64(len(s))
		}
	}
	return n
}

// chargeResult reckons with what the registry's form of a builtin has given.
func (m *machine) chargeResult(b *builtin, t *ast.Term) bool {
	if tokenDecoders[b.name] {
		// A token, of at most so many bytes, is cheaper to reckon with by its text.
		if text, ok := b.args[0].load(m).Value.(ast.String); ok && !m.charge(16*int64(len(text))) {
			return false
		}
	}
	if deep[b.name] && m.env.MaxMemory > 0 {
		return m.charge(product(allowance(m.left).values(t.Value), memoryElement)) && m.chargeFor(t)
	}
	return m.chargeFor(t)
}

var tokenDecoders = map[string]bool{ast.JWTDecode.Name: true, ast.JWTDecodeVerify.Name: true}

// deep are the builtins whose result has values in it that were not there before.
var deep = map[string]bool{
	ast.JSONPatch.Name: true, ast.JSONFilter.Name: true, ast.JSONRemove.Name: true,
	ast.ObjectUnion.Name: true, ast.ObjectUnionN.Name: true, ast.ReachablePathsBuiltin.Name: true,
	ast.JSONUnmarshal.Name: true, ast.YAMLUnmarshal.Name: true, ast.URLQueryDecodeObject.Name: true,
	ast.RegexFindAllStringSubmatch.Name: true, ast.RegoParseModule.Name: true,
	ast.GraphQLParse.Name: true, ast.GraphQLParseAndVerify.Name: true, ast.GraphQLParseQuery.Name: true,
	ast.GraphQLParseSchema.Name: true, ast.CryptoX509ParseCertificates.Name: true,
	ast.CryptoX509ParseAndVerifyCertificates.Name: true, ast.NetCIDRMerge.Name: true,
	ast.HTTPSend.Name: true,
}

// allowance is how much may still be built, in bytes.
type allowance int64

// values counts the values in v, each as often as it is there, until they are more
// than fit.
func (left allowance) values(v ast.Value) int64 {
	most := left/memoryElement + 1
	return int64(sizeOf(v, int(min(most, math.MaxInt32))))
}

// textMemory bounds the text of values: of each of their texts six bytes for one.
func textMemory(left allowance, a []*ast.Term) (n int64, ok bool) {
	for _, t := range a {
		n = sum(n, textOf(t.Value, int64(left)-n))
	}
	return n, true
}

func textOf(v ast.Value, most int64) int64 {
	n := int64(8)
	add := func(t *ast.Term) bool {
		n = sum(n, textOf(t.Value, most-n))
		return n > most
	}
	switch v := v.(type) {
	case ast.String:
		n += 6 * int64(len(v))
	case ast.Number:
		n += int64(len(v))
	case *ast.Array:
		v.Until(add)
	case ast.Set:
		v.Until(add)
	case ast.Object:
		v.Until(func(k, v *ast.Term) bool { return add(k) || add(v) })
	}
	return n
}

// sprintfMemory bounds a text that is formatted: each verb takes what its operand
// does, or a width of at most a million.
func sprintfMemory(left allowance, a []*ast.Term) (int64, bool) {
	format, ok := a[0].Value.(ast.String)
	if !ok {
		return 0, false
	}
	n := sum(int64(len(format)), textOf(a[1].Value, int64(left)))
	if list, ok := a[1].Value.(*ast.Array); ok && strings.ContainsRune(string(format), '[') {
		n = product(n, int64(min(list.Len(), 1)*strings.Count(string(format), "%")+1)) // operands by number
	}
	digits := 0
	for i := range len(format) {
		switch c := format[i]; {
		case '0' <= c && c <= '9':
			if digits++; digits == 4 {
				n = sum(n, 1_000_000)
			}
		case c == '*':
			n = sum(n, 1_000_000)
		default:
			digits = 0
		}
	}
	return n, true
}

// rangeMemory bounds an array of numbers.
func rangeMemory(from, to, step *ast.Term) (int64, bool) {
	numbers := [3]*big.Int{nil, nil, big.NewInt(1)}
	for i, t := range []*ast.Term{from, to, step} {
		if t == nil {
			continue
		}
		n, ok := t.Value.(ast.Number)
		if !ok {
			return 0, false
		}
		f, ok := new(big.Float).SetString(string(n))
		if !ok || !f.IsInt() {
			return 0, false
		}
		numbers[i], _ = f.Int(nil)
	}
	if numbers[2].Sign() <= 0 {
		return 0, false
	}
	n := new(big.Int).Sub(numbers[0], numbers[1])
	n.Div(n.Abs(n), numbers[2])
	if !n.IsInt64() {
		return math.MaxInt64, true
	}
	return product(sum(n.Int64(), 1), memoryElement+memoryValue), true
}

func cidrMemory(_ allowance, a []*ast.Term) (int64, bool) {
	s, ok := a[0].Value.(ast.String)
	if !ok {
		return 0, false
	}
	p, err := netip.ParsePrefix(string(s))
	if err != nil {
		return 0, false
	}
	bits := p.Addr().BitLen() - p.Bits()
	if bits > 32 {
		return math.MaxInt64, true
	}
	return (memoryMember + memoryValue) << bits, true
}

// regexMemory bounds a replacement: so many matches, each with the text for it, in
// which there may be parts of the match.
func regexMemory(left allowance, a []*ast.Term) (int64, bool) {
	s, ok1 := a[0].Value.(ast.String)
	pattern, ok2 := a[1].Value.(ast.String)
	with, ok3 := a[2].Value.(ast.String)
	if !ok1 || !ok2 || !ok3 {
		return 0, false
	}
	parts := product(int64(strings.Count(string(with), "$")), int64(len(s)))
	n := sum(int64(len(s)), sum(parts, product(int64(len(s))+1, int64(len(with)))))
	if n <= 1<<20 {
		return n, true
	}
	re, err := regexp.Compile(string(pattern))
	if err != nil {
		return 0, false
	}
	most := min(int64(left)/int64(max(len(with), 1)), int64(len(s))) + 1 // more do not fit
	matches := int64(len(re.FindAllStringIndex(string(s), int(most))))
	return sum(int64(len(s)), sum(parts, product(matches, int64(len(with))))), true
}
