package compose

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

// inside names the folder of the test, in the process that has namespaces of its
// own.
const inside = "GATEHOUSE_COMPOSE_INSIDE"

// keyDir is where an engine keeps its key, wherever the rest of it is.
const keyDir = "/etc/docker"

// Bounds of waiting.
const (
	engineTime  = time.Minute     // for the engine to answer
	upTime      = 3 * time.Minute // for the stack to be healthy
	commandTime = 2 * time.Minute // for another command of Docker
)

func TestMain(m *testing.M) {
	code, err := outer()
	if os.Getenv(inside) != "" {
		code, err = inner(m, os.Getenv(inside))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "compose:", err)
		code = 1
	}
	os.Exit(code)
}

// outer runs the test again, in namespaces of its own, and removes what it left.
func outer() (code int, err error) {
	if os.Getenv(inside) != "" {
		return 0, nil
	}
	if os.Geteuid() != 0 {
		return 0, errors.New("a Docker engine of its own needs root: run make compose-e2e as root")
	}
	dir, err := os.MkdirTemp("", "gatehouse-compose-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	if err := os.Mkdir(keyDir, 0o755); err == nil {
		defer os.Remove(keyDir)
	}
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	// An interrupt ends it, and what it made is removed all the same.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	cmd := exec.CommandContext(ctx, self, os.Args[1:]...)
	cmd.Env = append(os.Environ(), inside+"="+dir)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWIPC,
		Pdeathsig:  syscall.SIGKILL, // and with the first process of a namespace, all of it ends
	}
	err = cmd.Run()
	removeGroups(filepath.Base(dir))
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return max(exit.ExitCode(), 1), nil
	}
	if err != nil {
		return 0, fmt.Errorf("starting a process with namespaces of its own, which a Docker engine needs: %w", err)
	}
	return 0, nil
}

// removeGroups removes the control groups that the engine made below name.
func removeGroups(name string) {
	found, _ := filepath.Glob("/sys/fs/cgroup/*/" + name) // the pattern is one
	for _, group := range append(found, "/sys/fs/cgroup/"+name) {
		var all []string
		_ = filepath.WalkDir(group, func(path string, entry fs.DirEntry, err error) error {
			if err == nil && entry.IsDir() {
				all = append(all, path)
			}
			return nil
		})
		for i := len(all) - 1; i >= 0; i-- {
			_ = os.Remove(all[i]) // what is in use stays, and is empty
		}
	}
}

// docker is the engine, the client and the stack of this test.
var docker struct {
	env     []string
	compose string // deploy/compose
}

// inner starts the engine, loads the images, brings the stack up and runs the tests.
func inner(m *testing.M, dir string) (code int, err error) {
	if err := prepare(); err != nil {
		return 0, fmt.Errorf("preparing namespaces for the Docker engine: %w", err)
	}
	module, err := stage.Module()
	if err != nil {
		return 0, err
	}
	docker.compose = filepath.Join(filepath.Dir(module), "deploy", "compose")
	plugins := filepath.Join(dir, "config", "cli-plugins")
	if err := os.MkdirAll(plugins, 0o700); err != nil {
		return 0, err
	}
	plugin, err := stage.Tool("docker-compose")
	if err != nil {
		return 0, err
	}
	if err := os.Symlink(plugin, filepath.Join(plugins, "docker-compose")); err != nil {
		return 0, err
	}
	socket := "unix://" + filepath.Join(dir, "docker.sock")
	docker.env = append(os.Environ(), "DOCKER_HOST="+socket, "DOCKER_CONFIG="+filepath.Join(dir, "config"), "DOCKER_BUILDKIT=0", "COMPOSE_ANSI=never")

	engine, err := startEngine(dir, socket)
	if err != nil {
		return 0, err
	}
	defer engine.stop()
	begun := time.Now()
	if err := loadImages(); err != nil {
		return 0, err
	}
	fmt.Printf("images: loaded after %.0f s\n", time.Since(begun).Seconds())

	begun = time.Now()
	defer func() {
		if code != 0 || err != nil {
			showLogs()
		}
		if _, downErr := compose(commandTime, "down", "--volumes", "--timeout", "5"); downErr != nil {
			err = errors.Join(err, downErr)
		}
	}()
	if out, err := compose(upTime, "up", "--detach", "--wait", "--no-build", "--pull", "never"); err != nil {
		return 0, fmt.Errorf("%w\n%s", err, out)
	}
	// The proxy is up when it answers for the teams' backends.
	err = until(arrival, func() error {
		for _, url := range []string{api + "/storefront/", desk + "/", jaeger + "/api/services", prometheus + "/-/ready"} {
			if status, _, err := ask("GET", url, "", "", ""); err != nil || status != 200 {
				return fmt.Errorf("GET %s: status %d, %v", url, status, err)
			}
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("the stack does not answer: %w", err)
	}
	fmt.Printf("stack: up after %.0f s\n", time.Since(begun).Seconds())
	return m.Run(), nil
}

// prepare makes the namespaces fit for an engine: its loopback is up, it sees its
// own processes, and what it writes outside of its folder is gone with it.
func prepare() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("mounting /proc: %w", err)
	}
	for _, dir := range []string{"/run", keyDir} { // locks and sockets; a key
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0755"); err != nil {
			return fmt.Errorf("mounting %s: %w", dir, err)
		}
	}
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	request := struct {
		name  [unix.IFNAMSIZ]byte
		flags uint16
		_     [22]byte
	}{flags: unix.IFF_UP}
	copy(request.name[:], "lo")
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(s), unix.SIOCSIFFLAGS, uintptr(unsafe.Pointer(&request))); errno != 0 {
		return fmt.Errorf("setting lo up: %w", errno)
	}
	return nil
}

