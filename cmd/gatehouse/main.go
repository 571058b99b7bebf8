// Command gatehouse is one authorization server for many tenants: Envoy asks it
// about each request, and it answers with the policy of the tenant that owns the
// route.
//
//	gatehouse serve [-c gatehouse.yaml] [DIR]
//	gatehouse validate [-c gatehouse.yaml] [BUNDLE...]
//	gatehouse version [-json]
//	gatehouse health [-url http://127.0.0.1:8282/readyz] [-timeout 2s]
//
// serve runs until SIGTERM or SIGINT, then drains. With DIR, each folder
// DIR/<tenant>/ or archive DIR/<tenant>.tar.gz is the bundle of a tenant. One of
// -c and DIR is needed, both may be given.
//
// validate says what serve would refuse, in the file and in bundles (archives or
// folders), each fault with its place.
//
// version says what this binary was built from. health asks a running gatehouse
// whether it is ready, and fails when it is not or does not answer in time: the
// health check of a container that has no shell. GATEHOUSE_HEALTH_URL stands for
// its -url.
//
// Flags of serve and validate, and the environment variables that stand for them:
//
//	-c FILE            GATEHOUSE_CONFIG      the operator's file; see Config
//	-log-level LEVEL   GATEHOUSE_LOG_LEVEL   debug, info (default), warn or error
//	-log-format NAME   GATEHOUSE_LOG_FORMAT  json (default) or text
//
// The memory limit is that of the container (or GOMEMLIMIT), the collector's pace
// follows from it (or is GOGC), and GOMAXPROCS is the CPU quota.
//
// Logs go to standard error. The admin listener serves /healthz, /readyz,
// /metrics and /tenants. Exit status: 0 after a clean drain, or when there is
// nothing to refuse; 1 on a fault; 2 on bad usage.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	err := run(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr)
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintf(os.Stderr, "gatehouse: %v\n", err)
	}
	os.Exit(exitCode(err))
}

// usageError is an error of the command line.
type usageError string

func (e usageError) Error() string { return string(e) + "\n" + usage }

const usage = `usage:
  gatehouse serve [-c gatehouse.yaml] [DIR]
  gatehouse validate [-c gatehouse.yaml] [BUNDLE...]
  gatehouse version [-json]
  gatehouse health [-url http://127.0.0.1:8282/readyz] [-timeout 2s]`

func exitCode(err error) int {
	var u usageError
	switch {
	case err == nil || errors.Is(err, flag.ErrHelp):
		return 0
	case errors.As(err, &u):
		return 2
	}
	return 1
}

// run is the command: what main does, but for the process.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	if len(args) == 0 {
		return usageError("no command")
	}
	switch command := args[0]; command {
	case "serve", "validate":
		opts, err := parseFlags(command, args[1:], getenv, stderr)
		if err != nil {
			return err
		}
		if command == "validate" {
			return validate(ctx, opts, stdout)
		}
		return serve(ctx, opts)
	case "version":
		return printVersion(args[1:], stdout, stderr)
	case "health":
		return askHealth(ctx, args[1:], getenv, stdout, stderr)
	case "help", "-h", "-help", "--help":
		fmt.Fprintln(stdout, usage)
		return nil
	default:
		return usageError(fmt.Sprintf("no command %q", command))
	}
}

// options are what the command line says.
type options struct {
	config string
	args   []string
	log    *slog.Logger
	level  *logLevel // from which on log logs
	format string    // of log, where the command line or the environment says it
	stderr io.Writer
}

func parseFlags(command string, args []string, getenv func(string) string, stderr io.Writer) (*options, error) {
	opts := &options{level: new(logLevel), format: getenv("GATEHOUSE_LOG_FORMAT"), stderr: stderr}
	level := getenv("GATEHOUSE_LOG_LEVEL")
	flags := flag.NewFlagSet(command, flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() { fmt.Fprintln(stderr, usage); flags.PrintDefaults() }
	flags.StringVar(&opts.config, "c", getenv("GATEHOUSE_CONFIG"), "the operator's `FILE`")
	flags.StringVar(&level, "log-level", level, "debug, info, warn or error; default what the file says, or info")
	flags.StringVar(&opts.format, "log-format", opts.format, "json or text; default what the file says, or json")
	for len(args) > 0 { // flags may stand behind arguments, too
		if err := flags.Parse(args); err != nil {
			if errors.Is(err, flag.ErrHelp) {
				return nil, err
			}
			return nil, usageError(err.Error())
		}
		if args = flags.Args(); len(args) > 0 {
			opts.args = append(opts.args, args[0])
			args = args[1:]
		}
	}
	if opts.config == "" && len(opts.args) == 0 {
		return nil, usageError(command + " wants -c FILE, an argument, or both")
	}
	if command == "serve" && len(opts.args) > 1 {
		return nil, usageError(fmt.Sprintf("serve wants one directory, got %d", len(opts.args)))
	}
	if level != "" {
		l, err := parseLevel(strings.ToLower(level))
		if err != nil {
			return nil, usageError(fmt.Sprintf("log level %q is not debug, info, warn or error", level))
		}
		opts.level.configure(l)
		opts.level.fixed = true
	}
	var err error
	if opts.log, err = newLogger(stderr, or(opts.format, "json"), opts.level); err != nil {
		return nil, usageError(fmt.Sprintf("log format %q %s", opts.format, err))
	}
	return opts, nil
}

// logAs has the server log as the file says, where the command line and the
// environment say nothing. The file has been checked.
func (o *options) logAs(c Log) {
	level, _ := parseLevel(c.Level)
	o.level.configure(level)
	if o.format == "" {
		o.log, _ = newLogger(o.stderr, c.Format, o.level)
	}
}

func or(s, def string) string {
	if s == "" {
		return def
	}
	return s
}
