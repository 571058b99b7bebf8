package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

// services are the parts of the demo that run as containers of their own, in
// deploy/compose.
var services = map[string]func(ctx context.Context, o serviceOptions, stdout io.Writer) error{
	"desk":   serveDesk,
	"echo":   serveEcho,
	"upload": upload,
}

// serviceOptions are the flags of a service.
type serviceOptions struct {
	listen string // address
	root   string // of the repository, or of what is copied from it
	s3     string // URL of the S3 server
}

// uploadTime is how long the bucket may take to be there.
const uploadTime = time.Minute

// runService runs a service until ctx ends, or until it has done what it does.
func runService(ctx context.Context, name string, args []string, stdout io.Writer) error {
	var o serviceOptions
	flags := flag.NewFlagSet("demo "+name, flag.ContinueOnError)
	flags.StringVar(&o.listen, "listen", "127.0.0.1:8080", "`address` that desk and echo listen on")
	flags.StringVar(&o.root, "root", "", "`folder` of the repository, for desk and upload; empty: the working directory is in it")
	flags.StringVar(&o.s3, "s3", "", "`URL` of the S3 server, for desk and upload; AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY say who they are")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return err
	} else if err != nil || flags.NArg() > 0 {
		return errUsage
	}
	if o.root == "" && name != "echo" {
		module, err := stage.Module()
		if err != nil {
			return err
		}
		o.root = filepath.Dir(module)
	}
	return services[name](ctx, o, stdout)
}

// server is the S3 server that the flags and the environment name.
func (o serviceOptions) server() (*stage.S3, error) {
	user := stage.S3User{Access: os.Getenv("AWS_ACCESS_KEY_ID"), Secret: os.Getenv("AWS_SECRET_ACCESS_KEY")}
	if o.s3 == "" || user.Access == "" || user.Secret == "" {
		return nil, fmt.Errorf("%w: -s3, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are needed", errUsage)
	}
	return &stage.S3{URL: o.s3, Root: user}, nil
}

// teams are those of the demo, copied to a temporary folder, which remove takes
// away, with the shelf from which they are uploaded.
func (o serviceOptions) teams(s3 *stage.S3) (all *teams, remove func(), err error) {
	dir, err := os.MkdirTemp("", "demo-")
	if err != nil {
		return nil, nil, err
	}
	remove = func() { _ = os.RemoveAll(dir) }
	all, err = newTeams(filepath.Join(o.root, "deploy", "demo"), filepath.Join(dir, "tenants"))
	if err != nil {
		remove()
		return nil, nil, err
	}
	all.shelf = &shelf{S3: s3, tenants: all.dir}
	return all, remove, nil
}

func serveEcho(ctx context.Context, o serviceOptions, _ io.Writer) error {
	echo, err := stage.StartEchoAt(o.listen)
	if err != nil {
		return err
	}
	<-ctx.Done()
	echo.Close()
	return nil
}

// serveDesk runs the server of the order desk. What a visitor changes on the stage
// is kept in a temporary folder, and uploaded.
func serveDesk(ctx context.Context, o serviceOptions, _ io.Writer) error {
	s3, err := o.server()
	if err != nil {
		return err
	}
	all, remove, err := o.teams(s3)
	if err != nil {
		return err
	}
	defer remove()
	d, err := startDesk(o.root, all, o.listen)
	if err != nil {
		return err
	}
	<-ctx.Done()
	d.Close()
	return nil
}

// upload makes the bucket, a user who may read it and do nothing else, which is
// whom gatehouse asks as, and a bundle of each tenant. It waits for the server. A
// bucket that is there is left as it is: visitors may have changed it.
func upload(ctx context.Context, o serviceOptions, stdout io.Writer) error {
	s3, err := o.server()
	if err != nil {
		return err
	}
	reader := stage.S3User{Access: os.Getenv("READER_ACCESS_KEY_ID"), Secret: os.Getenv("READER_SECRET_ACCESS_KEY")}
	if reader.Access == "" || reader.Secret == "" {
		return fmt.Errorf("%w: READER_ACCESS_KEY_ID and READER_SECRET_ACCESS_KEY are needed", errUsage)
	}
	ctx, cancel := context.WithTimeout(ctx, uploadTime)
	defer cancel()
	for {
		status, _, err := s3.Get(s3.Root, bucket, "?list-type=2")
		if err == nil && status == http.StatusOK {
			fmt.Fprintf(stdout, "bucket %s is there\n", bucket)
			return nil
		}
		if err == nil && status == http.StatusNotFound {
			break
		}
		if err == nil {
			err = fmt.Errorf("status %d", status)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("asking the S3 server at %s for bucket %s: %w", o.s3, bucket, err)
		case <-time.After(200 * time.Millisecond):
		}
	}
	all, remove, err := o.teams(s3)
	if err != nil {
		return err
	}
	defer remove()
	if err := all.shelf.fill(); err != nil {
		return err
	}
	if err := s3.AddReader(bucket, reader, "*"); err != nil {
		return err
	}
	fmt.Fprintf(stdout, "bucket %s is filled\n", bucket)
	return nil
}
