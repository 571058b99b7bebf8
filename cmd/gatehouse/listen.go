package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
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

// socketMode parses the mode of a socket's file.
func socketMode(s string) (fs.FileMode, error) {
	mode, err := strconv.ParseUint(s, 8, 32)
	if err != nil || mode > 0o777 {
		return 0, fmt.Errorf(`%q is not a mode, like "0660"`, s)
	}
	return fs.FileMode(mode), nil
}

// listen listens at the setting of a listener. The mode is that of the file of a
// socket. Nobody can connect before it has it: the file is made for the owner
// alone.
func listen(s string, mode fs.FileMode) (net.Listener, error) {
	network, address, err := listenAddress(s)
	if err != nil {
		return nil, err
	}
	if network != "unix" || address[0] != '/' {
		return net.Listen(network, address)
	}
	if err := removeStale(address); err != nil {
		return nil, err
	}
	old := syscall.Umask(0o177)
	l, err := net.Listen(network, address)
	syscall.Umask(old)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(address, mode); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
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
