// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Command bench measures the cost of a read of creds/<role> on a real Vault, side
// by side and in turns: a direct POST to the simulated Cable, the floor (an
// engine that returns a leased constant), this engine, and this engine for a
// role with reuse_for; then the floor, a constant without a lease, and this engine
// for a role with reuse_for and lease=false. It prints Markdown, or with -page
// replaces the tables of docs/performance.md. Run it by make bench.
//
// Targets of one plugin share its process, so its peak memory is for all of them,
// unless -targets leaves some out.
//
// It needs Linux for the processes' CPU time and memory (/proc). Requests go to
// loopback only; each slice is bounded in time.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// result is one target under one condition, over all of its slices.
type result struct {
	target         string  // "direct", "floor", "engine", "reuse", "constant", "unleased"
	perSecond      float64 // reads
	p50, p99       float64 // in milliseconds
	errors         int
	lastError      string
	cpu            float64 // of the plugin, in microseconds per read
	peak           float64 // of the plugin's memory, in MiB
	calls, conns   float64 // to Cable, per 1000 reads
	reads          float64 // median of the rounds, as a part of the floor's per second
	ofConstant     float64 // the same as a part of the unleased constant's, if that is measured
	cpuRatio, more float64 // CPU per read and peak memory, as a multiple of the floor's
}

type options struct {
	storages, tokens       []string
	targets                []string // of one table; none for the tables of the page
	latencies, concurrency []int
	slice                  time.Duration
	rounds                 int
	page                   string
	soak                   time.Duration
}

func main() {
	var o options
	storages := flag.String("storage", "dev,raft", "storages of Vault")
	tokens := flag.String("token", "service,batch", "types of the readers' tokens")
	latencies := flag.String("latency", "0,20", "simulated latencies of Cable, in milliseconds")
	concurrency := flag.String("concurrency", "1,32,128", "concurrent readers")
	targets := flag.String("targets", "", "targets of one table, which are compared with floor: "+
		"direct,floor,engine,reuse,constant,unleased (default: the tables of the page)")
	flag.DurationVar(&o.slice, "slice", time.Second, "length of a slice")
	flag.IntVar(&o.rounds, "rounds", 5, "slices of each target")
	flag.StringVar(&o.page, "page", "", "measure all and replace the tables of this Markdown file")
	flag.DurationVar(&o.soak, "soak", 0, "instead: run at full load for so long on integrated storage")
	flag.Parse()
	o.storages, o.tokens = strings.Split(*storages, ","), strings.Split(*tokens, ",")
	o.targets = strings.FieldsFunc(*targets, func(r rune) bool { return r == ',' })
	o.latencies, o.concurrency = numbers(*latencies), numbers(*concurrency)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, o)
	stop()
	if err != nil {
		log.Fatal(err)
	}
}

// numbers returns the numbers of a list.
func numbers(list string) (all []int) {
	for s := range strings.SplitSeq(list, ",") {
		n, err := strconv.Atoi(s)
		if err != nil {
			log.Fatalf("%q is not a number", s)
		}
		all = append(all, n)
	}
	return all
}

func run(ctx context.Context, o options) (err error) {
	b, err := build(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(b.dir) }()
	fmt.Printf("%s, %d CPUs, %d slices of %s\n\n", runtime.Version(), runtime.NumCPU(), o.rounds, o.slice)
	if o.soak == 0 || o.page != "" {
		if err := figures(ctx, o, b); err != nil {
			return err
		}
	}
	if o.page != "" {
		o.soak = cmp.Or(o.soak, 10*time.Minute)
	}
	if o.soak == 0 {
		return nil
	}
	table, err := soak(ctx, o, b)
	if err != nil {
		return err
	}
	return table.replaceIn(o.page, "## The long run")
}

// figures measures a table of the targets, or both tables of the page. Without a lease and with reuse_for, a read does
// not depend on Cable's latency.
func figures(ctx context.Context, o options, b *binaries) error {
	unleased := o
	unleased.targets, unleased.latencies = []string{"floor", "constant", "unleased"}, []int{0}
	all := []options{o}
	if len(o.targets) == 0 {
		o.targets = []string{"direct", "floor", "engine", "reuse"}
		all = []options{o, unleased}
	}
	for i, o := range all {
		table := newTable(header(o.targets))
		for _, storage := range o.storages {
			for _, token := range o.tokens {
				if err := measure(ctx, o, b, storage, token, table); err != nil {
					return err
				}
			}
		}
		if err := table.replaceIn(o.page, []string{"## The figures", "## Reads without a lease"}[i]); err != nil {
			return err
		}
		fmt.Println()
	}
	return nil
}

