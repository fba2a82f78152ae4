// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// sample is how one request went.
type sample struct {
	addr       string // of the server
	start, end time.Time
	status     int    // 0 if there was no response
	lease      string // of a 200, like token
	token      string
	text       string // of the response, if it has no token
}

// overlaps reports whether the request was under way in a span of time.
func (s sample) overlaps(from, to time.Time) bool { return s.end.After(from) && s.start.Before(to) }

// String is the sample as test failures show it, without a token.
func (s sample) String() string {
	return fmt.Sprintf("%d after %s: %.300s", s.status, milliseconds(s.end.Sub(s.start)), strings.TrimSpace(s.text))
}

// readerTimeout is how long a reader waits for a response.
const readerTimeout = 20 * time.Second

// timed sends r and says how that went.
func (v *vaultServer) timed(r request) sample {
	ctx, cancel := context.WithTimeout(context.Background(), readerTimeout)
	defer cancel()
	s := sample{addr: v.addr, start: time.Now()}
	a, err := v.callContext(ctx, r)
	s.end = time.Now()
	switch {
	case err != nil:
		s.text = err.Error()
	case a.status == http.StatusOK:
		s.status, s.lease, s.token = a.status, a.LeaseID, a.token()
	default:
		s.status, s.text = a.status, a.text
	}
	return s
}

// loop repeats something, at once in n goroutines, until it is stopped.
type loop struct {
	wg      sync.WaitGroup
	stopped atomic.Bool
	mu      sync.Mutex
	samples []sample
}

// startLoop begins to repeat do, which gets the number of the goroutine and of
// the round. A request that failed because a node changes is repeated a moment later.
func startLoop(t *testing.T, n int, do func(i, round int) sample) *loop {
	l := new(loop)
	for i := range n {
		l.wg.Go(func() {
			for round := 0; !l.stopped.Load(); round++ {
				s := do(i, round)
				l.mu.Lock()
				l.samples = append(l.samples, s)
				l.mu.Unlock()
				if duringChange(s) {
					time.Sleep(pollInterval)
				}
			}
		})
	}
	t.Cleanup(func() { l.stop() })
	return l
}

// seen returns the samples so far.
func (l *loop) seen() []sample {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.samples)
}

// stop ends the loop and returns all samples.
func (l *loop) stop() []sample {
	l.stopped.Store(true)
	l.wg.Wait()
	return l.seen()
}

// byStatus counts.
func byStatus(samples []sample) map[int]int {
	counts := map[int]int{}
	for _, s := range samples {
		counts[s.status]++
	}
	return counts
}

// handedOut returns the leases and tokens of the reads that succeeded. Each
// must have both, and none twice; and no other response may contain a secret.
func handedOut(t *testing.T, samples []sample) (leases, tokens map[string]bool) {
	t.Helper()
	leases, tokens = map[string]bool{}, map[string]bool{}
	for _, s := range samples {
		if secret := findSecret(s.text, false); secret != "" {
			t.Errorf("a response other than a token contains %s: %d", secret, s.status)
		}
		if s.status != http.StatusOK {
			continue
		}
		if s.lease == "" || leases[s.lease] || s.token == "" || tokens[s.token] {
			t.Errorf("no token, no lease, or one of them twice: lease %q", s.lease)
		}
		leases[s.lease], tokens[s.token] = true, true
	}
	return leases, tokens
}

// leases lists the ids of the leases below a prefix that ends with a slash.
func (v *vaultServer) leases(t *testing.T, prefix string) map[string]bool {
	t.Helper()
	ids := map[string]bool{}
	a := v.do(t, "LIST", "sys/leases/lookup/"+prefix, nil)
	if a.status != http.StatusOK && a.status != http.StatusNotFound {
		t.Fatalf("listing the leases: %s", a)
	}
	keys, _ := a.Data["keys"].([]any)
	for _, key := range keys {
		ids[prefix+key.(string)] = true
	}
	return ids
}

// missing counts the elements of a that are not in b.
func missing(a, b map[string]bool) (n int) {
	for k := range a {
		if !b[k] {
			n++
		}
	}
	return n
}

// openFiles counts the file descriptors of a process.
func openFiles(t *testing.T, pid int) int {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	noError(t, err)
	return len(entries)
}

