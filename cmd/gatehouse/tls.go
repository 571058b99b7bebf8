package main

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync/atomic"
	"time"

	"github.com/gatehouse-authz/gatehouse/peers"
)

// TLS configures the transport security of a listener.
type TLS struct {
	// Cert and Key are PEM files: the server's certificate with its chain, and
	// its key. They are read again when they change.
	Cert string `yaml:"cert"`
	Key  string `yaml:"key"`

	// ClientCA is a PEM file of the authorities that clients' certificates
	// must come from. Read again when it changes. Default "": clients show
	// none.
	ClientCA string `yaml:"client_ca"`

	// AllowedIDs are those that clients may have, as patterns in which "*"
	// stands for anything: the URI of a certificate, as SPIFFE has it, or a
	// DNS name of one that has no URI. Default: any that ClientCA signed.
	AllowedIDs []string `yaml:"allowed_ids"`

	// ClientOptional lets in clients that show no certificate, too: of http.tls
	// alone, where other credentials say who asks. Default false.
	ClientOptional bool `yaml:"client_optional"`
}

// certificates are what a listener's files hold, read again when they change.
type certificates struct {
	name    string // of the listener's key in the operator's file
	files   TLS
	log     *slog.Logger
	current atomic.Pointer[tls.Config] // always replaced, never changed
	seen    [sha256.Size]byte          // what was read last; of the one who calls reread
}

// newCertificates reads the files. It returns nil where there are none.
func newCertificates(name string, files TLS, log *slog.Logger) (*certificates, error) {
	if files.Cert == "" && files.Key == "" && files.ClientCA == "" && len(files.AllowedIDs) == 0 && !files.ClientOptional {
		return nil, nil
	}
	c := &certificates{name: name, files: files, log: log}
	cfg, seen, err := c.read()
	if err != nil {
		return nil, err
	}
	c.seen = seen
	c.current.Store(cfg)
	return c, nil
}

func (c *certificates) read() (*tls.Config, [sha256.Size]byte, error) {
	var seen [sha256.Size]byte
	switch {
	case c.files.Cert == "" || c.files.Key == "":
		return nil, seen, errors.New("cert and key go together")
	case c.files.ClientCA == "" && len(c.files.AllowedIDs) > 0:
		return nil, seen, errors.New("allowed_ids need a client_ca")
	case c.files.ClientCA == "" && c.files.ClientOptional:
		return nil, seen, errors.New("client_optional needs a client_ca")
	}
	h := sha256.New()
	var texts [3][]byte
	for i, path := range []string{c.files.Cert, c.files.Key, c.files.ClientCA} {
		if path == "" {
			continue
		}
		var err error
		if texts[i], err = os.ReadFile(path); err != nil {
			return nil, seen, err
		}
		fmt.Fprintf(h, "%d ", len(texts[i]))
		h.Write(texts[i])
	}
	copy(seen[:], h.Sum(nil))
	pair, err := tls.X509KeyPair(texts[0], texts[1])
	if err != nil {
		return nil, seen, fmt.Errorf("%s and %s: %w", c.files.Cert, c.files.Key, err)
	}
	cfg := &tls.Config{
		MinVersion:   tls.VersionTLS12,
		Certificates: []tls.Certificate{pair},
		NextProtos:   []string{"h2", "http/1.1"},
	}
	if c.files.ClientCA != "" {
		cfg.ClientAuth = tls.RequireAndVerifyClientCert
		cfg.ClientCAs = x509.NewCertPool()
		if !cfg.ClientCAs.AppendCertsFromPEM(texts[2]) {
			return nil, seen, fmt.Errorf("%s holds no certificate", c.files.ClientCA)
		}
		if c.files.ClientOptional {
			cfg.ClientAuth = tls.VerifyClientCertIfGiven
		}
		cfg.VerifyConnection = c.verify
	}
	return cfg, seen, nil
}

// expiry is when the certificate in use expires.
func (c *certificates) expiry() time.Time { return c.current.Load().Certificates[0].Leaf.NotAfter }

// verify refuses clients that have no ID, or none of those that are allowed. It
// is asked for resumed sessions too.
func (c *certificates) verify(state tls.ConnectionState) error {
	if len(state.PeerCertificates) == 0 {
		if c.files.ClientOptional {
			return nil
		}
		return errors.New("client shows no certificate")
	}
	id, err := peers.ID(state.PeerCertificates[0])
	if err != nil {
		return err
	}
	if len(c.files.AllowedIDs) > 0 && !peers.MatchAny(c.files.AllowedIDs, id) {
		return fmt.Errorf("client %q is not allowed", id)
	}
	return nil
}

// reread reads the files again. What does not work is logged, and what was read
// before stays.
func (c *certificates) reread() {
	cfg, seen, err := c.read()
	switch {
	case err != nil:
		if seen != c.seen {
			c.seen = seen
			c.log.Error("changed certificates refused, the old ones stay", "listener", c.name, "error", err)
		}
	case seen != c.seen:
		c.seen = seen
		c.current.Store(cfg)
		c.log.Info("certificates replaced", "listener", c.name)
	}
}

// config returns a configuration that takes the newest certificates for each
// new connection.
func (c *certificates) config() *tls.Config {
	first := c.current.Load().Clone()
	first.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return c.current.Load(), nil }
	return first
}
