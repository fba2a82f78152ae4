// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/expfmt"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/report"
)

func (b *backend) pathMetrics() *framework.Path {
	const synopsis = "Read this mount's metrics on this node, for Prometheus."
	read := b.reads(b.pathMetricsRead, synopsis, "The metrics in Prometheus' text format", nil)
	read.Responses[http.StatusOK][0].MediaType = "text/plain"
	// A standby mints nothing, and the figures of two nodes behind one address would jump.
	read.ForwardPerformanceStandby = true
	return &framework.Path{
		Pattern:         "metrics",
		DisplayAttrs:    &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "metrics"},
		Operations:      map[logical.Operation]framework.OperationHandler{logical.ReadOperation: read},
		HelpSynopsis:    synopsis,
		HelpDescription: metricsHelp,
	}
}

// pathMetricsRead handles GET metrics. The response is not JSON, and Vault passes the body through.
func (b *backend) pathMetricsRead(ctx context.Context, r *request) (*logical.Response, error) {
	gatherers := prometheus.Gatherers{b.report.Metrics()}
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	live, err := b.state.Config(ctx, r.Storage)
	switch {
	case err != nil: // the other figures are worth having all the more
		b.report.NoConfigGauges(r.source(), err)
	case live == nil:
		gatherers = append(gatherers, report.ConfigMetrics(nil, time.Time{}))
	default:
		gatherers = append(gatherers,
			report.ConfigMetrics(live.Config, time.Now().Add(live.Client.Pause().Remaining())))
	}
	families, err := gatherers.Gather()
	if err != nil {
		return nil, fmt.Errorf("gathering the metrics: %w", err)
	}
	var text bytes.Buffer
	format := expfmt.NewFormat(expfmt.TypeTextPlain)
	encoder := expfmt.NewEncoder(&text, format)
	for _, f := range families {
		if err := encoder.Encode(f); err != nil {
			return nil, fmt.Errorf("writing the metric %q: %w", f.GetName(), err)
		}
	}
	return &logical.Response{Data: map[string]any{
		logical.HTTPContentType: string(format),
		logical.HTTPRawBody:     text.String(),
		logical.HTTPStatusCode:  http.StatusOK,
	}}, nil
}

const metricsHelp = `The response is text for Prometheus, not JSON:

  vault read -format=raw cable/metrics

The figures are this mount's on the node that responds, since it was set up
there; they are kept in memory. A scrape needs a Vault token that may read this
path and nothing else.

The engine's own metrics begin with vault_cable_. Those that begin with go_ and
process_ are the plugin process's, which serves all mounts of the engine.`