// measure starts a Vault and adds a row for each concurrency and latency on it.
func measure(ctx context.Context, o options, b *binaries, storage, token string, table *table) error {
	s, err := startStack(ctx, b, storage, token)
	if err != nil {
		return err
	}
	defer s.stop()
	for _, latency := range o.latencies {
		if err := s.setFault(fmt.Sprintf(`{"delay":"%dms"}`, latency)); err != nil {
			return err
		}
		for _, readers := range o.concurrency {
			results, err := s.cell(ctx, o, readers)
			if err != nil {
				return err
			}
			row := []string{storage + ", " + token, fmt.Sprintf("%d ms", latency), fmt.Sprint(readers)}
			for _, r := range results {
				row = append(row, r.cells()...)
				if r.errors > 0 {
					fmt.Fprintf(os.Stderr, "%s: %d reads failed: %s\n", r.target, r.errors, r.lastError)
				}
			}
			table.add(row...)
		}
	}
	return nil
}

// cell measures the targets in turns at one concurrency.
func (s *stack) cell(ctx context.Context, o options, concurrency int) ([]result, error) {
	targets, err := s.targets(o.targets)
	if err != nil {
		return nil, err
	}
	floor, constant := slices.Index(o.targets, "floor"), slices.Index(o.targets, "constant")
	if floor < 0 {
		return nil, errors.New("floor is not among the targets")
	}
	sums := make([]turns, len(targets))
	for _, t := range targets { // to warm up connections and caches
		if _, err := t.load(ctx, concurrency, o.slice/4); err != nil {
			return nil, err
		}
	}
	for round := range o.rounds {
		for i := range targets {
			if round%2 == 1 { // there and back, so that the order makes no difference
				i = len(targets) - 1 - i
			}
			sl, err := targets[i].load(ctx, concurrency, o.slice)
			if err != nil {
				return nil, err
			}
			sums[i].add(sl)
		}
	}
	results := make([]result, len(targets))
	for i, t := range targets {
		results[i] = sums[i].result(t)
	}
	for i := range results {
		r := &results[i]
		r.reads = medianRatio(sums[i].rates, sums[floor].rates)
		if constant >= 0 {
			r.ofConstant = medianRatio(sums[i].rates, sums[constant].rates)
		}
		r.cpuRatio, r.more = r.cpu/results[floor].cpu, r.peak/results[floor].peak
	}
	return results, nil
}

// isEngine reports whether a target is this engine.
func isEngine(target string) bool {
	return slices.Contains([]string{"engine", "reuse", "unleased"}, target)
}

// header returns the names of the columns.
func header(targets []string) []string {
	names := []string{"storage, readers' tokens", "latency", "readers"}
	for _, t := range targets {
		names = append(names, t+": reads/s, p50, p99 ms")
		if t != "direct" && t != "floor" {
			names = append(names, "of the floor's reads")
		}
		if t == "unleased" {
			names = append(names, "of the constant's reads")
		}
		if isEngine(t) {
			names = append(names, "plugin CPU µs per read (ratio)", "peak MiB (ratio)",
				"per 1000 reads: API calls, connections")
		}
	}
	return names
}

// cells returns the result's cells of a row.
func (r result) cells() []string {
	cells := []string{fmt.Sprintf("%.0f, %.1f, %.0f", r.perSecond, r.p50, r.p99)}
	if r.target != "direct" && r.target != "floor" {
		cells = append(cells, fmt.Sprintf("%.2f", r.reads))
	}
	if r.target == "unleased" {
		cells = append(cells, fmt.Sprintf("%.2f", r.ofConstant))
	}
	if isEngine(r.target) {
		cells = append(cells, fmt.Sprintf("%.0f (%.2f)", r.cpu, r.cpuRatio),
			fmt.Sprintf("%.0f (%.2f)", r.peak, r.more), fmt.Sprintf("%.0f, %.1f", r.calls, r.conns))
	}
	return cells
}

// table is a table in Markdown, printed row by row.
type table struct{ text string }

func newTable(names []string) *table {
	t := new(table)
	t.add(names...)
	t.add(slices.Repeat([]string{"---"}, len(names))...)
	return t
}

// add prints a row.
func (t *table) add(cells ...string) {
	row := "| " + strings.Join(cells, " | ") + " |\n"
	fmt.Print(row)
	t.text += row
}

// replaceIn replaces the first table below a heading of a page, if there is a page.
func (t *table) replaceIn(page, heading string) error {
	if page == "" {
		return nil
	}
	text, err := os.ReadFile(page)
	if err != nil {
		return err
	}
	before, after, found := strings.Cut(string(text), "\n"+heading+"\n")
	prose, old, hasTable := strings.Cut(after, "\n| ")
	_, rest, ends := strings.Cut(old, "\n\n")
	if !found || !hasTable || !ends {
		return fmt.Errorf("%s has no table below %q", page, heading)
	}
	return os.WriteFile(page, []byte(before+"\n"+heading+"\n"+prose+"\n"+t.text+"\n"+rest), 0o600)
}
