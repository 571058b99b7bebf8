package control

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/open-policy-agent/opa/v1/keys"
)

// reader collects what is wrong with a configuration while it is read.
type reader struct {
	opts    Options
	faults  Faults
	notes   []Fault
	keys    map[string]*keys.Config // :: id → key
	signers map[string]bool         // :: id → a service signs with its private key

	overridden []string // keys that were discovered, and are not in force
}

func (r *reader) fault(path, format string, args ...any) {
	r.faults = append(r.faults, Fault{path, fmt.Sprintf(format, args...)})
}

func (r *reader) note(path, text string) { r.notes = append(r.notes, Fault{path, text}) }

// object is one mapping of a configuration. Its methods read a key each; what
// has not been read by the end is a fault.
type object struct {
	r    *reader
	path string
	m    map[string]any  // nil where it is absent
	read map[string]bool // of the keys of m; nil where it has none
}

func (r *reader) object(path string, m map[string]any) object {
	o := object{r: r, path: path, m: m}
	if len(m) > 0 {
		o.read = make(map[string]bool, len(m))
	}
	return o
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

func (o *object) at(key string) string { return join(o.path, key) }

// has reports whether the key is there, and takes it as read.
func (o *object) has(key string) bool { return o.value(key) != nil }

func (o *object) value(key string) any {
	v, ok := o.m[key]
	if ok {
		o.read[key] = true
	}
	return v
}

// end faults the keys that nobody has read.
func (o *object) end() {
	var unread []string
	for key := range o.m {
		if !o.read[key] {
			unread = append(unread, key)
		}
	}
	slices.Sort(unread)
	for _, key := range unread {
		o.r.fault(o.at(key), "unknown or unsupported key")
	}
}

// object returns the mapping at key. A key without a value is an empty mapping.
func (o *object) object(key string) object {
	var m map[string]any
	_, present := o.m[key]
	switch v := o.value(key).(type) {
	case map[string]any:
		m = v
	case nil:
		if present {
			m = map[string]any{}
		}
	default:
		o.r.fault(o.at(key), "is not a mapping")
	}
	return o.r.object(o.at(key), m)
}

func (o *object) string(key, def string) string {
	switch v := o.value(key).(type) {
	case nil:
		return def
	case string:
		return v
	}
	o.r.fault(o.at(key), "is not a string")
	return def
}

func (o *object) bool(key string) bool {
	switch v := o.value(key).(type) {
	case nil:
		return false
	case bool:
		return v
	}
	o.r.fault(o.at(key), "is not true or false")
	return false
}

// float returns the number at key. It is false where there is none, and faults
// what is not a number, of what stands in unit.
func (o *object) float(key, unit string) (n float64, ok bool) {
	switch v := o.value(key).(type) {
	case nil:
		return 0, false
	case int:
		return float64(v), true
	case float64:
		return v, true
	}
	o.r.fault(o.at(key), "is not a number%s", unit)
	return 0, false
}

// number reads a number that is not negative.
func (o *object) number(key string, def float64) float64 {
	n, ok := o.float(key, "")
	if !ok {
		return def
	}
	if n < 0 {
		o.r.fault(o.at(key), "is less than 0")
	}
	return n
}

// count reads a whole number between two bounds.
func (o *object) count(key string, def, least, most int64) int64 {
	if !o.has(key) {
		return def
	}
	n := o.number(key, float64(def))
	if n != math.Trunc(n) || n < float64(least) || n > float64(most) {
		o.r.fault(o.at(key), "is not a whole number between %d and %d", least, most)
		return def
	}
	return int64(n)
}

// seconds reads a number of seconds, which may be a fraction.
func (o *object) seconds(key string, def time.Duration) time.Duration {
	s, ok := o.float(key, " of seconds")
	if !ok {
		return def
	}
	const year = 365 * 24 * 3600
	if s < 0 || s > year {
		o.r.fault(o.at(key), "is not between 0 and %d seconds", year)
		return def
	}
	return time.Duration(s * float64(time.Second))
}

// strings reads a mapping of strings.
func (o *object) strings(key string) map[string]string {
	child := o.object(key)
	m := make(map[string]string, len(child.m))
	for _, k := range slices.Sorted(maps.Keys(child.m)) {
		m[k] = child.string(k, "")
	}
	return m
}

// items returns the list at key; nil where there is none.
func (o *object) items(key string) []any {
	v := o.value(key)
	list, ok := v.([]any)
	if v != nil && !ok {
		o.r.fault(o.at(key), "is not a list")
	}
	return list
}

// list reads a list of strings.
func (o *object) list(key string) []string {
	var strs []string
	for i, v := range o.items(key) {
		s, ok := v.(string)
		if !ok {
			o.r.fault(fmt.Sprintf("%s[%d]", o.at(key), i), "is not a string")
		}
		strs = append(strs, s)
	}
	return strs
}

// objects reads a list of mappings.
func (o *object) objects(key string) []object {
	var objects []object
	for i, v := range o.items(key) {
		at := fmt.Sprintf("%s[%d]", o.at(key), i)
		m, ok := v.(map[string]any)
		if !ok {
			o.r.fault(at, "is not a mapping")
		}
		objects = append(objects, o.r.object(at, maps.Clone(m)))
	}
	return objects
}
