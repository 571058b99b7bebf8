package main

import (
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// parallel is how many questions of a batch run at once; 0: as many as there are
// slots. GOMAXPROCS does not tell of less than one CPU: it is never less than 2
// for a quota.
func parallel() int {
	if quota := cpuQuota("/"); quota > 0 && quota < 1 {
		return 1
	}
	return 0
}

// cpuQuota returns how many CPUs the process may use, by the quota of its control
// group or of one above it; 0: there is none. root is that of the file system, "/".
func cpuQuota(root string) (least float64) {
	for dir := range groups(root) {
		quota := quotaOf(dir)
		if quota > 0 && (least == 0 || quota < least) {
			least = quota
		}
	}
	return least
}

// quotaOf returns the quota of one group, in CPUs; 0: it has none.
func quotaOf(dir string) float64 {
	read := func(name string) string {
		data, _ := os.ReadFile(filepath.Join(dir, name))
		return strings.TrimSpace(string(data))
	}
	quota, period, _ := strings.Cut(read("cpu.max"), " ") // version 2: "max 100000", or "50000 100000"
	if quota == "" {
		quota, period = read("cpu.cfs_quota_us"), read("cpu.cfs_period_us") // version 1; -1: none
	}
	q, err := strconv.ParseInt(quota, 10, 64)
	p, err2 := strconv.ParseInt(period, 10, 64)
	if err != nil || err2 != nil || q <= 0 || p <= 0 {
		return 0
	}
	return float64(q) / float64(p)
}

// groups are the folders of the control group that counts the process's CPU time,
// and of those above it: the nearest first. Version 1 and version 2 may be mounted
// side by side.
func groups(root string) iter.Seq[string] {
	return func(yield func(string) bool) {
		own, err := os.ReadFile(filepath.Join(root, "proc/self/cgroup"))
		if err != nil {
			return
		}
		for line := range strings.Lines(string(own)) { // ID:CONTROLLERS:PATH
			part := strings.SplitN(strings.TrimSpace(line), ":", 3)
			if len(part) != 3 {
				continue
			}
			mount := "sys/fs/cgroup"
			switch {
			case part[0] == "0" && part[1] == "":
			case slices.Contains(strings.Split(part[1], ","), "cpu"):
				mount = filepath.Join(mount, part[1])
			default:
				continue
			}
			for path := filepath.Clean("/" + part[2]); ; path = filepath.Dir(path) {
				if !yield(filepath.Join(root, mount, path)) {
					return
				}
				if path == "/" {
					break
				}
			}
		}
	}
}
