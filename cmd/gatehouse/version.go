package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"runtime"
	"runtime/debug"
	"strings"
)

// release names the version of a build whose sources have no history to take it
// from: go build -ldflags '-X main.release=v1.2.3'. Empty: what the go command
// recorded.
var release string

// build says what this binary is and where it came from, as far as its build
// recorded it. Empty: unknown.
type build struct {
	Version    string `json:"version"`     // v1.2.3, or a pseudo-version of the commit
	Commit     string `json:"commit"`      // that it was built from
	CommitDate string `json:"commit_date"` // RFC 3339
	Modified   bool   `json:"modified"`    // the sources differed from the commit
	Go         string `json:"go"`
	OPA        string `json:"opa"`
	OS         string `json:"os"`
	Arch       string `json:"arch"`
}

// thisBuild reads what the go command put into the binary.
func thisBuild() build {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		info = &debug.BuildInfo{}
	}
	return buildOf(info, release)
}

func buildOf(info *debug.BuildInfo, release string) build {
	b := build{Version: or(release, info.Main.Version), Go: runtime.Version(), OS: runtime.GOOS, Arch: runtime.GOARCH}
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			b.Commit = s.Value
		case "vcs.time":
			b.CommitDate = s.Value
		case "vcs.modified":
			b.Modified = s.Value == "true"
		}
	}
	for _, dep := range info.Deps {
		if dep.Path != "github.com/open-policy-agent/opa" {
			continue
		}
		if dep.Replace != nil {
			dep = dep.Replace
		}
		b.OPA = dep.Version
	}
	return b
}

// String returns one line: "gatehouse v1.2.3, commit 0123 of DATE with changes,
// OPA v1.22.2, go1.26.8, linux/amd64".
func (b build) String() string {
	parts := []string{"gatehouse " + or(b.Version, "(unknown version)")}
	if b.Commit != "" {
		commit := "commit " + b.Commit
		if b.CommitDate != "" {
			commit += " of " + b.CommitDate
		}
		if b.Modified {
			commit += " with changes"
		}
		parts = append(parts, commit)
	}
	if b.OPA != "" {
		parts = append(parts, "OPA "+b.OPA)
	}
	return strings.Join(append(parts, b.Go, b.OS+"/"+b.Arch), ", ")
}

// version is what the log and "gatehouse version" say of this binary.
func version() string { return thisBuild().String() }

// printVersion is the command "version".
func printVersion(args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("version", flag.ContinueOnError)
	flags.SetOutput(stderr)
	asJSON := flags.Bool("json", false, "print an object: version, commit, commit_date, modified, go, opa, os, arch")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return err
	} else if err != nil {
		return usageError(err.Error())
	}
	if flags.NArg() > 0 {
		return usageError(fmt.Sprintf("version wants no argument, got %q", flags.Arg(0)))
	}
	if !*asJSON {
		_, err := fmt.Fprintln(stdout, version())
		return err
	}
	enc := json.NewEncoder(stdout)
	enc.SetIndent("", "  ")
	return enc.Encode(thisBuild())
}
