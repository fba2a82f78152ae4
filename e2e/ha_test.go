// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/vaulttest"
)

// clusterSize is the least number of nodes that lets one fail.
const clusterSize = 3

// cluster is some Vault servers on integrated storage that share one unseal
// key, with the engine mounted and a Cable of its own.
type cluster struct {
	dir       string
	nodes     [clusterSize]atomic.Pointer[vaultServer] // a node that is started again is another server
	ports     [clusterSize]int                         // between the nodes, the same for ever
	proxies   [clusterSize]int                         // ports that lead there, or 0
	key, root string
	path      string // of the mount
	sim       *cabletest.Server
}

// node returns a node as it runs now.
func (c *cluster) node(i int) *vaultServer { return c.nodes[i%clusterSize].Load() }

// startCluster starts the nodes, joins them, registers the plugin once and
// mounts it. At the end of the test the nodes are stopped and their logs are
// searched for secrets.
func startCluster(t *testing.T, opts *cabletest.Options, prepare ...func(*cluster)) *cluster {
	t.Helper()
	needVault(t)
	c := &cluster{dir: t.TempDir(), path: "cable", sim: cabletest.NewServer(t, opts)}
	t.Cleanup(func() {
		c.stop()
		for i := range c.nodes {
			v := c.node(i)
			if v == nil {
				continue
			}
			for _, leak := range v.leaks(position{}) {
				t.Errorf("node %d: %s", i, leak)
			}
			if now := v.position(); now.log == 0 || now.audit == 0 {
				t.Errorf("node %d wrote no log: %+v", i, now)
			}
		}
	})
	for i := range c.nodes {
		c.ports[i] = freePort(t)
		c.install(t, pluginName, suite.plugin.File)
	}
	for _, f := range prepare {
		f(c)
	}
	var wg sync.WaitGroup
	for i := range c.nodes {
		wg.Go(func() { c.start(t, i) })
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}

	first := c.node(0)
	noError(t, first.Init(t.Context()))
	c.key, c.root = first.Key, first.Root
	for i := range c.nodes {
		c.node(i).root, c.node(i).Root = c.root, c.root
	}
	// A node that joins may vote soon, instead of after ten seconds.
	first.ok(t, "POST", "sys/storage/raft/autopilot/configuration", map[string]any{"server_stabilization_time": "1s"})
	for i := 1; i < clusterSize; i++ {
		c.node(i).ok(t, "PUT", "sys/storage/raft/join", map[string]any{"leader_api_addr": first.addr})
		c.node(i).do(t, "PUT", "sys/unseal", map[string]any{"key": c.key})
	}
	for i := 1; i < clusterSize; i++ {
		c.waitForState(t, i, 429)
	}
	c.waitForVoters(t)
	noError(t, first.Register(t.Context(), suite.plugin))
	noError(t, first.EnableAudit(t.Context(), first.audit))
	first.ok(t, "POST", "sys/mounts/"+c.path, map[string]any{"type": pluginName})
	c.waitForAll(t, "knows the mount", func(v *vaultServer) bool {
		return v.do(t, "GET", c.path+"/status", nil).status == 200
	})
	return c
}

// waitForAll waits until something holds on each node. Standbys that serve reads
// themselves, as OpenBao's do, learn of a write some tenths of a second later.
func (c *cluster) waitForAll(t *testing.T, what string, holds func(*vaultServer) bool) {
	t.Helper()
	for i := range c.nodes {
		waitFor(t, 30*time.Second, fmt.Sprintf("node %d %s", i, what), func() bool { return holds(c.node(i)) })
	}
}

// stop stops the nodes at once, because a node that leaves waits for the others.
func (c *cluster) stop() {
	var wg sync.WaitGroup
	for i := range c.nodes {
		if v := c.node(i); v != nil {
			wg.Go(v.stop)
		}
	}
	wg.Wait()
}

// install links a plugin into each node's folder.
func (c *cluster) install(t *testing.T, name, binary string) {
	t.Helper()
	for i := range c.nodes {
		folder := c.folder(i, "plugins")
		noError(t, os.MkdirAll(folder, 0o700))
		if err := os.Link(binary, filepath.Join(folder, name)); err != nil && !os.IsExist(err) {
			t.Fatal(err)
		}
	}
}

