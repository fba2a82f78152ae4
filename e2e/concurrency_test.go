// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"context"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// readAll reads n tokens at once.
func (m *mount) readAll(t *testing.T, n int) []*response {
	t.Helper()
	responses := make([]*response, n)
	var wg sync.WaitGroup
	for i := range responses {
		wg.Go(func() {
			a, err := m.call(request{method: "GET", path: m.path + "/creds/app", token: m.root})
			if err != nil {
				t.Error(err)
				a = new(response)
			}
			responses[i] = a
		})
	}
	wg.Wait()
	return responses
}

// TestReadsAtOnce shows that each of many reads gets a token and a lease of its own, one
// call each, over connections that are kept.
func TestReadsAtOnce(t *testing.T) {
	t.Parallel()
	const readers, rounds = 32, 4
	m := newMount(t, sharedServer(t), nil)
	m.configure(t)
	m.sim.SetFault(cabletest.Fault{Delay: 20 * time.Millisecond})
	seen := map[string]bool{}
	for range rounds {
		for _, a := range m.readAll(t, readers) {
			if a.status != 200 || a.token() == "" || seen[a.token()] || a.LeaseID == "" || seen[a.LeaseID] {
				t.Errorf("status %d, no token, or one that was seen before; lease %q", a.status, a.LeaseID)
			}
			seen[a.token()], seen[a.LeaseID] = true, true
		}
	}
	stats := m.sim.Stats()
	if stats.Calls != readers*rounds || stats.Minted != readers*rounds || stats.Connections > readers {
		t.Errorf("%d reads: %+v", readers*rounds, stats)
	}
	if n := m.leaseCount(m.path + "/creds/app"); n != readers*rounds {
		t.Errorf("%d leases, want %d", n, readers*rounds)
	}
}

// TestSlowMint shows that a slow token request holds up no write, and ends with its caller;
// nothing was minted then.
func TestSlowMint(t *testing.T) {
	t.Parallel()
	m := newMount(t, sharedServer(t), nil)
	m.configure(t)
	m.sim.SetFault(cabletest.Fault{Times: 1, Delay: time.Minute})
	ctx, leave := context.WithCancel(context.Background())
	defer leave()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, m.addr+"/v1/"+m.path+"/creds/app", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Vault-Token", m.root)
	ended := make(chan error, 1)
	go func() {
		resp, err := http.DefaultClient.Do(req)
		if err == nil {
			resp.Body.Close()
		}
		ended <- err
	}()
	waitFor(t, 10*time.Second, "the call", func() bool { return m.sim.CallCount() == 1 })

	m.ok(t, "POST", m.path+"/config", map[string]any{"request_timeout": "10s"})
	m.ok(t, "POST", m.path+"/roles/app", map[string]any{"ttl": "10m"})
	m.read(t)
	if m.sim.Stats().ByStatus[0] != 0 {
		t.Error("two writes and a read took until the end of a slow mint")
	}
	leave()
	if err := <-ended; err == nil {
		t.Error("the slow read got a response")
	}
	waitFor(t, 10*time.Second, "the call ends with its caller", func() bool { return m.sim.Stats().ByStatus[0] == 1 })
	if n := len(m.sim.Minted()); n != 1 {
		t.Errorf("%d tokens were minted, want the one of the second read", n)
	}
}
