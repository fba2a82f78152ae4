// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Command bench measures what a read of creds/<role> costs on a real Vault, side
// by side and in turns: a direct POST to the simulated Cable, the floor (an
// engine that returns a leased constant), this engine, and this engine for a
// role with reuse_for. Run it by make bench.
//
// The last two are one plugin process: its peak memory is that of both, unless
// -targets leaves one of them out.
//
// It needs Linux for the processes' CPU time and memory (/proc). Requests go to
// loopback only; each slice is bounded in time.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Result is one target under one condition, over all of its slices.
type Result struct {
	Storage     string  `json:"storage"` // "dev" (in memory) or "raft" (integrated storage)
	Token       string  `json:"token"`   // of the readers: "service" or "batch"
	LatencyMS   int     `json:"latency_ms"`
	Concurrency int     `json:"concurrency"`
	Target      string  `json:"target"` // "direct", "floor", "engine", "reuse", "old", "old-reuse"
	PerSecond   float64 `json:"reads_per_second"`
	P50         float64 `json:"p50_ms"`
	P99         float64 `json:"p99_ms"`
	Errors      int     `json:"errors"`
	CPUMicros   float64 `json:"plugin_cpu_us_per_read,omitempty"`
	Calls       float64 `json:"calls_per_1000_reads"` // to Cable
	Connections float64 `json:"connections_per_1000_reads,omitempty"`
	PeakMiB     float64 `json:"plugin_peak_mib,omitempty"`
	ToFloor     float64 `json:"ratio_to_floor,omitempty"`     // of reads per second, median of the rounds
	CPUToFloor  float64 `json:"cpu_ratio_to_floor,omitempty"` // of plugin CPU per read
	MemToFloor  float64 `json:"mem_ratio_to_floor,omitempty"` // of peak memory
}

// Report is what is written with -json.
type Report struct {
	Go      string   `json:"go"`
	CPUs    int      `json:"cpus"`
	Slice   string   `json:"slice"`
	Rounds  int      `json:"rounds"`
	Results []Result `json:"results"`
	Soak    *Soak    `json:"soak,omitempty"`
}

type options struct {
	storages, tokens       []string
	targets                []string
	old                    string
	latencies, concurrency []int
	slice                  time.Duration
	rounds                 int
	profile                string
	jsonOut, csvOut        string
	soak                   time.Duration
}

func main() {
	var o options
	storages := flag.String("storage", "dev,raft", "storages of Vault")
	tokens := flag.String("token", "service,batch", "types of the readers' tokens")
	latencies := flag.String("latency", "0,20", "simulated latencies of Cable, in milliseconds")
	concurrency := flag.String("concurrency", "1,32,128", "concurrent readers")
	targets := flag.String("targets", "direct,floor,engine,reuse", "what to measure; floor is what the others are compared with")
	flag.StringVar(&o.old, "old", "", "another build of the plugin, a file, to measure in the same turns as the targets old and old-reuse; memory cannot be compared")
	flag.DurationVar(&o.slice, "slice", time.Second, "length of a slice")
	flag.IntVar(&o.rounds, "rounds", 5, "slices of each target")
	flag.StringVar(&o.profile, "profile", "", "write a CPU profile of the last plugin process to this file")
	flag.StringVar(&o.jsonOut, "json", "", "write the report to this file")
	flag.StringVar(&o.csvOut, "csv", "", "write reads per second of all targets but direct to this file, for tools/chart")
	flag.DurationVar(&o.soak, "soak", 0, "instead: run at full load for so long on integrated storage")
	flag.Parse()
	o.storages, o.tokens, o.targets = strings.Split(*storages, ","), strings.Split(*tokens, ","), strings.Split(*targets, ",")
	for _, l := range []struct {
		text string
		to   *[]int
	}{{*latencies, &o.latencies}, {*concurrency, &o.concurrency}} {
		for _, s := range strings.Split(l.text, ",") {
			var n int
			if _, err := fmt.Sscan(s, &n); err != nil {
				log.Fatalf("%q is not a number", s)
			}
			*l.to = append(*l.to, n)
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, o)
	stop()
	if err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, o options) (err error) {
	b, err := build(ctx, o)
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(b.dir) }()
	report := Report{Go: runtime.Version(), CPUs: runtime.NumCPU(), Slice: o.slice.String(), Rounds: o.rounds}
	if o.soak > 0 {
		s, err := soak(ctx, o, b)
		if err != nil {
			return err
		}
		report.Soak = s
		return writeReport(o.jsonOut, report)
	}
	fmt.Println(header)
	for _, storage := range o.storages {
		for _, token := range o.tokens {
			results, err := measure(ctx, o, b, storage, token)
			if err != nil {
				return err
			}
			report.Results = append(report.Results, results...)
		}
	}
	if err := writeCSV(o.csvOut, report.Results); err != nil {
		return err
	}
	return writeReport(o.jsonOut, report)
}