// folder is a place of a node's own.
func (c *cluster) folder(i int, name string) string {
	return filepath.Join(c.dir, fmt.Sprintf("node-%d", i), name)
}

// freePort finds a port that the system does not give to outgoing connections,
// so that a node that is started again finds it free.
func freePort(t *testing.T) int {
	t.Helper()
	for range 100 {
		port := 10_000 + rand.IntN(20_000)
		if listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			_ = listener.Close()
			return port
		}
	}
	t.Fatal("no free port was found")
	return 0
}

// start starts a node, sealed.
func (c *cluster) start(t *testing.T, i int) {
	t.Helper()
	// The cluster has one audit device, so all nodes append to one file.
	v := &vaultServer{plugins: c.folder(i, "plugins"), audit: filepath.Join(c.dir, "audit.log")}
	node := &vaulttest.Raft{Dir: c.folder(i, "raft"), Node: fmt.Sprintf("node-%d", i), Port: c.ports[i], Root: c.root}
	node.Advertised = c.proxies[i]
	if err := v.start(c.folder(i, ""), node); err != nil {
		t.Error(err)
		return
	}
	c.nodes[i].Store(v)
}

// unseal unseals a node and waits for its state.
func (c *cluster) unseal(t *testing.T, i int, states ...int) {
	t.Helper()
	c.node(i).do(t, "PUT", "sys/unseal", map[string]any{"key": c.key})
	c.waitForState(t, i, states...)
}

// waitForState waits until a node is active (200) or a standby (429).
func (c *cluster) waitForState(t *testing.T, i int, states ...int) {
	t.Helper()
	waitFor(t, 30*time.Second, fmt.Sprintf("node %d is in state %v", i, states), func() bool {
		a, err := c.node(i).call(request{method: "GET", path: "sys/health"})
		return err == nil && slices.Contains(states, a.status)
	})
}

// waitForVoters waits until every node may vote.
func (c *cluster) waitForVoters(t *testing.T) {
	t.Helper()
	waitFor(t, 30*time.Second, "all nodes vote", func() bool {
		leader := c.node(c.leader(t))
		a, err := leader.call(request{method: "GET", path: "sys/storage/raft/configuration", token: c.root})
		return err == nil && strings.Count(a.text, `"voter":true`) == clusterSize
	})
}

// leader waits for the active node and returns its number.
func (c *cluster) leader(t *testing.T) (leader int) {
	t.Helper()
	waitFor(t, 30*time.Second, "a leader", func() bool {
		for i := range c.nodes {
			a, err := c.node(i).call(request{method: "GET", path: "sys/health"})
			if err == nil && a.status == 200 {
				leader = i
				return true
			}
		}
		return false
	})
	return leader
}

// mints waits until each of some nodes returns a token, and returns the time of the
// first.
func (c *cluster) mints(t *testing.T, nodes ...int) (first time.Time) {
	t.Helper()
	for _, i := range nodes {
		var last sample
		for end := time.Now().Add(time.Minute); last.status != 200; time.Sleep(pollInterval) {
			if time.Now().After(end) {
				t.Fatalf("no token comes through node %d: %s", i, last)
			}
			last = c.node(i).timed(c.read("app"))
		}
		if first.IsZero() {
			first = time.Now()
		}
	}
	return first
}

// read is the request for a token.
func (c *cluster) read(role string) request {
	return request{method: "GET", path: c.path + "/creds/" + role, token: c.root}
}

// writeConfig writes config through a node.
func (c *cluster) writeConfig(i int, fields map[string]any) sample {
	return c.node(i).timed(request{method: "POST", path: c.path + "/config", body: fields, token: c.root})
}

// startReaders starts readers, spread over the nodes. A reader that gets no token
// tries the next node.
func (c *cluster) startReaders(t *testing.T, n int) *loop {
	var node [1024]int // each reader's own
	return startLoop(t, n, func(i, _ int) sample {
		s := c.node(i + node[i]).timed(c.read("app"))
		if s.status != 200 {
			node[i]++
		}
		return s
	})
}

// others returns the numbers of the other nodes.
func others(i int) []int { return []int{(i + 1) % clusterSize, (i + 2) % clusterSize} }

