// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"fmt"
	"slices"
	"time"
)

// Soak is one long run of the engine on integrated storage.
type Soak struct {
	Duration string       `json:"duration"`
	Readers  int          `json:"readers"`
	Reads    int          `json:"reads"` // each leaves a lease
	Errors   int          `json:"errors"`
	Windows  []SoakWindow `json:"windows"`

	// Expiry are windows in which the leases of short grants end all at once.
	Expiry []SoakWindow `json:"expiry"`
}

// SoakWindow is a part of it.
type SoakWindow struct {
	Seconds   int     `json:"at_seconds"`
	PerSecond float64 `json:"reads_per_second"`
	P50       float64 `json:"p50_ms"`
	P99       float64 `json:"p99_ms"`
	PluginMiB float64 `json:"plugin_resident_mib"`
	Leases    int     `json:"leases"`
}

// soak reads at full load and prints a line every part of the time, so that
// memory and latency at the end can be held against the start.
func soak(ctx context.Context, o options, b *binaries) (*Soak, error) {
	const readers, windows = 32, 20
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
	result := &Soak{Duration: o.soak.String(), Readers: readers}
	start := time.Now()
	fmt.Println("  at s   reads/s   p50 ms   p99 ms  plugin MiB   leases  errors")
	window := func(d time.Duration) (SoakWindow, error) {
		sl, err := engine.load(ctx, readers, d)
		if err != nil {
			return SoakWindow{}, err
		}
		rss, err := memory(engine.pid, "VmRSS:")
		if err != nil {
			return SoakWindow{}, err
		}
		slices.Sort(sl.latencies)
		at := func(q float64) float64 {
			return float64(sl.latencies[int(q*float64(len(sl.latencies)-1))].Microseconds()) / 1000
		}
		result.Reads += sl.reads
		result.Errors += sl.errors
		w := SoakWindow{
			Seconds: int(time.Since(start).Seconds()), PerSecond: float64(sl.reads) / sl.took.Seconds(),
			P50: at(.5), P99: at(.99), PluginMiB: float64(rss) / (1 << 20), Leases: result.Reads,
		}
		fmt.Printf("%6d %9.0f %8.2f %8.2f %11.1f %8d %7d\n", w.Seconds, w.PerSecond, w.P50, w.P99, w.PluginMiB, w.Leases, result.Errors)
		return w, nil
	}
	for range windows {
		w, err := window(o.soak / windows)
		if err != nil {
			return nil, err
		}
		result.Windows = append(result.Windows, w)
	}

	// Some thousand leases of half a minute each, and reads while they end.
	fmt.Println("leases of 30 s for 10 s, then reads while those end:")
	if err := s.setFault(`{"grant":{"lifetime":"30s"}}`); err != nil {
		return nil, err
	}
	if _, err := window(10 * time.Second); err != nil {
		return nil, err
	}
	if err := s.setFault("{}"); err != nil {
		return nil, err
	}
	for range 8 {
		w, err := window(5 * time.Second)
		if err != nil {
			return nil, err
		}
		result.Expiry = append(result.Expiry, w)
	}
	return result, nil
}
