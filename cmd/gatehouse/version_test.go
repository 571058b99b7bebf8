package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"reflect"
	"runtime"
	"runtime/debug"
	"strings"
	"testing"
)

// What the go command recorded is what a binary says of itself.
func TestBuild(t *testing.T) {
	info := &debug.BuildInfo{
		Main: debug.Module{Version: "v1.2.3"},
		Deps: []*debug.Module{
			{Path: "example.org/other", Version: "v0.1.0"},
			{Path: "github.com/open-policy-agent/opa", Version: "v1.22.2"},
		},
		Settings: []debug.BuildSetting{
			{Key: "vcs.revision", Value: "0123abcd"},
			{Key: "vcs.time", Value: "2026-11-22T07:00:00Z"},
			{Key: "vcs.modified", Value: "true"},
		},
	}
	here := runtime.Version() + ", " + runtime.GOOS + "/" + runtime.GOARCH
	for _, c := range []struct {
		info    *debug.BuildInfo
		release string
		want    string
	}{
		{info, "", "gatehouse v1.2.3, commit 0123abcd of 2026-11-22T07:00:00Z with changes, OPA v1.22.2, " + here},
		{info, "v9", "gatehouse v9, commit 0123abcd of 2026-11-22T07:00:00Z with changes, OPA v1.22.2, " + here},
		{&debug.BuildInfo{}, "", "gatehouse (unknown version), " + here},
		{&debug.BuildInfo{Settings: info.Settings[:1]}, "v9", "gatehouse v9, commit 0123abcd, " + here},
	} {
		if got := buildOf(c.info, c.release).String(); got != c.want {
			t.Errorf("got %q, want %q", got, c.want)
		}
	}
}

func TestVersion(t *testing.T) {
	say := func(args ...string) (string, int) {
		var stdout bytes.Buffer
		err := run(context.Background(), append([]string{"version"}, args...), none, &stdout, io.Discard)
		return stdout.String(), exitCode(err)
	}
	if got, code := say(); code != 0 || got != version()+"\n" || !strings.HasPrefix(got, "gatehouse ") {
		t.Errorf("version: got %d and %q", code, got)
	}
	text, code := say("-json")
	var got build
	dec := json.NewDecoder(strings.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&got); err != nil || code != 0 || !reflect.DeepEqual(got, thisBuild()) {
		t.Errorf("version -json: got %d, %v and %s", code, err, text)
	}
	for _, args := range [][]string{{"now"}, {"-nonsense"}} {
		if _, code := say(args...); code != 2 {
			t.Errorf("version %q: got exit code %d, want 2", args, code)
		}
	}
}
