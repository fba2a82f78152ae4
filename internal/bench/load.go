// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"time"
)

// target is one thing that is measured.
type target struct {
	name    string
	request func(ctx context.Context) (*http.Request, error)
	client  *http.Client
	pid     int // of its plugin process; 0 for the direct POST
	stats   func() (stats, error)
}

// slice is one turn of a target.
type slice struct {
	reads, errors int
	took          time.Duration
	latencies     []time.Duration
	cpu           time.Duration
	stats               // of the simulator
	rss           int64 // peak resident memory of the plugin, in bytes
	lastError     string
}

// load runs readers for d and returns what they saw.
func (t *target) load(ctx context.Context, readers int, d time.Duration) (slice, error) {
	var sl slice
	cpuBefore, err := cpuTime(t.pid)
	if err != nil {
		return sl, err
	}
	before, err := t.stats()
	if err != nil {
		return sl, err
	}
	start := time.Now()
	deadline := start.Add(d)
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range readers {
		wg.Go(func() {
			var own []time.Duration
			var last string
			failed := 0
			for ctx.Err() == nil && time.Now().Before(deadline) {
				began := time.Now()
				if err := t.once(ctx); err != nil {
					failed++
					last = err.Error()
					continue
				}
				own = append(own, time.Since(began))
			}
			mu.Lock()
			defer mu.Unlock()
			sl.latencies = append(sl.latencies, own...)
			sl.errors += failed
			if last != "" {
				sl.lastError = last
			}
		})
	}
	wg.Wait()
	sl.took = time.Since(start)
	sl.reads = len(sl.latencies)
	if sl.reads == 0 {
		return sl, fmt.Errorf("%s: no read succeeded: %s", t.name, sl.lastError)
	}
	cpuAfter, err := cpuTime(t.pid)
	if err != nil {
		return sl, err
	}
	sl.cpu = cpuAfter - cpuBefore
	after, err := t.stats()
	if err != nil {
		return sl, err
	}
	sl.stats = stats{Calls: after.Calls - before.Calls, Connections: after.Connections - before.Connections}
	sl.rss, err = peakMemory(t.pid)
	return sl, err
}

// once makes one request and reads the answer.
func (t *target) once(ctx context.Context) error {
	req, err := t.request(ctx)
	if err != nil {
		return err
	}
	resp, err := t.client.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("status %d: %.200s", resp.StatusCode, body)
	}
	if !bytes.Contains(body, []byte(`"token":`)) {
		return fmt.Errorf("no token in the answer")
	}
	return nil
}

// turns sums up the turns of a target.
type turns struct {
	all   slice
	rates []float64
}

func (s *turns) add(sl slice) {
	s.all.reads += sl.reads
	s.all.errors += sl.errors
	s.all.took += sl.took
	s.all.cpu += sl.cpu
	s.all.Calls += sl.Calls
	s.all.Connections += sl.Connections
	s.all.latencies = append(s.all.latencies, sl.latencies...)
	s.all.rss = max(s.all.rss, sl.rss)
	s.rates = append(s.rates, float64(sl.reads)/sl.took.Seconds())
}

func (s *turns) result(t *target, readers int) Result {
	slices.Sort(s.all.latencies)
	at := func(q float64) float64 {
		return float64(s.all.latencies[int(q*float64(len(s.all.latencies)-1))].Microseconds()) / 1000
	}
	n := float64(s.all.reads)
	r := Result{
		Concurrency: readers, Target: t.name, PerSecond: median(s.rates), P50: at(.5), P99: at(.99), Errors: s.all.errors,
		Calls: float64(s.all.Calls) * 1000 / n, Connections: float64(s.all.Connections) * 1000 / n,
	}
	if t.pid != 0 {
		r.CPUMicros = float64(s.all.cpu.Microseconds()) / n
		r.PeakMiB = float64(s.all.rss) / (1 << 20)
	}
	return r
}

func median(x []float64) float64 {
	x = slices.Sorted(slices.Values(x))
	return x[len(x)/2]
}

// medianRatio pairs the turns of two targets, so that a machine that speeds up
// or slows down does not count.
func medianRatio(a, b []float64) float64 {
	ratios := make([]float64, len(a))
	for i := range a {
		ratios[i] = a[i] / b[i]
	}
	return median(ratios)
}
