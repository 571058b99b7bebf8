package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/gatehouse-authz/gatehouse/tenants"
)

// faultAt is an error of the one value at n, which the decoder collects with
// those of others.
func faultAt(n *yaml.Node, format string, args ...any) error {
	return &yaml.TypeError{Errors: []string{fmt.Sprintf("line %d: %s", n.Line, fmt.Sprintf(format, args...))}}
}

// Size is a number of bytes: a number, or one with KiB, MiB or GiB.
type Size int64

var units = []struct {
	suffix string
	bytes  int64
}{{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"B", 1}, {"", 1}}

// UnmarshalYAML reads a size.
func (s *Size) UnmarshalYAML(n *yaml.Node) error {
	for _, u := range units {
		text, ok := strings.CutSuffix(n.Value, u.suffix)
		if !ok || n.Kind != yaml.ScalarNode {
			continue
		}
		v, err := strconv.ParseInt(strings.TrimSpace(text), 10, 64)
		if err != nil || v <= 0 || v > math.MaxInt64/u.bytes {
			break
		}
		*s = Size(v * u.bytes)
		return nil
	}
	return faultAt(n, "%q is not a size, like 64MiB or 65536", n.Value)
}

// Duration is a time, like 500ms or 5m.
type Duration time.Duration

// UnmarshalYAML reads a duration.
func (d *Duration) UnmarshalYAML(n *yaml.Node) error {
	v, err := time.ParseDuration(n.Value)
	if err != nil || n.Kind != yaml.ScalarNode || v <= 0 {
		return faultAt(n, "%q is not a time, like 500ms or 5m", n.Value)
	}
	*d = Duration(v)
	return nil
}

// Delay is a Duration that may be 0.
type Delay time.Duration

// UnmarshalYAML reads a delay.
func (d *Delay) UnmarshalYAML(n *yaml.Node) error {
	v, err := time.ParseDuration(n.Value)
	if err != nil || n.Kind != yaml.ScalarNode || v < 0 {
		return faultAt(n, "%q is not a time, like 5s, or 0s", n.Value)
	}
	*d = Delay(v)
	return nil
}

// Count is a number of things, 0 to a million.
type Count int

const maxCount = 1_000_000

// UnmarshalYAML reads a count.
func (c *Count) UnmarshalYAML(n *yaml.Node) error {
	v, err := strconv.Atoi(n.Value)
	if err != nil || n.Kind != yaml.ScalarNode || v < 0 || v > maxCount {
		return faultAt(n, "%q is not a number from 0 to %d", n.Value, maxCount)
	}
	*c = Count(v)
	return nil
}

// OnError is a tenants.OnError by its name.
type OnError tenants.OnError

var onErrors = map[string]tenants.OnError{
	"deny":     tenants.OnErrorDeny,
	"allow":    tenants.OnErrorAllow,
	"upstream": tenants.OnErrorUpstream,
}

// UnmarshalYAML reads the name.
func (o *OnError) UnmarshalYAML(n *yaml.Node) error {
	v, ok := onErrors[n.Value]
	if !ok || n.Kind != yaml.ScalarNode {
		return faultAt(n, "%q is not deny, allow or upstream", n.Value)
	}
	*o = OnError(v)
	return nil
}
