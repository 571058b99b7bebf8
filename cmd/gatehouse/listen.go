package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"time"
)

// listenAddress returns the network and address of a listener's setting:
// host:port, unix:///path or unix://@name (an abstract socket).
func listenAddress(s string) (network, address string, err error) {
	if path, ok := strings.CutPrefix(s, "unix://"); ok {
		if !strings.HasPrefix(path, "/") && !strings.HasPrefix(path, "@") || len(path) < 2 {
			return "", "", fmt.Errorf("%q is not unix:///path or unix://@name", s)
		}
		return "unix", path, nil
	}
	if _, _, err := net.SplitHostPort(s); err != nil {
		return "", "", fmt.Errorf("%q is not host:port or unix:///path", s)
	}
	return "tcp", s, nil
}

func listen(s string) (net.Listener, error) {
	network, address, err := listenAddress(s)
	if err != nil {
		return nil, err
	}
	if network == "unix" && address[0] == '/' {
		if err := removeStale(address); err != nil {
			return nil, err
		}
	}
	return net.Listen(network, address)
}

// removeStale removes a socket that nobody listens on any more. Anything else
// stays where it is.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode()&fs.ModeSocket == 0:
		return fmt.Errorf("%s is there and not a socket", path)
	}
	if conn, err := net.DialTimeout("unix", path, time.Second); err == nil {
		conn.Close()
		return fmt.Errorf("%s is in use", path)
	}
	return os.Remove(path)
}

// loopback reports whether a listener is reached from this machine alone.
func loopback(listen string) bool {
	network, address, err := listenAddress(listen)
	if err != nil {
		return false
	}
	if network == "unix" {
		return true
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return false
	}
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}
