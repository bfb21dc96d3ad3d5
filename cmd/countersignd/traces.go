package main

import (
	"errors"
	"fmt"
	"log/slog"

	"countersign/internal/cli"
	"countersign/internal/meter"
	"countersign/internal/secret"
	"countersign/internal/trace"
	"countersign/internal/webhook"
)

// check checks the fields and the file of headers.
func (t *Traces) check() error {
	switch {
	case t.Endpoint == "" && *t != defaults().Traces:
		return errors.New("endpoint is missing: without a collector there are no traces")
	case t.OneIn < 1 || t.OneIn > 1_000_000_000:
		return fmt.Errorf("one_in must be 1 to 1000000000, and is %d", t.OneIn)
	case t.RequestsPerSecond < 1 || t.RequestsPerSecond > 100_000:
		return fmt.Errorf("requests_per_second must be 1 to 100000, and is %d", t.RequestsPerSecond)
	case t.Endpoint == "":
		return nil
	}
	_, err := t.tracer(nil, nil)
	return err
}

// tracer returns the tracer of the configuration, or nil without an endpoint.
func (t *Traces) tracer(m *meter.Meter, log *slog.Logger) (*trace.Tracer, error) {
	if t.Endpoint == "" {
		return nil, nil
	}
	return trace.New(trace.Config{
		Target: webhook.Target{URL: secret.Of(t.Endpoint), CAFile: t.CAFile}, Headers: t.HeadersFile,
		OneIn: t.OneIn, Most: t.RequestsPerSecond, Version: cli.Version(), Log: log,
		Count: func(sent bool, spans int) {
			result := "dropped"
			if sent {
				result = "sent"
			}
			m.AddSome(meter.Spans, spans, result)
		},
	})
}
