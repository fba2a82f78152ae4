// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"fmt"
	"time"
)

// soak reads at full load on integrated storage and adds a row for each tenth of
// the time, so that memory and latency at the end can be compared with the start.
// Then leases of short grants end all at once while the readers continue.
func soak(ctx context.Context, o options, b *binaries) (*table, error) {
	s, err := startStack(ctx, b, "raft", "service")
	if err != nil {
		return nil, err
	}
	defer s.stop()
	targets, err := s.targets([]string{"engine"})
	if err != nil {
		return nil, err
	}
	engine := targets[0]
	start, reads := time.Now(), 0 // each read leaves a lease
	table := newTable([]string{"after", "reads so far", "reads/s", "p50, p99 ms", "plugin MiB", "errors"})
	window := func(d time.Duration, note string) error {
		sl, err := engine.load(ctx, 32, d)
		if err != nil {
			return err
		}
		rss, err := memory(engine.pid, "VmRSS:")
		if err != nil {
			return err
		}
		reads += sl.reads
		p50, p99 := sl.percentiles()
		table.add(fmt.Sprint(time.Since(start).Round(time.Second), note), fmt.Sprint(reads),
			fmt.Sprintf("%.0f", float64(sl.reads)/sl.took.Seconds()), fmt.Sprintf("%.0f, %.0f", p50, p99),
			fmt.Sprintf("%.0f", float64(rss)/(1<<20)), fmt.Sprint(sl.errors))
		return nil
	}
	for range 10 {
		if err := window(o.soak/10, ""); err != nil {
			return nil, err
		}
	}

	// Some thousand leases of half a minute each, and reads while they end.
	if err := s.setFault(`{"grant":{"lifetime":"30s"}}`); err != nil {
		return nil, err
	}
	if err := window(10*time.Second, ", with leases of 30 s"); err != nil {
		return nil, err
	}
	if err := s.setFault("{}"); err != nil {
		return nil, err
	}
	for range 4 {
		if err := window(10*time.Second, ", while those end"); err != nil {
			return nil, err
		}
	}
	return table, nil
}
