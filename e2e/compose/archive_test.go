package compose

import (
	"archive/tar"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
)

// made are what an engine puts into each container.
var made = []string{".dockerenv", "dev/", "proc/", "sys/", "etc/hostname", "etc/hosts", "etc/resolv.conf", "etc/mtab"}

// contents says what is in an archive of a container: path, mode, owner, digest.
func contents(t *testing.T, archive string) string {
	t.Helper()
	var lines []string
	for r := tar.NewReader(strings.NewReader(archive)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if slices.ContainsFunc(made, func(path string) bool {
			return h.Name == path || strings.HasSuffix(path, "/") && strings.HasPrefix(h.Name, path)
		}) {
			continue
		}
		sum := sha256.New()
		if _, err := io.Copy(sum, r); err != nil {
			t.Fatal(err)
		}
		lines = append(lines, fmt.Sprintf("%s %o %d:%d %x", h.Name, h.Mode&0o777, h.Uid, h.Gid, sum.Sum(nil)))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}
