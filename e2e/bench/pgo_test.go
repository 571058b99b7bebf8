package main

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/google/pprof/profile"
)

// A profile becomes small by its rarest stacks, and has none of what is left out.
func TestSmall(t *testing.T) {
	const limit = 20_000
	p := &profile.Profile{SampleType: []*profile.ValueType{{Type: "samples", Unit: "count"}, {Type: "cpu", Unit: "nanoseconds"}}, Period: 1}
	add := func(name string, count int64) {
		f := &profile.Function{ID: uint64(len(p.Function) + 1), Name: name, SystemName: name, Filename: name + ".go"}
		l := &profile.Location{ID: f.ID, Line: []profile.Line{{Function: f, Line: 7}}}
		p.Function, p.Location = append(p.Function, f), append(p.Location, l)
		p.Sample = append(p.Sample, &profile.Sample{Location: []*profile.Location{l}, Value: []int64{count, count * 1000}})
	}
	add("github.com/open-policy-agent/opa/v1/topdown.builtinJWTDecodeVerify", 1_000_000)
	add("hot", 1_000_000)
	for i := range 3000 {
		add(fmt.Sprintf("rare.function.%x.%x", i*7919, i*104729), 1)
	}
	text, dropped, err := small(p, limit)
	if err != nil {
		t.Fatal(err)
	}
	if len(text) > limit || dropped <= 0 || dropped > 0.003 {
		t.Errorf("got %d bytes without %v of the samples, want at most %d and the rarest", len(text), dropped, limit)
	}
	got, err := profile.Parse(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	if first := got.Sample[0]; first.Location[0].Line[0].Function.Name != "hot" || first.Value[0] != 1_000_000 {
		t.Errorf("the first sample: got %v, want the hottest that is not left out", first)
	}
}