// TestStorm has many readers request tokens from a Cable that fails in 1 call of 20,
// while config and the role are rewritten all the time and the plugin process is
// killed once.
//
//   - Each read gets a token with its lease, or one of the promised errors.
//   - No token is handed out twice.
//   - Afterwards no file descriptor is left over, and so no connection.
func TestStorm(t *testing.T) {
	t.Parallel()
	const (
		readers = 64
		length  = 5 * time.Second         // at least
		hang    = 1500 * time.Millisecond // of every 60th mint
		latency = 60 * time.Millisecond   // of the others, to keep the number of leases within reason

		// leftOver is how long connections may stay after the storm, which is less
		// than the 30 s after which any idle one is closed.
		leftOver = 20 * time.Second
	)
	m := newMount(t, ownServer(t), &cabletest.Options{Default: cabletest.Fault{Delay: latency}})
	sim := m.sim
	m.configure(t)
	m.read(t)
	before := m.pluginProcesses(t)
	if len(before) != 1 {
		t.Fatalf("processes %v, want one", before)
	}
	filesBefore := openFiles(t, before[0])
	sim.Reset()
	for range cabletest.Recorded / 60 {
		for _, f := range []cabletest.Fault{{Status: 500}, {Reset: cabletest.ResetAfter}, {Delay: hang}} {
			f.Every, f.Times = 20, 1
			sim.AddFault(f)
		}
	}

	start := time.Now()
	reads := startLoop(t, readers, func(int, int) sample {
		return m.timed(request{method: "GET", path: m.path + "/creds/app", token: m.root})
	})
	write := func(path string, body map[string]any) sample {
		return m.timed(request{method: "POST", path: m.path + path, body: body, token: m.root})
	}
	configWrites := startLoop(t, 1, func(_, round int) sample {
		if round%2 == 0 {
			return write("/config", map[string]any{"request_timeout": "1s"}) // shorter than a hanging mint
		}
		return write("/config", map[string]any{"request_timeout": "20s"})
	})
	roleWrites := startLoop(t, 1, func(_, round int) sample {
		return write("/roles/app", map[string]any{"ttl": 600 + round%600, "disabled": round%8 == 0})
	})

	// Half-way, with reads under way, the process is killed.
	waitFor(t, 20*time.Second, "half of the storm", func() bool {
		return time.Since(start) > length/2 && sim.CallCount() > readers
	})
	killed := time.Now()
	kill(t, before[0])
	waitFor(t, 20*time.Second, "a token after the kill", func() bool {
		now := time.Now()
		return slices.ContainsFunc(reads.seen(), func(s sample) bool {
			return s.status == 200 && s.start.After(killed) && s.start.Before(now)
		})
	})
	recovered := time.Now()
	// On a slow machine it takes longer until all has been seen.
	waitFor(t, time.Minute, "reads that end in each way", func() bool {
		counts := byStatus(reads.seen())
		return time.Since(start) > length && counts[200] > 0 && counts[400] > 0 && counts[502] > 0
	})
	read, wroteConfig, wroteRole := reads.stop(), configWrites.stop(), roleWrites.stop()
	took := time.Since(start)
	stats := sim.Stats()

	// Vault itself responds to requests that were with the process when it ended, or
	// came before another had started, namely with 500 ("rpc error"), or with the
	// response of the new process, to which it sends them again.
	underWay := 0
	for _, s := range read {
		if s.overlaps(killed, recovered) {
			underWay++
		}
	}
	promised := map[int][]string{
		400: {`role \"app\" is disabled`},
		502: {"Cable responded 500", "the connection was closed before the response was complete"},
		504: {"the budget of 1s ran out"},
	}
	for _, s := range read {
		switch {
		case s.status == 200:
		case s.status == 500 && s.overlaps(killed, recovered) && strings.Contains(s.text, "rpc error"):
		case !slices.ContainsFunc(promised[s.status], func(text string) bool { return strings.Contains(s.text, text) }):
			t.Errorf("%s after the start, %s after the kill: %s", s.start.Sub(start), s.end.Sub(killed), s)
		}
	}
	for _, s := range slices.Concat(wroteConfig, wroteRole) {
		aroundKill := s.status == 500 && s.overlaps(killed, recovered)
		if s.status != 204 && s.status != 200 && !aroundKill {
			t.Errorf("a write %s after the kill: %s", s.end.Sub(killed), s)
		}
	}
	t.Logf("%d reads in %s: %v; a token again %s after the kill, with %d reads around it",
		len(read), milliseconds(took), byStatus(read), milliseconds(recovered.Sub(killed)), underWay)
	t.Logf("%d writes of config, %d of the role", len(wroteConfig), len(wroteRole))

	leases, _ := handedOut(t, read)
	held := m.leases(t, m.path+"/creds/app/")
	if n := missing(leases, held); n > 0 {
		t.Errorf("%d tokens were handed out without a lease", n)
	}
	t.Logf("simulator: %+v; %d leases", stats, len(held))
	reported := 0 // a token that arrives after its role was disabled is among them
	for _, s := range read {
		if strings.Contains(s.text, "was not delivered") {
			reported++
		}
	}
	if lost := stats.Minted - len(leases); lost > reported+underWay {
		t.Errorf("%d undelivered tokens, but %d were reported and %d requests were under way", lost, reported, underWay)
	}

	after := m.pluginProcesses(t)
	if len(after) != 1 || after[0] == before[0] {
		t.Fatalf("processes %v, before the kill %v", after, before)
	}
	t.Logf("%d file descriptors (%d before)", openFiles(t, after[0]), filesBefore)
	sim.ClearFaults()
	m.ok(t, "POST", m.path+"/roles/app", map[string]any{"disabled": false})
	m.ok(t, "POST", m.path+"/config", map[string]any{"request_timeout": "20s"}) // begins with new connections
	m.read(t)
	quiet := time.Now()
	waitFor(t, leftOver, "left-over file descriptors, those of connections included, are closed", func() bool {
		return openFiles(t, after[0]) <= filesBefore
	})
	t.Logf("no file descriptor is left over %s later", milliseconds(time.Since(quiet)))
}