// narrator logs a line of the story.
type narrator func(format string, args ...any)

// narrate returns a narrator that tells the time since the test began.
func narrate(t *testing.T) narrator {
	start := time.Now()
	return func(format string, args ...any) {
		t.Helper()
		t.Logf("%5.1fs  %s", time.Since(start).Seconds(), fmt.Sprintf(format, args...))
	}
}

// milliseconds rounds for reading.
func milliseconds(d time.Duration) time.Duration { return d.Round(time.Millisecond) }

// duringChange accepts the responses, other than a token, that a node may give
// while the active node changes, all of them Vault's own: none if it is down; 307 if
// it could not forward, with the address of the node that was active; 500 if it is
// becoming active or a standby ("Vault is sealed", "local node not active …", "rpc
// error …"); 503 if it is sealed or knows no active node; 404 if it does not yet know
// the mount.
func duringChange(s sample) bool {
	return slices.Contains([]int{0, 307, 500, 503}, s.status) || suite.product.Unaware(s.status, s.text)
}

// TestHA runs a cluster of three nodes. `make ha-demo` shows the first part to
// a person.
//
// NOTE: not beside other tests. Three servers that elect a leader within a
// second need the machine, or they elect another.
func TestHA(t *testing.T) {
	say := narrate(t)
	c := startCluster(t, &cabletest.Options{Default: cabletest.Fault{Delay: 30 * time.Millisecond}})
	say("%d nodes run on integrated storage, node %d leads; the plugin was registered once", clusterSize, c.leader(t))
	t.Run("without a lease", func(t *testing.T) { testUnleasedOnStandbys(t, c) })
	t.Run("leader killed", func(t *testing.T) { testLeaderKilled(t, c, say) })
	if !t.Failed() {
		t.Run("changes", func(t *testing.T) { testChanges(t, c, say) })
	}
}

