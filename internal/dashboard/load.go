// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// load is what the consumers of a mount do, and what Cable does to them.
type load struct {
	options
	token string
	start time.Time

	mu       sync.Mutex
	statuses map[string]int // of Vault, or what went wrong on the way
	revoked  int
}

// phase is a part of the run in which the simulated Cable misbehaves.
type phase struct {
	name     string
	from, to time.Time
	fault    string // a cabletest.Fault as JSON
}

// phases returns what happens in a run, in order.
func (l *load) phases() []phase {
	const part = 100. // the parts below are hundredths of the run
	var all []phase
	for _, p := range []struct {
		name     string
		from, to float64
		fault    string
	}{
		{"slow answers", 9, 18, `{"delay":"400ms"}`},
		{"some 503", 24, 32, `{"every":3,"status":503}`},
		{"429 with Retry-After", 38, 40, `{"times":1,"status":429,"header":{"Retry-After":"7"}}`},
		{"another 429", 44, 46, `{"times":1,"status":429,"header":{"Retry-After":"7"}}`},
		{"some 401", 53, 58, `{"every":2,"status":401}`},
		{"some 403", 63, 68, `{"every":3,"status":403}`},
		{"grants for another organization", 73, 78, `{"every":4,"grant":{"organization_id":"org_of_somebody_else"}}`},
		{"answers that get lost", 84, 90, `{"every":4,"reset":"after"}`},
	} {
		at := func(x float64) time.Time { return l.start.Add(time.Duration(x / part * float64(l.duration))) }
		all = append(all, phase{p.name, at(p.from), at(p.to), p.fault})
	}
	return all
}

// run reads tokens until the time is over.
func (l *load) run(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, l.duration)
	defer cancel()
	l.statuses = make(map[string]int)
	faults := make(chan error, 1)
	go func() { faults <- l.misbehave(ctx) }()
	var wg sync.WaitGroup
	for n := 1; ctx.Err() == nil; n++ {
		wg.Go(func() { l.consume(ctx, n) })
		// Consumers come in waves, so that a line of the dashboard is seen to be one.
		wave := 1 + .1*math.Sin(2*math.Pi*time.Since(l.start).Minutes())
		sleep(ctx, time.Duration(float64(time.Second)/(l.perSecond*wave)))
	}
	wg.Wait()
	return <-faults
}

// misbehave goes through the phases.
func (l *load) misbehave(ctx context.Context) error {
	for _, p := range l.phases() {
		sleep(ctx, time.Until(p.from))
		if err := l.setFault(ctx, p.fault); err != nil {
			return err
		}
		sleep(ctx, time.Until(p.to))
		if err := l.setFault(ctx, "{}"); err != nil {
			return err
		}
	}
	return nil
}

func (l *load) setFault(ctx context.Context, fault string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, l.control+"/fault", strings.NewReader(fault))
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return fmt.Errorf("setting the fault %s: %w", fault, err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusNoContent {
		return fmt.Errorf("setting the fault %s: %s", fault, resp.Status)
	}
	return nil
}

// consume is the nth consumer: it reads a token, and perhaps gives its lease
// back before the end.
func (l *load) consume(ctx context.Context, n int) {
	role := []string{"reports", "reports", "ci", "reports", "ci", "batch"}[n%6]
	read := ctx
	switch {
	case n%45 == 0: // leaves before Cable can answer
		var cancel context.CancelFunc
		read, cancel = context.WithTimeout(ctx, 10*time.Millisecond)
		defer cancel()
	case n%30 == 0: // asks for less than Cable can do
		role += "?ttl=60s"
	}
	lease, err := l.call(read, http.MethodGet, "cable/creds/"+role, "")
	if err != nil || lease == "" || n%4 != 0 {
		return
	}
	sleep(ctx, rand.N(30*time.Second)) //nolint:gosec // G404: it spreads what a load does, and guards nothing
	if ctx.Err() != nil {
		return
	}
	if _, err := l.call(ctx, http.MethodPut, "sys/leases/revoke", fmt.Sprintf(`{"lease_id":%q}`, lease)); err == nil {
		l.mu.Lock()
		l.revoked++
		l.mu.Unlock()
	}
}

// call makes a request to Vault and returns the lease of its answer. It counts
// the answers to reads.
func (l *load) call(ctx context.Context, method, path, body string) (lease string, err error) {
	status := "left"
	if method == http.MethodGet {
		defer func() {
			l.mu.Lock()
			defer l.mu.Unlock()
			l.statuses[status]++
		}()
	}
	req, err := http.NewRequestWithContext(ctx, method, l.vault+"/v1/"+path, strings.NewReader(body))
	if err != nil {
		return "", err
	}
	req.Header.Set("X-Vault-Token", l.token)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", err
	}
	status = resp.Status
	var answer struct {
		LeaseID string `json:"lease_id"`
	}
	if len(text) > 0 {
		err = json.Unmarshal(text, &answer)
	}
	return answer.LeaseID, err
}

// summary says what the consumers got.
func (l *load) summary() string {
	var parts []string
	for _, s := range slices.Sorted(maps.Keys(l.statuses)) {
		parts = append(parts, fmt.Sprintf("%s: %d", s, l.statuses[s]))
	}
	return fmt.Sprintf("reads by answer: %s; leases given back: %d", strings.Join(parts, ", "), l.revoked)
}

// sleep waits for d, or until ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
