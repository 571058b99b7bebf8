package decisionlog

import (
	"context"
	"net/http"
	"net/url"
	"strings"
)

// ServiceConfig is that of a Service.
type ServiceConfig struct {
	HTTP HTTPConfig

	// Resource is where chunks go, below HTTP.URL. Default "/logs".
	Resource string

	// Partition makes "/logs/" and it the resource, as OPA's partition_name
	// does. Optional.
	Partition string
}

// Service is a service that takes decision logs as OPA sends them: a POST of a
// JSON array, compressed with gzip.
type Service struct {
	sender   *sender
	resource string
	id       string
}

var _ Sink = (*Service)(nil)

// NewService returns a sink. A URL that cannot be used is reported when events
// are delivered.
func NewService(config ServiceConfig) *Service {
	resource := config.Resource
	switch {
	case config.Partition != "":
		resource = "/logs/" + escapePath(config.Partition)
	case resource == "":
		resource = "/logs"
	}
	return &Service{
		sender:   newSender(config.HTTP),
		resource: resource,
		id:       identity(kindService, append(config.HTTP.identity(), resource)...),
	}
}

// Identity implements Sink.
func (s *Service) Identity() string { return s.id }

func (s *Service) kind() kind { return kindService }

func (s *Service) lane() string { return s.sender.lane() }

var serviceHeader = http.Header{"Content-Type": {"application/json"}, "Content-Encoding": {"gzip"}}

func (s *Service) deliver(ctx context.Context, _ *shared, c *chunk) error {
	return s.sender.send(ctx, http.MethodPost, s.resource, serviceHeader, c.body)
}

// escapePath escapes each segment of a path.
func escapePath(path string) string {
	segments := strings.Split(path, "/")
	for i, s := range segments {
		segments[i] = url.PathEscape(s)
	}
	return strings.Join(segments, "/")
}
