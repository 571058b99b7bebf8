package bundles_test

import (
	"errors"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/gatehouse-authz/gatehouse/bundles"
)

// TestStoreDiskFull saves in a process that may write no large files, which is
// what a full disk looks like: a write that stops half way.
func TestStoreDiskFull(t *testing.T) {
	b := fetched(t, orders.with("limits/data.json", `"`+incompressible(64<<10)+`"`).tarball(t), `"2"`)
	if dir := os.Getenv("BUNDLES_TEST_FULL"); dir != "" {
		signal.Ignore(syscall.SIGXFSZ)
		limit := syscall.Rlimit{Cur: 16 << 10, Max: 16 << 10}
		if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &limit); err != nil {
			t.Fatal(err)
		}
		s := mustStore(t, dir)
		if err := s.Save("key", b); !errors.Is(err, syscall.EFBIG) {
			t.Errorf("got %v, want EFBIG", err)
		}
		return
	}
	dir := t.TempDir()
	s := mustStore(t, dir)
	first := fetched(t, orders.tarball(t), `"1"`)
	mustSave(t, s, "key", first)

	cmd := exec.Command(os.Args[0], "-test.run=^TestStoreDiskFull$", "-test.v")
	cmd.Env = append(os.Environ(), "BUNDLES_TEST_FULL="+dir)
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS") {
		t.Fatalf("got %v: %s", err, out)
	}
	if got := names(t, dir); len(got) != 1 {
		t.Errorf("got %q, want no part of a file left", got)
	}
	if got, err := s.Load("key", readOrders); err != nil || got.Digest != first.Digest {
		t.Errorf("got %v, want what was saved before", err)
	}
}

func incompressible(n int) string {
	var b strings.Builder
	x := uint64(1)
	for b.Len() < n {
		x = x*6364136223846793005 + 1442695040888963407
		b.WriteByte("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_"[x>>58])
	}
	return b.String()
}

// TestStoreReadOnly looks with the eyes of another user, on a thread that ends
// with it: for root every directory can be written.
func TestStoreReadOnly(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can become another user")
	}
	base, err := os.MkdirTemp("/tmp", "store")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(base) })
	dir := filepath.Join(base, "store")
	s := mustStore(t, dir)
	b := fetched(t, orders.tarball(t), `"1"`)
	mustSave(t, s, "key", b)
	for path, mode := range map[string]os.FileMode{base: 0o755, dir: 0o555, filepath.Join(dir, names(t, dir)[0]): 0o444} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlock it: the thread ends
		if _, _, errno := syscall.RawSyscall(syscall.SYS_SETFSUID, 65534, 0, 0); errno != 0 {
			t.Error(errno)
			return
		}
		s, err := bundles.NewStore(dir)
		if err != nil {
			t.Errorf("got %v, want a store that cannot be written to be no error", err)
			return
		}
		if err := s.Save("key", b); !errors.Is(err, os.ErrPermission) {
			t.Errorf("save: got %v, want no permission", err)
		}
		if got, err := s.Load("key", readOrders); err != nil || got.Digest != b.Digest {
			t.Errorf("load: got %v, want the bundle", err)
		}
		// Nor can one be made there, and that is no error either.
		s, err = bundles.NewStore(filepath.Join(dir, "sub"))
		if err != nil {
			t.Errorf("got %v, want no error", err)
			return
		}
		if err := s.Save("key", b); !errors.Is(err, os.ErrPermission) {
			t.Errorf("save below: got %v, want no permission", err)
		}
		if _, err := s.Load("key", readOrders); !errors.Is(err, bundles.ErrNotSaved) {
			t.Errorf("load below: got %v, want ErrNotSaved", err)
		}
	}()
	<-done
}
