// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"flag"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

var soakFlag = flag.Duration("soak", 12*time.Second, "run TestSoak for so long")

// TestSoak reads a role with reuse_for and lease=false on a cluster. Each of three leaders goes through an outage of
// Cable and a rotation of the refresh key, and then steps down. The memory and the descriptors of its plugin do not
// grow from before them to after them, and no read that begins after the rotation fails with an error of the engine.
//
// NOTE: not beside other tests, like TestHA.
func TestSoak(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("the memory of a process is read from /proc")
	}
	const (
		readers     = 16
		growth      = 1.25 // of memory, besides spare
		spare       = 8 << 20
		descriptors = 16
	)
	say := narrate(t)
	c := startCluster(t, nil)
	step := *soakFlag / 3 / 4
	config := map[string]any{
		"refresh_key": c.sim.RefreshKey(), "token_url": c.sim.URL, "organization_id": cabletest.DefaultOrganizationID,
	}
	c.node(c.leader(t)).ok(t, "POST", c.path+"/config", config)
	c.node(c.leader(t)).ok(t, "POST", c.path+"/roles/app", map[string]any{
		"scopes": "transactions:read", "ttl": "1h", "reuse_for": "1s", "lease": false,
	})
	var mu sync.Mutex
	counts, up := map[int]int{}, time.Now() // since when Cable responds, with the present key
	load := startLoop(t, readers, func(i, _ int) sample {
		s := c.node(i).timed(c.read("app"))
		mu.Lock()
		defer mu.Unlock()
		if counts[s.status]++; s.status != 200 && !duringChange(s) && s.start.After(up) {
			t.Errorf("%s", s)
		}
		return sample{status: s.status, text: s.text, end: s.end} // without the token
	})
	upFrom := func(at time.Time) {
		mu.Lock()
		defer mu.Unlock()
		up = at
	}
	for range 3 {
		leader := c.leader(t)
		c.mints(t, leader)
		time.Sleep(step)
		pids := pluginsOf(t, c.node(leader))
		if len(pids) == 0 {
			t.Fatal("the leader has no plugin process")
		}
		memory, files := resident(t, pids), openFiles(t, pids[0])
		upFrom(time.Now().Add(time.Hour))
		c.sim.SetFault(cabletest.Fault{Status: 500})
		time.Sleep(step)
		c.sim.ClearFaults()
		config["refresh_key"] = cabletest.NewRefreshKey()
		c.sim.SetRefreshKey(config["refresh_key"].(string))
		c.node(leader).ok(t, "POST", c.path+"/config", config)
		upFrom(time.Now())
		time.Sleep(2 * step)
		memory2, files2 := resident(t, pids), openFiles(t, pids[0])
		say("node %d: %d MiB and %d descriptors, later %d MiB and %d", leader, memory>>20, files, memory2>>20, files2)
		if float64(memory2) > growth*float64(memory)+spare || files2 > files+descriptors {
			t.Error("memory or descriptors have grown")
		}
		_, _ = c.node(leader).call(request{method: "PUT", path: "sys/step-down", token: c.root})
		waitFor(t, 30*time.Second, "another leader", func() bool { return c.leader(t) != leader })
	}
	load.stop()
	mu.Lock()
	defer mu.Unlock()
	say("reads by status: %v; calls to Cable: %d", counts, c.sim.CallCount())
	if counts[200] < 100 {
		t.Errorf("reads by status: %v", counts)
	}
}

// resident returns the resident memory of some processes, in bytes.
func resident(t *testing.T, pids []int) (sum int) {
	t.Helper()
	for _, pid := range pids {
		lines := strings.Split(readFile(t, fmt.Sprintf("/proc/%d/status", pid)), "\n")
		i := slices.IndexFunc(lines, func(l string) bool { return strings.HasPrefix(l, "VmRSS:") })
		kib, err := strconv.Atoi(strings.Fields(lines[i])[1])
		noError(t, err)
		sum += kib << 10
	}
	return sum
}
