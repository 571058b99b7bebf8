package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"
)

func TestCPUQuota(t *testing.T) {
	for _, c := range []struct {
		name  string
		files map[string]string
		want  float64
	}{
		{"no control groups", nil, 0},
		{"none of version 2", map[string]string{"proc/self/cgroup": "4:memory:/x\n"}, 0},
		{"no quota", map[string]string{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 0},
		{"one CPU", map[string]string{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1},
		{"less", map[string]string{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "75000 100000\n"}, .75},
		{"below", map[string]string{"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "50000 100000\n"}, .5},
		{"above", map[string]string{"proc/self/cgroup": "1:x:/\n0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n", "sys/fs/cgroup/a/cpu.max": "50000 100000\n"}, .5},
		{"nonsense", map[string]string{"proc/self/cgroup": "0::/../..\n", "sys/fs/cgroup/cpu.max": "x"}, 0},
		{"version 1", map[string]string{"proc/self/cgroup": "3:cpu,cpuacct:/a\n0::/\n", "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "250000\n", "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"}, 2.5},
		{"version 1, no quota", map[string]string{"proc/self/cgroup": "3:cpu:/\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 0},
	} {
		if got := cpuQuota(tree(t, c.files)); got != c.want {
			t.Errorf("%s: got %v, want %v", c.name, got, c.want)
		}
	}
}

// tree makes files, :: path → content, and returns their root.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestGroup(t *testing.T) {
	for _, c := range []struct {
		name  string
		files map[string]string
		want  string
	}{
		{"none", nil, ""},
		{"version 2", map[string]string{
			"proc/self/cgroup":         "0::/\n",
			"sys/fs/cgroup/cpu.max":    "150000 100000\n",
			"sys/fs/cgroup/cpu.stat":   "usage_usec 1\nnr_periods 40\nnr_throttled 4\nthrottled_usec 2500000\n",
			"sys/fs/cgroup/a/cpu.stat": "nr_periods 1\n",
		}, `
# HELP gatehouse_cgroup_cpu_quota CPU quota of the control group, or of the one above it that has the least, in CPUs; left out where there is none.
# TYPE gatehouse_cgroup_cpu_quota gauge
gatehouse_cgroup_cpu_quota 1.5
# HELP gatehouse_cgroup_cpu_throttled_seconds_total Time for which the control group was stopped since it had used up its CPU quota, in seconds of all CPUs.
# TYPE gatehouse_cgroup_cpu_throttled_seconds_total counter
gatehouse_cgroup_cpu_throttled_seconds_total 2.5
`},
		{"version 1, under a name that is not visible in a container", map[string]string{
			"proc/self/cgroup":           "3:cpu:/docker/x\n",
			"sys/fs/cgroup/cpu/cpu.stat": "nr_periods 40\nnr_throttled 4\nthrottled_time 2500000000\n",
		}, `
# HELP gatehouse_cgroup_cpu_throttled_seconds_total Time for which the control group was stopped since it had used up its CPU quota, in seconds of all CPUs.
# TYPE gatehouse_cgroup_cpu_throttled_seconds_total counter
gatehouse_cgroup_cpu_throttled_seconds_total 2.5
`},
	} {
		if err := testutil.CollectAndCompare(newGroup(tree(t, c.files)), strings.NewReader(c.want),
			"gatehouse_cgroup_cpu_quota", "gatehouse_cgroup_cpu_throttled_seconds_total"); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}
