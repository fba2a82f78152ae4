// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"bytes"
	"cmp"
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

// load runs readers for d and returns their results.
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
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range readers {
		wg.Go(func() {
			var own []time.Duration
			var last string
			failed := 0
			for ctx.Err() == nil && time.Since(start) < d {
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
	sl.rss, err = memory(t.pid, "VmHWM:")
	return sl, err
}

// once makes one request and reads the response.
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
	if resp.StatusCode != http.StatusOK || !bytes.Contains(body, []byte(`"token":`)) {
		return fmt.Errorf("no token, status %d: %.200s", resp.StatusCode, body)
	}
	return nil
}

// turns is the sum of the turns of a target.
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
	s.all.lastError = cmp.Or(sl.lastError, s.all.lastError)
	s.rates = append(s.rates, float64(sl.reads)/sl.took.Seconds())
}

func (s *turns) result(t *target) result {
	n := float64(s.all.reads)
	p50, p99 := s.all.percentiles()
	return result{
		target: t.name, perSecond: median(s.rates), p50: p50, p99: p99,
		errors: s.all.errors, lastError: s.all.lastError,
		cpu: float64(s.all.cpu.Microseconds()) / n, peak: float64(s.all.rss) / (1 << 20),
		calls: float64(s.all.Calls) * 1000 / n, conns: float64(s.all.Connections) * 1000 / n,
	}
}

// percentiles returns the median and the 99th percentile of the latencies, in
// milliseconds.
func (sl *slice) percentiles() (p50, p99 float64) {
	slices.Sort(sl.latencies)
	at := func(q float64) float64 {
		return float64(sl.latencies[int(q*float64(len(sl.latencies)-1))].Microseconds()) / 1000
	}
	return at(.5), at(.99)
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
