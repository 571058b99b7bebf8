package main

import (
	"fmt"

	"github.com/gatehouse-authz/gatehouse/decisionlog"
	"github.com/gatehouse-authz/gatehouse/telemetry"
)

// newRecords returns what sends decisions as log records, for tenants that want
// that; nil: there is no collector.
func newRecords(c *Telemetry, t *telemetry.Telemetry) (*telemetry.Records, error) {
	if t == nil {
		return nil, nil
	}
	secured, err := c.OTLP.TLS.config()
	if err != nil {
		return nil, fmt.Errorf("telemetry.otlp.tls: %w", err)
	}
	return telemetry.NewRecords(c.OTLP.settings(secured), t.Resource())
}

// exporterOf is r; nil: there is none.
func exporterOf(r *telemetry.Records) decisionlog.Exporter {
	if r == nil {
		return nil
	}
	return r
}