// measure starts a Vault and measures every concurrency and latency on it.
func measure(ctx context.Context, o options, b *binaries, storage, token string) ([]Result, error) {
	s, err := startStack(ctx, b, storage, token)
	if err != nil {
		return nil, err
	}
	defer s.stop()
	var results []Result
	for _, latency := range o.latencies {
		if err := s.setLatency(time.Duration(latency) * time.Millisecond); err != nil {
			return nil, err
		}
		for _, c := range o.concurrency {
			cell, err := s.cell(ctx, o, c)
			if err != nil {
				return nil, err
			}
			for i := range cell {
				cell[i].Storage, cell[i].Token, cell[i].LatencyMS = storage, token, latency
				fmt.Println(cell[i].row())
			}
			results = append(results, cell...)
		}
	}
	return results, nil
}

// cell measures the targets in turns at one concurrency.
func (s *stack) cell(ctx context.Context, o options, concurrency int) ([]Result, error) {
	targets, err := s.targets(o.targets)
	if err != nil {
		return nil, err
	}
	floor := slices.Index(o.targets, "floor")
	if floor < 0 {
		return nil, errors.New("floor is not among the targets")
	}
	sums := make([]turns, len(targets))
	for _, t := range targets { // warm-up: connections, caches
		if _, err := t.load(ctx, concurrency, o.slice/4); err != nil {
			return nil, err
		}
	}
	for round := range o.rounds {
		for i := range targets {
			if round%2 == 1 { // there and back: what comes after what makes no difference
				i = len(targets) - 1 - i
			}
			sl, err := targets[i].load(ctx, concurrency, o.slice)
			if err != nil {
				return nil, err
			}
			sums[i].add(sl)
		}
	}
	results := make([]Result, len(targets))
	for i, t := range targets {
		results[i] = sums[i].result(t, concurrency)
	}
	for i := range results {
		r := &results[i]
		if r.Target == "direct" {
			continue
		}
		r.ToFloor = medianRatio(sums[i].rates, sums[floor].rates)
		r.CPUToFloor = r.CPUMicros / results[floor].CPUMicros
		r.MemToFloor = r.PeakMiB / results[floor].PeakMiB
	}
	return results, nil
}

const header = "storage token   latency readers target    reads/s   p50 ms   p99 ms  cpu us/read  calls/1000  conns/1000  peak MiB  to floor: reads  cpu   mem  errors"

func (r Result) row() string {
	return fmt.Sprintf("%-7s %-7s %5dms %7d %-9s %7.0f %8.2f %8.2f %12.0f %11.1f %11.1f %9.1f %15.2f %5.2f %5.2f %7d",
		r.Storage, r.Token, r.LatencyMS, r.Concurrency, r.Target, r.PerSecond, r.P50, r.P99, r.CPUMicros, r.Calls, r.Connections, r.PeakMiB, r.ToFloor, r.CPUToFloor, r.MemToFloor, r.Errors)
}

func writeReport(file string, r Report) error {
	if file == "" {
		return nil
	}
	raw, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(raw, '\n'), 0o600)
}

// writeCSV writes a line for each condition.
func writeCSV(file string, results []Result) error {
	if file == "" {
		return nil
	}
	header, rows, last := "condition", "", ""
	for _, r := range results {
		if r.Target == "direct" {
			continue
		}
		condition := fmt.Sprintf(`"%s, %s token, %d ms, %d readers"`, r.Storage, r.Token, r.LatencyMS, r.Concurrency)
		if condition != last {
			rows, last = rows+"\n"+condition, condition
		}
		if strings.Count(rows, "\n") == 1 {
			header += "," + r.Target
		}
		rows += fmt.Sprintf(",%.0f", r.PerSecond)
	}
	return os.WriteFile(file, []byte(header+rows+"\n"), 0o600)
}
