// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// TestClusterFaults breaks the disk and the network of the leader of a cluster under load. Each token that was handed
// out has its lease afterwards. A token without a lease belongs to a read that failed. Once the fault is gone, each node
// mints again.
//
// NOTE: not beside other tests, like TestHA. Clocks that differ are not tested here, because a process cannot be given
// a wall clock of its own.
func TestClusterFaults(t *testing.T) {
	if runtime.GOOS != "linux" || os.Geteuid() != 0 {
		skipUnlessRequired(t, errors.New("to mount a small disk takes root, on Linux"))
	}
	var links [clusterSize]*link
	c := startCluster(t, &cabletest.Options{Default: cabletest.Fault{Delay: 20 * time.Millisecond}}, func(c *cluster) {
		for i := range c.nodes {
			links[i] = newLink(t, c, i)
			c.proxies[i] = links[i].port
			disk := c.folder(i, "raft")
			noError(t, os.MkdirAll(disk, 0o700))
			mustRun(t, "mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", disk)
			t.Cleanup(func() { mustRun(t, "umount", "--lazy", disk) })
		}
	})
	c.node(c.leader(t)).ok(t, "POST", c.path+"/config", map[string]any{
		"refresh_key": c.sim.RefreshKey(), "token_url": c.sim.URL, "organization_id": cabletest.DefaultOrganizationID,
	})
	c.node(c.leader(t)).ok(t, "POST", c.path+"/roles/app", map[string]any{"scopes": "transactions:read", "ttl": "1h"})
	disk := func(i int) string { return c.folder(i, "raft") }
	for _, tt := range []struct {
		name        string
		breaks, end func(leader int)
	}{
		{"full disk", func(leader int) {
			filler, err := os.Create(filepath.Join(disk(leader), "filler"))
			noError(t, err)
			_, err = io.Copy(filler, zeros{})
			if err == nil || filler.Close() != nil {
				t.Errorf("the disk is not full: %v", err)
			}
		}, func(leader int) { noError(t, os.Remove(filepath.Join(disk(leader), "filler"))) }},
		{"partition", func(leader int) {
			for _, l := range links {
				l.cut(leader)
			}
		}, func(int) {
			for _, l := range links {
				l.cut(-1)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) { testFault(t, c, tt.breaks, tt.end) })
	}
}

// testFault breaks the leader under load for five seconds, or until another node mints, and then ends the fault.
func testFault(t *testing.T, c *cluster, breaks, end func(leader int)) {
	say := narrate(t)
	const readers = 12
	leader := c.leader(t)
	before := c.sim.Stats().Minted - len(c.node(leader).leases(t, c.path+"/creds/app/"))
	load := c.startReaders(t, readers)
	waitFor(t, 30*time.Second, "a load", func() bool { return len(load.seen()) > 10*readers })
	breaks(leader)
	broken := time.Now()
	waitFor(t, 40*time.Second, "the other nodes mint, or the leader still does", func() bool {
		for _, s := range load.seen() {
			if s.status == 200 && s.start.Sub(broken) > 5*time.Second {
				return true
			}
		}
		return false
	})
	say("node %d led when it broke, node %d leads %s later", leader, c.leader(t), milliseconds(time.Since(broken)))
	end(leader)
	for i := range c.nodes {
		if c.node(i).ended() { // a server may end itself when its disk fails
			c.start(t, i)
			c.unseal(t, i, 200, 429)
			say("node %d had ended, and was started again", i)
		}
	}
	c.waitForVoters(t)
	c.mints(t, 0, 1, 2)
	samples := load.stop()
	leases, tokens := handedOut(t, samples)
	held := c.node(c.leader(t)).leases(t, c.path+"/creds/app/")
	failed := len(samples) - len(tokens)
	unleased := c.sim.Stats().Minted - len(held) - before
	say("%d tokens; %d reads failed; %d tokens were minted without a lease", len(tokens), failed, unleased)
	if n := missing(leases, held); n > 0 {
		t.Errorf("%d tokens were handed out whose lease the leader does not know", n)
	}
	if unleased < 0 || unleased > failed {
		t.Errorf("%d tokens have no lease, and %d reads failed", unleased, failed)
	}
}

// zeros is a file without an end.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// mustRun runs a command that must succeed.
func mustRun(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Errorf("%s %v: %v\n%s", name, args, err, out)
	}
}

// ended reports whether the server's process has ended.
func (v *vaultServer) ended() bool {
	select {
	case <-v.Exited:
		return true
	default:
		return false
	}
}

// link leads the other nodes of a cluster to one node, by a port of its own.
type link struct {
	c        *cluster
	to, port int

	mu    sync.Mutex
	alone int // the node that is cut off, or -1
	conns map[net.Conn]int
}

// newLink returns a link to a node until the end of the test.
func newLink(t *testing.T, c *cluster, to int) *link {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	noError(t, err)
	l := &link{c: c, to: to, port: listener.Addr().(*net.TCPAddr).Port, alone: -1, conns: map[net.Conn]int{}}
	t.Cleanup(func() { _ = listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go l.serve(conn)
		}
	}()
	return l
}

// cut closes and refuses the connections between a node and the others, none if it is -1.
func (l *link) cut(alone int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.alone = alone
	for conn, from := range l.conns {
		if alone == from || alone == l.to {
			_ = conn.Close()
		}
	}
}

// serve copies a connection to the node.
func (l *link) serve(conn net.Conn) {
	defer conn.Close()
	from := l.from(conn.RemoteAddr().(*net.TCPAddr).Port)
	l.mu.Lock()
	if l.alone >= 0 && (from == l.alone || l.to == l.alone) {
		l.mu.Unlock()
		return
	}
	l.conns[conn] = from
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.conns, conn)
	}()
	node, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", l.c.ports[l.to]))
	if err != nil {
		return
	}
	defer node.Close()
	go func() {
		_, _ = io.Copy(node, conn)
		_ = node.Close()
	}()
	_, _ = io.Copy(conn, node)
}

// from returns the node whose process has the other end of a connection, by the kernel's table of sockets, or -1.
func (l *link) from(port int) int {
	table, _ := os.ReadFile("/proc/net/tcp")
	inode := ""
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); len(f) > 9 && f[1] == fmt.Sprintf("0100007F:%04X", port) {
			inode = f[9]
		}
	}
	for i := range l.c.nodes {
		v := l.c.node(i)
		if v == nil || inode == "" {
			continue
		}
		files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", v.Process.Pid))
		for _, f := range files {
			if to, _ := os.Readlink(f); to == "socket:["+inode+"]" {
				return i
			}
		}
	}
	return -1
}