// testLeaderKilled kills the leader under load.
//
//   - A write through a standby is used by all nodes, before and after the kill.
//   - Every token that was handed out has its lease on the new leader.
//   - Tokens without a lease are at most as many as there were requests under
//     way when the leader was killed.
func testLeaderKilled(t *testing.T, c *cluster, say narrator) {
	const readers = 30
	leader := c.leader(t)
	standbys := others(leader)
	c.node(standbys[0]).ok(t, "POST", c.path+"/config", map[string]any{
		"refresh_key": c.sim.RefreshKey(), "token_url": c.sim.URL, "organization_id": cabletest.DefaultOrganizationID,
	})
	c.node(standbys[1]).ok(t, "POST", c.path+"/roles/app", map[string]any{"scopes": "transactions:read", "ttl": "1h"})
	stored := func(v *vaultServer) (data [2]map[string]any) {
		for i, path := range []string{"/config", "/roles/app"} {
			data[i] = v.do(t, "GET", c.path+path, nil).Data
		}
		return data
	}
	before := stored(c.node(leader))
	if before[0] == nil || before[1] == nil {
		t.Fatalf("config and role: %v", before)
	}
	c.waitForAll(t, "has config and role", func(v *vaultServer) bool { return cmp.Equal(before, stored(v)) })
	say("config written through node %d, a role through node %d: both forwarded", standbys[0], standbys[1])
	var samples []sample
	for i := range c.nodes {
		s := c.node(i).timed(c.read("app"))
		if s.status != 200 {
			t.Errorf("a read through node %d: %s", i, s)
		}
		samples = append(samples, s)
	}
	say("token minted through each of the %d addresses", clusterSize)

	load := c.startReaders(t, readers)
	waitFor(t, 30*time.Second, "a load", func() bool { return len(load.seen()) > 20*readers })
	old := c.node(leader)
	orphans := pluginsOf(t, old)
	killing := time.Now()
	old.kill(t)
	killed := time.Now()
	waitFor(t, 30*time.Second, "the killed node's plugin ends", func() bool {
		return !slices.ContainsFunc(orphans, runs)
	})
	say("under the load of %d readers, node %d was killed (SIGKILL to process %d)", readers, leader, old.Process.Pid)
	outage := c.mints(t, standbys...).Sub(killed)
	settled := time.Now()
	next := c.leader(t)
	say("node %d leads now: the first token came %s after the kill", next, milliseconds(outage))
	if outage > 15*time.Second {
		t.Errorf("the first token came %s after the kill", outage)
	}
	if diff := cmp.Diff(before, stored(c.node(next))); diff != "" {
		t.Errorf("config and role after the kill (-before +after):\n%s", diff)
	}
	say("config and role are what they were (refresh_key_version %s)", before[0]["refresh_key_version"])

	c.start(t, leader)
	c.unseal(t, leader, 200, 429)
	c.waitForVoters(t)
	c.mints(t, leader)
	say("node %d was started again, unsealed, and votes; token minted through it", leader)
	rejoined := time.Now()
	waitFor(t, 30*time.Second, "reads after the rejoin", func() bool {
		return slices.ContainsFunc(load.seen(), func(s sample) bool {
			return s.status == 200 && s.start.After(rejoined)
		})
	})
	samples = append(samples, load.stop()...)

	next = c.leader(t)
	leases, tokens := handedOut(t, samples)
	held := c.node(next).leases(t, c.path+"/creds/app/")
	underWay, failed := 0, map[int]int{}
	for _, s := range samples {
		if s.overlaps(killing, killed) {
			underWay++
		}
		// A reader may still come to the node that is down, or not yet back.
		down := s.start.Before(rejoined) && (s.addr == old.addr || s.addr == c.node(leader).addr)
		switch {
		case s.status == 200:
		case s.end.After(killing) && (s.start.Before(settled) || down) && duringChange(s):
			failed[s.status]++
		default:
			t.Errorf("%s after the kill, %s after the new leader minted, %s after the rejoin: %s",
				s.start.Sub(killed), s.start.Sub(settled), s.start.Sub(rejoined), s)
		}
	}
	minted := c.sim.Stats().Minted
	unleased := minted - len(held)
	say("readers: %d tokens; tries without one, by status (0: no response): %v", len(tokens), failed)
	say("Cable minted %d tokens; the new leader holds %d leases", minted, len(held))
	say("tokens handed out without a lease: %d; minted without a lease: %d, of %d requests under way at the kill",
		missing(leases, held), unleased, underWay)
	if n := missing(leases, held); n > 0 {
		t.Errorf("%d tokens were handed out whose lease the new leader does not know", n)
	}
	if unleased < 0 || unleased > underWay {
		t.Errorf("%d tokens have no lease, but %d requests were under way at the kill", unleased, underWay)
	}
	if diff := cmp.Diff(before, stored(c.node(next))); diff != "" {
		t.Errorf("config and role at the end (-before +after):\n%s", diff)
	}
	noneIrrevocable(t, c.node(next))
}

// pluginsOf returns the plugin processes of a server. Without a /proc the rest of
// the test is worth running, so there are none; but not where all is required.
func pluginsOf(t *testing.T, v *vaultServer) []int {
	t.Helper()
	if _, err := os.Stat("/proc/self/stat"); err != nil && !required() {
		return nil
	}
	return v.pluginProcesses(t)
}

// runs reports whether a process has not ended.
func runs(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(stat), ") Z ")
}

// noneIrrevocable checks that Vault could end every lease that was to end.
func noneIrrevocable(t *testing.T, v *vaultServer) {
	t.Helper()
	a := v.ok(t, "GET", "sys/leases?type=irrevocable", nil)
	if a.Data["lease_count"] == nil || a.number("lease_count") != 0 {
		t.Errorf("irrevocable leases: %s", a)
	}
}

// running is the version of the plugin that a node runs, as it says itself.
func (c *cluster) running(t *testing.T, v *vaultServer) string {
	t.Helper()
	return fmt.Sprint(v.do(t, "GET", "sys/mounts/"+c.path, nil).Data["running_plugin_version"])
}

