package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/gatehouse-authz/gatehouse/bundles"
	"github.com/gatehouse-authz/gatehouse/control"
	"github.com/gatehouse-authz/gatehouse/policy"
)

// validate says what serve would refuse: in the operator's file, and in the
// bundles, which it reads and compiles for the entry points of all tenants.
func validate(ctx context.Context, opts *options, stdout io.Writer) error {
	cfg := &Loaded{Config: defaultConfig()}
	settings := policy.Options{Entries: []string{control.DefaultEntry}}
	var all []error
	if opts.config != "" {
		loaded, err := load(opts.config, "", true)
		if err != nil {
			all = append(all, err)
		} else {
			cfg = loaded
			for _, n := range cfg.Notes {
				fmt.Fprintf(stdout, "%s:%d: note: %s %s\n", opts.config, n.line, n.path, n.text)
			}
			tenant, err := cfg.Settings("sample-tenant")
			if err != nil {
				return err
			}
			settings.Entries = append([]string{tenant.Entry}, tenant.Entries...)
			settings.AllowHeaders = tenant.AllowHeaders
		}
	}
	limits := bundles.Limits{
		Bytes:    int64(cfg.Tenants.Limits.BundleBytes),
		Expanded: int64(cfg.Tenants.Limits.BundleExpandedBytes),
	}
	for _, path := range opts.args {
		if err := validateBundle(ctx, path, limits, settings); err != nil {
			all = append(all, fmt.Errorf("%s: %w", path, err))
		} else {
			fmt.Fprintf(stdout, "%s: ok\n", path)
		}
	}
	if len(all) == 0 && opts.config != "" {
		fmt.Fprintf(stdout, "%s: ok\n", opts.config)
	}
	return errors.Join(all...)
}

func validateBundle(ctx context.Context, path string, limits bundles.Limits, opts policy.Options) error {
	b, err := readBundle(ctx, path, limits)
	if err != nil {
		return err
	}
	part, err := policy.Prepare(b.Bundle)
	if err != nil {
		return err
	}
	_, err = policy.Compile([]policy.Named{{Name: control.DirBundle, Part: part}}, opts)
	return err
}

// readBundle reads an archive or a folder.
func readBundle(ctx context.Context, path string, limits bundles.Limits) (*bundles.Bundle, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.IsDir() {
		abs, err := filepath.Abs(path)
		if err != nil {
			return nil, err
		}
		dir, err := bundles.NewDir(filepath.Dir(abs), limits)
		if err != nil {
			return nil, err
		}
		return dir.Fetch(ctx, filepath.Base(abs), "")
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return bundles.Read(f, filepath.Base(path), limits)
}