// engine is a running dockerd.
type engine struct{ process *stage.Process }

// startEngine starts dockerd, with the best storage that works here.
func startEngine(dir, socket string) (*engine, error) {
	path := os.Getenv("PATH") + ":/usr/sbin:/sbin"
	if err := os.Setenv("PATH", path); err != nil {
		return nil, err
	}
	binary, err := exec.LookPath("dockerd")
	if err != nil {
		return nil, fmt.Errorf("no Docker engine, run e2e/fetch-docker: %w", err)
	}
	var failed []error
	// vfs copies each image whole: slow, and it works on every file system.
	for _, storage := range []string{"overlay2", "vfs"} {
		begun := time.Now()
		p, err := stage.Start("dockerd", exec.Command(binary,
			"--data-root", filepath.Join(dir, "data"), "--exec-root", filepath.Join(dir, "exec"), "--pidfile", filepath.Join(dir, "pid"),
			"--host", socket, "--storage-driver", storage,
			"--bridge", "none", "--cgroup-parent", "/"+filepath.Base(dir), "--live-restore=false", "--log-level", "warn",
			// Names that are not of the stack have nobody to ask; they fail at once.
			"--dns", "127.0.0.1"))
		if err != nil {
			return nil, err
		}
		e := &engine{p}
		err = until(engineTime, func() error {
			select {
			case <-p.Done():
				return errEnded
			default:
			}
			_, err := command(10*time.Second, nil, "docker", "version", "--format", "{{.Server.Version}}")
			return err
		})
		if err == nil {
			version, _ := command(10*time.Second, nil, "docker", "version", "--format", "{{.Server.Version}} (API {{.Server.APIVersion}})")
			fmt.Printf("engine: dockerd %s, storage %s, bridge networks with iptables, up after %.1f s\n",
				strings.TrimSpace(version), storage, time.Since(begun).Seconds())
			return e, nil
		}
		e.stop()
		failed = append(failed, fmt.Errorf("dockerd with storage %s: %w\n%s", storage, err, p.Output()))
		fmt.Printf("engine: storage %s does not work here\n", storage)
	}
	return nil, fmt.Errorf("no Docker engine runs on this machine; it needs root, namespaces, control groups and iptables:\n%w", errors.Join(failed...))
}

var errEnded = errors.New("it ended")

func (e *engine) stop() {
	_ = e.process.Signal(syscall.SIGTERM) // it may have ended
	if _, err := e.process.Wait(30 * time.Second); err != nil {
		e.process.Kill()
	}
}

// until calls f until it succeeds, its process has ended, or the time is over, and
// returns what it said last.
func until(atMost time.Duration, f func() error) error {
	deadline := time.NewTimer(atMost)
	defer deadline.Stop()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil || errors.Is(err, errEnded) {
			return err
		}
		select {
		case <-deadline.C:
			return fmt.Errorf("not after %s: %w", atMost, err)
		case <-tick.C:
		}
	}
}

// compose runs a command of "docker compose" on the stack.
func compose(atMost time.Duration, args ...string) (string, error) {
	args = append([]string{"compose", "--file", filepath.Join(docker.compose, "compose.yaml")}, args...)
	return command(atMost, nil, "docker", args...)
}

// command runs a command, and returns what it printed.
func command(atMost time.Duration, stdin io.Reader, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), atMost)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env, cmd.Stdin = docker.env, stdin
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("not done after %s", atMost)
		}
		return stdout.String(), fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, stderr.String())
	}
	return stdout.String(), nil
}

// showLogs prints what the containers are and said.
func showLogs() {
	for _, args := range [][]string{{"ps", "--all"}, {"logs", "--no-color", "--tail", "60"}} {
		out, err := compose(commandTime, args...)
		fmt.Printf("---- docker compose %s\n%s\n", strings.Join(args, " "), out)
		if err != nil {
			fmt.Println(err)
		}
	}
}