// restartStandbys follows docs/openbao.md after an upgrade on the leader, because
// standbys that run the plugin keep the old version until they are restarted.
func (c *cluster) restartStandbys(t *testing.T, leader int) {
	t.Helper()
	page := named(t, "docs/openbao.md")
	for _, i := range others(leader) {
		if got := c.running(t, c.node(i)); got != pluginVersion {
			t.Errorf("after a reload on the leader, node %d runs %s", i, got)
		}
		reload := map[string]any{"mounts": []string{c.path + "/"}}
		c.node(i).ok(t, "PUT", "sys/plugins/reload/backend", reload)
		if got := c.running(t, c.node(i)); got != pluginVersion {
			t.Errorf("after a reload on node %d itself, it runs %s", i, got)
		}
		shell := func() *shell { return newShell(t, c.node(i), map[string]string{"bao": suite.vault}) }
		if got := shell().run(page["active-node"] + `echo -n "$BAO_ADDR"`); got != c.node(leader).addr {
			t.Errorf("the page's command says that %s leads, not %s", got, c.node(leader).addr)
		}
		c.node(i).stop()
		c.start(t, i)
		c.unseal(t, i, 429)
		waitFor(t, 30*time.Second, "the standby serves", func() bool { return c.running(t, c.node(i)) == nextVersion })
		contains(t, shell().run(page["node-version"]), nextVersion)
	}
}

// nextVersion is stamped into the plugin that nextPlugin builds.
const nextVersion = "v0.0.2-e2e"

// nextPlugin builds the plugin as its next version, once.
var nextPlugin = sync.OnceValues(func() (vaulttest.Plugin, error) {
	return vaulttest.Build(suite.ctx, filepath.Join(suite.dir, "next"), "cmd/"+pluginName, nextVersion)
})

// change is something that an operator does to a cluster under load.
type change struct {
	name       string
	from, to   time.Time
	newKeyFrom time.Time // the write of the new key had returned
}

