package decisionlog

import (
	"context"
	"net/http"
	"strings"
)

// S3Config is that of an S3.
type S3Config struct {
	// HTTP is the bucket: its URL, such as
	// https://bucket.s3.eu-central-1.amazonaws.com, and an Authorize that signs.
	HTTP HTTPConfig

	// Prefix is that of the keys, without a slash at its end. Optional.
	Prefix string
}

// S3 keeps events as objects of a service that speaks S3: lines of JSON,
// compressed with gzip, at PREFIX/YYYY/MM/DD/HH/TIME-RANDOM.jsonl.gz in UTC. An
// object whose upload has to be tried again keeps its key, so that no event is
// there twice.
type S3 struct {
	sender *sender
	prefix string
	id     string
}

var _ Sink = (*S3)(nil)

// NewS3 returns a sink. A URL that cannot be used is reported when events are
// delivered.
func NewS3(config S3Config) *S3 {
	s := &S3{
		sender: newSender(config.HTTP),
		id:     identity(kindS3, append(config.HTTP.identity(), config.Prefix)...),
	}
	if prefix := strings.Trim(config.Prefix, "/"); prefix != "" {
		s.prefix = escapeKey(prefix) + "/"
	}
	return s
}

// Identity implements Sink.
func (s *S3) Identity() string { return s.id }

func (s *S3) kind() kind { return kindS3 }

func (s *S3) lane() string { return s.sender.lane() }

var s3Header = http.Header{"Content-Type": {"application/gzip"}}

func (s *S3) deliver(ctx context.Context, _ *shared, c *chunk) error {
	at := c.sealed.UTC()
	key := s.prefix + at.Format("2006/01/02/15/") + at.Format("20060102T150405.000000Z") + "-" + c.name + ".jsonl.gz"
	return s.sender.send(ctx, http.MethodPut, key, s3Header, c.body)
}

// escapeKey escapes a key as S3 wants it signed.
func escapeKey(key string) string {
	const hex = "0123456789ABCDEF"
	var b strings.Builder
	for i := range len(key) {
		switch c := key[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', strings.IndexByte("-._~/", c) >= 0:
			b.WriteByte(c)
		default:
			b.WriteByte('%')
			b.WriteByte(hex[c>>4])
			b.WriteByte(hex[c&15])
		}
	}
	return b.String()
}
