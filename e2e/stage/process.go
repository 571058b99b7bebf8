// Package stage starts what plays together end to end: the gatehouse binary, a
// real Envoy, a backend that echoes. The tests, the demo and the benchmark use it.
//
// Everything listens on loopback, on ports that the system chooses unless told
// otherwise, and ends with the process that started it.
package stage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// startTime bounds how long a process may take to say that it is ready.
const startTime = 30 * time.Second

// Process is a running program.
type Process struct {
	Name string

	cmd    *exec.Cmd
	output output
	done   chan struct{}
	err    error // of Wait; set before done is closed
}

// Start starts a program. What it prints is kept, not shown.
func Start(name string, cmd *exec.Cmd) (*Process, error) {
	p := &Process{Name: name, cmd: cmd, done: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = &p.output, &p.output
	dieWithParent(cmd)
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// Pid is the process ID.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Output returns the end of what the process printed.
func (p *Process) Output() string { return p.output.String() }

// Signal sends a signal.
func (p *Process) Signal(s os.Signal) error { return p.cmd.Process.Signal(s) }

// Wait returns the exit code of the process, or an error when it has not ended
// in time.
func (p *Process) Wait(atMost time.Duration) (int, error) {
	select {
	case <-p.done:
	case <-time.After(atMost):
		return 0, fmt.Errorf("%s still runs after %s", p.Name, atMost)
	}
	var exit *exec.ExitError
	if p.err != nil && !errors.As(p.err, &exit) {
		return 0, p.err
	}
	return p.cmd.ProcessState.ExitCode(), nil
}

// Kill ends the process at once.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill() // it may have ended
	<-p.done
}

// Stop asks the process to end, and ends it when it does not.
func (p *Process) Stop() {
	_ = p.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(5 * time.Second):
		p.Kill()
	}
}

// until calls ready until it reports true.
func (p *Process) until(ready func() bool) error {
	timeout := time.After(startTime)
	for !ready() {
		select {
		case <-p.done:
			return fmt.Errorf("%s ended at its start: %v\n%s", p.Name, p.err, p.Output())
		case <-timeout:
			p.Kill()
			return fmt.Errorf("%s is not ready after %s\n%s", p.Name, startTime, p.Output())
		case <-time.After(5 * time.Millisecond):
		}
	}
	return nil
}

// output keeps the last of what is written.
type output struct {
	mu   sync.Mutex
	data []byte // guarded by mu
}

const keepOutput = 256 << 10

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.data = append(o.data, p...)
	if over := len(o.data) - keepOutput; over > keepOutput {
		o.data = bytes.Clone(o.data[over:])
	}
	return len(p), nil
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return string(o.data[max(0, len(o.data)-keepOutput):])
}

// Build builds a command, named by its folder relative to the module of e2e, and
// returns the path of the binary in dir.
func Build(ctx context.Context, dir, folder string) (string, error) {
	module, err := Module()
	if err != nil {
		return "", err
	}
	folder = filepath.Join(module, folder)
	binary := filepath.Join(dir, filepath.Base(folder))
	cmd := exec.CommandContext(ctx, "go", "build", "-o", binary, ".")
	cmd.Dir = folder
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building %s: %w\n%s", folder, err, out)
	}
	return binary, nil
}

// Module returns the folder of the module of e2e, for a working directory that is
// anywhere in the repository.
func Module() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		module := filepath.Join(dir, "e2e")
		if _, err := os.Stat(filepath.Join(module, "go.mod")); err == nil {
			return module, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("working directory is not in the repository")
		}
		dir = parent
	}
}
