package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"
)

const (
	defaultHealthURL = "http://127.0.0.1:8282/readyz"

	// maxHealthTime bounds the time that "health" may be given.
	maxHealthTime = time.Minute

	// maxHealthBody is what is read, and shown, of an answer.
	maxHealthBody = 4 << 10
)

// askHealth is the command "health": it asks a running gatehouse whether it is ready,
// and returns an error when it does not say 200 in time. An image without a shell
// has its health check in it.
func askHealth(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("health", flag.ContinueOnError)
	flags.SetOutput(stderr)
	target := flags.String("url", or(getenv("GATEHOUSE_HEALTH_URL"), defaultHealthURL), "`URL` of the admin listener's /readyz or /healthz")
	timeout := flags.Duration("timeout", 2*time.Second, "how long to wait, at most 1m")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return err
	} else if err != nil {
		return usageError(err.Error())
	}
	u, err := url.Parse(*target)
	switch {
	case flags.NArg() > 0:
		return usageError(fmt.Sprintf("health wants no argument, got %q", flags.Arg(0)))
	case err != nil || u.Scheme != "http" || u.Host == "" || u.User != nil:
		return usageError("health wants a URL like " + defaultHealthURL)
	case *timeout <= 0 || *timeout > maxHealthTime:
		return usageError(fmt.Sprintf("health wants a timeout of more than 0s and at most %s, got %s", maxHealthTime, *timeout))
	}

	ctx, cancel := context.WithTimeout(ctx, *timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return err
	}
	// No proxy of the environment stands between, and a redirect is no health.
	transport := &http.Transport{DisableKeepAlives: true}
	defer transport.CloseIdleConnections()
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return fmt.Errorf("asking %s%s: %w", u.Host, u.Path, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxHealthBody))
	if err != nil {
		return fmt.Errorf("asking %s%s: %w", u.Host, u.Path, err)
	}
	text := strings.TrimSpace(string(body))
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("asking %s%s: status %d: %s", u.Host, u.Path, resp.StatusCode, text)
	}
	_, err = fmt.Fprintln(stdout, text)
	return err
}
