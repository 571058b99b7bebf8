package main

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// parallel is how many questions of a batch run at once; 0: as many as there are
// slots.
func parallel() int {
	if belowOneCPU("/") {
		return 1
	}
	return 0
}

// belowOneCPU reports whether the process may use less than one CPU, by the quota
// of its control group (version 2) or of one above it. GOMAXPROCS does not tell: it
// is never less than 2 for a quota. root is that of the file system, "/".
func belowOneCPU(root string) bool {
	own, err := os.ReadFile(filepath.Join(root, "proc/self/cgroup"))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(own)) {
		path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::/")
		if !ok {
			continue
		}
		for {
			limit, err := os.ReadFile(filepath.Join(root, "sys/fs/cgroup", filepath.Clean("/"+path), "cpu.max"))
			if err == nil && lessThanPeriod(string(limit)) {
				return true
			}
			if path == "." || path == "" {
				return false
			}
			path = filepath.Dir(path)
		}
	}
	return false
}

// lessThanPeriod reports whether a cpu.max, "quota period", is less than one CPU.
// Its quota may be "max".
func lessThanPeriod(limit string) bool {
	quota, period, ok := strings.Cut(strings.TrimSpace(limit), " ")
	if !ok {
		return false
	}
	q, err := strconv.ParseInt(quota, 10, 64)
	p, err2 := strconv.ParseInt(period, 10, 64)
	return err == nil && err2 == nil && q < p
}