// testChanges has, under load, the leader step down and be sealed and unsealed, the
// plugin reloaded, and the mount upgraded to another version. During each of these
// the refresh key is rotated at Cable and in config.
//
//   - Once the write of a new key has returned, no mint uses the old one, which
//     Cable refuses by then.
//   - Afterwards each node mints and takes writes of config, and each token
//     that was handed out has its lease.
//   - Leases that the old version gave out end under the new one.
func testChanges(t *testing.T, c *cluster, say narrator) {
	const readers = 12
	next, err := nextPlugin()
	noError(t, err)
	c.install(t, pluginName+"-next", next.File)
	next.File = filepath.Join(c.folder(0, "plugins"), pluginName+"-next")
	v := c.node(c.leader(t))
	keyVersion := v.ok(t, "GET", c.path+"/config", nil).number("refresh_key_version")
	v.ok(t, "POST", c.path+"/roles/old", map[string]any{"scopes": "transactions:read"})
	var oldLeases []string
	for i := range 10 {
		oldLeases = append(oldLeases, c.node(i).ok(t, "GET", c.path+"/creds/old", nil).LeaseID)
	}
	load := c.startReaders(t, readers)

	var changes []change
	under := func(name string, do func(leader int) (finish func())) {
		t.Helper()
		reads := len(load.seen())
		waitFor(t, 30*time.Second, "a load", func() bool { return len(load.seen()) > reads+5*readers })
		ch := change{name: name, from: time.Now()}
		leader := c.leader(t)

		// Cable takes another key from now on. An operator writes it while the change
		// is under way, and tries again until Vault says that it was stored.
		key := cabletest.NewRefreshKey()
		c.sim.SetRefreshKey(key)
		done := make(chan func(), 1)
		go func() { done <- do(leader) }()
		tries := map[int]int{}
		i := leader
		waitFor(t, 30*time.Second, "the write of a new key", func() bool {
			i++
			s := c.writeConfig(i, map[string]any{"refresh_key": key, "token_url": c.sim.URL})
			tries[s.status]++
			if s.status/100 != 2 && !duringChange(s) {
				t.Errorf("%s: writing config: %s", name, s)
			}
			return s.status/100 == 2
		})
		ch.newKeyFrom = time.Now()
		if finish := <-done; finish != nil {
			finish()
		}
		c.mints(t, 0, 1, 2)
		minted := time.Now()
		keyVersion++
		for i := range c.nodes {
			waitFor(t, 30*time.Second, "a write of config", func() bool {
				s := c.writeConfig(i, map[string]any{"request_timeout": 10 + i})
				if suite.product.Unaware(s.status, s.text) {
					return false
				}
				if s.status/100 != 2 {
					t.Errorf("after %s: writing config through node %d: %s", name, i, s)
				}
				return true
			})
		}
		c.waitForAll(t, "has the new config", func(v *vaultServer) bool {
			a := v.do(t, "GET", c.path+"/config", nil)
			return a.number("refresh_key_version") == keyVersion && a.number("request_timeout") == 12
		})
		ch.to = time.Now() // each node knows of all changes
		changes = append(changes, ch)
		say("%s: the new key was stored after %s (statuses of its writes: %v), all nodes minted after %s",
			name, milliseconds(ch.newKeyFrom.Sub(ch.from)), tries, milliseconds(minted.Sub(ch.from)))
		say("%s: node %d led before, node %d leads now", name, leader, c.leader(t))
	}
	put := func(node int, path string, body any) {
		a, err := c.node(node).call(request{method: "PUT", path: path, body: body, token: c.root})
		if err != nil || a.status >= 300 {
			t.Errorf("%s: %s, %v", path, a, err)
		}
	}

	under("step-down", func(leader int) func() {
		put(leader, "sys/step-down", nil)
		return nil
	})
	under("seal and unseal", func(leader int) func() {
		put(leader, "sys/seal", nil)
		return func() { c.unseal(t, leader, 200, 429) }
	})
	under("reload of the plugin", func(leader int) func() {
		put(leader, "sys/plugins/reload/backend", map[string]any{"plugin": pluginName})
		return nil
	})
	under("reload of the mount", func(leader int) func() {
		put(others(leader)[0], "sys/plugins/reload/backend", map[string]any{"mounts": []string{c.path + "/"}})
		return nil
	})
	under("upgrade", func(leader int) func() {
		if err := c.node(leader).Register(t.Context(), next); err != nil {
			t.Error(err)
		}
		put(leader, "sys/mounts/"+c.path+"/tune", map[string]any{"plugin_version": nextVersion})
		put(leader, "sys/plugins/reload/backend", map[string]any{"mounts": []string{c.path + "/"}})
		return func() {
			if suite.product.ReloadsOneNode(suite.version) {
				c.restartStandbys(t, leader)
			}
			c.waitForAll(t, "runs "+nextVersion, func(v *vaultServer) bool { return c.running(t, v) == nextVersion })
		}
	})
	calls := c.sim.Calls()
	if got := calls[len(calls)-1].UserAgent; !strings.HasSuffix(got, strings.TrimPrefix(nextVersion, "v")) {
		t.Errorf("after the upgrade: User-Agent %q, want that of %s", got, nextVersion)
	}
	samples := load.stop()

	v = c.node(c.leader(t))
	leases, _ := handedOut(t, samples)
	held := v.leases(t, c.path+"/creds/app/")
	if n := missing(leases, held); n > 0 {
		t.Errorf("%d tokens were handed out without a lease", n)
	}
	for _, s := range samples {
		if s.status == 200 || suite.product.Unaware(s.status, s.text) {
			continue
		}
		i := slices.IndexFunc(changes, func(ch change) bool { return s.overlaps(ch.from, ch.to) })
		switch {
		case i < 0:
			t.Errorf("outside of any change: %s", s)
		case duringChange(s):
		// The old key is refused until the write of the new one has returned.
		case s.status == 400 && s.start.Before(changes[i].newKeyFrom) && strings.Contains(s.text, "responded 401"):
		default:
			t.Errorf("%s, %s after it began, %s after the new key was stored: %s", changes[i].name,
				s.start.Sub(changes[i].from), s.start.Sub(changes[i].newKeyFrom), s)
		}
	}
	say("reads by status (0: no response): %v; %d leases", byStatus(samples), len(held))

	for _, lease := range oldLeases[:5] {
		v.ok(t, "PUT", "sys/leases/revoke", map[string]any{"lease_id": lease, "sync": true})
	}
	v.ok(t, "PUT", "sys/leases/revoke-prefix/"+c.path+"/creds/old", map[string]any{"sync": true})
	if n := len(v.leases(t, c.path+"/creds/old/")); n != 0 {
		t.Errorf("%d leases of the old version are left", n)
	}
	noneIrrevocable(t, v)
	say("%d leases of %s were revoked under %s; none is irrevocable", len(oldLeases), pluginVersion, nextVersion)
}
