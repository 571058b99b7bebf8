package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"
)

// machine is what a run was made on, and with.
type machine struct {
	CPU       string    `json:"cpu"`
	CPUs      int       `json:"cpus"`
	MemoryGiB int       `json:"memory_gib"`
	Kernel    string    `json:"kernel"`
	Go        string    `json:"go"`
	Envoy     string    `json:"envoy"`
	Gatehouse string    `json:"gatehouse"`
	Load      string    `json:"load"` // average of the last minute, when the run began
	At        time.Time `json:"at"`
	Rounds    int       `json:"rounds"`
	Round     string    `json:"round"`
}

// describe returns what the run is made on.
func describe(gatehouse, envoy string, rounds int, round time.Duration) machine {
	m := machine{
		CPU: field("/proc/cpuinfo", "model name"), CPUs: runtime.NumCPU(), Go: runtime.Version(),
		Envoy: strings.TrimPrefix(filepath.Base(envoy), "envoy-"), Gatehouse: said(gatehouse, "version"),
		At: time.Now().UTC().Truncate(time.Second), Rounds: rounds, Round: round.String(),
	}
	var kib int
	if _, err := fmt.Sscan(field("/proc/meminfo", "MemTotal"), &kib); err == nil {
		m.MemoryGiB = (kib + 1<<19) >> 20
	}
	m.Kernel = strings.TrimSpace(read("/proc/sys/kernel/osrelease"))
	m.Load, _, _ = strings.Cut(read("/proc/loadavg"), " ")
	return m
}

func (m *machine) String() string {
	return fmt.Sprintf("%s, %d CPUs, %d GiB, Linux %s, %s, Envoy %s, %s; load before: %s; %d rounds of %s each, in turn",
		m.CPU, m.CPUs, m.MemoryGiB, m.Kernel, m.Go, m.Envoy, m.Gatehouse, m.Load, m.Rounds, m.Round)
}

// field returns what a file of /proc says of a name; "": nothing.
func field(file, name string) string {
	for line := range strings.Lines(read(file)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == name {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

func read(file string) string {
	text, _ := os.ReadFile(file) // what is not there says nothing
	return string(text)
}

// said is the first line that a program prints.
func said(binary string, args ...string) string {
	out, _ := exec.Command(binary, args...).Output() // one that does not run is noticed later
	line, _, _ := strings.Cut(string(out), "\n")
	return line
}
