// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Command dashboard shows monitoring/dashboard.json with real figures, without
// a Grafana: it puts a load on a Vault with the engine at cable/, has the
// simulated Cable misbehave on the way, asks a Prometheus that scrapes the mount
// for what each panel of the dashboard asks, and draws all panels as one SVG.
// Run it by scripts/dashboard, which starts all that it needs.
//
// Requests go to loopback only, and end with the time of -for.
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"os"
	"os/signal"
	"syscall"
	"time"
)

type options struct {
	vault, control, prometheus string // URLs
	panels, svg                string // files
	duration                   time.Duration
	perSecond                  float64
}

func main() {
	var o options
	flag.StringVar(&o.vault, "vault", os.Getenv("VAULT_ADDR"), "`URL` of Vault; its token is in VAULT_TOKEN")
	flag.StringVar(&o.control, "control", "", "`URL` of the control listener of cable-sim")
	flag.StringVar(&o.prometheus, "prometheus", "", "`URL` of a Prometheus that scrapes the mount")
	flag.StringVar(&o.panels, "panels", "monitoring/dashboard.json", "`file` of the dashboard")
	flag.StringVar(&o.svg, "svg", "docs/dashboard.svg", "`file` to draw into")
	flag.DurationVar(&o.duration, "for", 3*time.Minute, "length of the load")
	flag.Float64Var(&o.perSecond, "rate", 20, "reads per second, on average")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, o)
	stop()
	if err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, o options) error {
	d, err := readDashboard(o.panels)
	if err != nil {
		return err
	}
	prom := prometheus{o.prometheus}
	if err := prom.waitForScrape(ctx); err != nil {
		return err
	}
	start := time.Now()
	l := &load{options: o, token: os.Getenv("VAULT_TOKEN"), start: start}
	if err := l.run(ctx); err != nil {
		return err
	}
	fmt.Println(l.summary())

	w := newWindow(start, time.Now())
	for i := range d.Panels {
		if err := prom.fill(ctx, &d.Panels[i], w); err != nil {
			return fmt.Errorf("panel %q: %w", d.Panels[i].Title, err)
		}
	}
	svg := draw(d, w, l.phases())
	fmt.Printf("%s: %d panels, %d KiB\n", o.svg, len(d.Panels), len(svg)>>10)
	return os.WriteFile(o.svg, []byte(svg), 0o600)
}
