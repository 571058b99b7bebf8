package main

import (
	"os"
	"path/filepath"
	"testing"
)

func TestBelowOneCPU(t *testing.T) {
	for _, c := range []struct {
		name  string
		files map[string]string
		want  bool
	}{
		{"no control groups", nil, false},
		{"none of version 2", map[string]string{"proc/self/cgroup": "4:cpu:/x\n"}, false},
		{"no quota", map[string]string{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, false},
		{"one CPU", map[string]string{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 100000\n"}, false},
		{"less", map[string]string{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "75000 100000\n"}, true},
		{"below", map[string]string{"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "50000 100000\n"}, true},
		{"above", map[string]string{"proc/self/cgroup": "1:x:/\n0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n", "sys/fs/cgroup/a/cpu.max": "50000 100000\n"}, true},
		{"nonsense", map[string]string{"proc/self/cgroup": "0::/../..\n", "sys/fs/cgroup/cpu.max": "x"}, false},
	} {
		root := t.TempDir()
		for name, text := range c.files {
			path := filepath.Join(root, name)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if got := belowOneCPU(root); got != c.want {
			t.Errorf("%s: got %t, want %t", c.name, got, c.want)
		}
	}
}
