// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/history"
)

var historiesFlag = flag.Duration("histories", 20*time.Second, "make the history of TestClusterHistory for so long")

// TestClusterHistory makes a history of a cluster whose leader steps down and is killed, and checks it with package
// history. TestHistories makes those in which every time and every storage error is known.
//
// NOTE: not beside other tests, like TestHA.
func TestClusterHistory(t *testing.T) {
	say := narrate(t)
	c := startCluster(t, nil)
	leader := c.leader(t)
	c.node(leader).ok(t, "POST", c.path+"/config", map[string]any{
		"refresh_key": c.sim.RefreshKey(), "token_url": c.sim.URL, "organization_id": cabletest.DefaultOrganizationID,
	})
	began := time.Now()
	now := func(t time.Time) time.Duration { return t.Sub(began) }
	node := &history.Node{Name: "cluster", Cleaned: history.Never}
	h := &history.History{Nodes: []*history.Node{node}, Begins: history.Settings{
		Config:   history.Config{Exists: true, Organization: cabletest.DefaultOrganizationID},
		MaxLease: 768 * 3600,
	}}
	var mu sync.Mutex
	tokens := make(map[*history.Read]string)
	change := func(i int, method, path string, data map[string]any) sample {
		ch := &history.Change{Node: node, Path: path, Data: data, Committed: history.Never}
		ch.Op = map[string]logical.Operation{"DELETE": logical.DeleteOperation, "PATCH": logical.PatchOperation}[method]
		r := request{method: method, path: c.path + "/" + path, body: data, token: c.root}
		if path == history.TunePath {
			r.path = "sys/mounts/" + c.path + "/tune"
		}
		if method == "PATCH" {
			r.header = map[string]string{"Content-Type": "application/merge-patch+json"}
		}
		s := c.node(i).timed(r)
		ch.Start, ch.End, ch.Status, ch.Err = now(s.start), now(s.end), s.status, s.text
		switch {
		case s.status >= 200 && s.status < 300:
			ch.Began, ch.Committed = true, ch.End
		case s.status == 500 || s.status == 0 && !strings.Contains(s.text, "connection refused"):
			// It may have been stored, or may be.
			ch.Began, ch.Status, ch.Committed = true, 500, history.Never-1
		}
		mu.Lock()
		defer mu.Unlock()
		h.Changes = append(h.Changes, ch)
		return s
	}
	change(leader, "POST", "roles/app", map[string]any{"scopes": "app:a", "ttl": 300})
	change(leader, "POST", "roles/ci", map[string]any{"scopes": "ci:a", "ttl": 600, "reuse_for": 2})
	load := startLoop(t, 6, func(i, round int) sample {
		random := rand.New(rand.NewPCG(uint64(i), uint64(round)))
		time.Sleep(time.Duration(random.IntN(100)) * time.Millisecond)
		r := &history.Read{Node: node, Role: []string{"app", "ci"}[i%2]}
		s := c.node(random.IntN(clusterSize)).timed(c.read(r.Role))
		r.Start, r.End, r.Status, r.Err = now(s.start), now(s.end), s.status, s.text
		mu.Lock()
		defer mu.Unlock()
		h.Reads, tokens[r] = append(h.Reads, r), s.token
		return s
	})
	writers := startLoop(t, 2, func(i, round int) sample {
		random := rand.New(rand.NewPCG(uint64(i), uint64(round)))
		time.Sleep(time.Duration(random.IntN(400)) * time.Millisecond)
		pick := func(values ...any) any { return values[random.IntN(len(values))] }
		method, data := pick("POST", "POST", "PATCH").(string), map[string]any{}
		name := pick("app", "ci").(string)
		path := "roles/" + name
		switch random.IntN(10) {
		case 0:
			method, path, data = "POST", history.TunePath, map[string]any{"max_lease_ttl": pick(300, 450, 3600)}
		case 1:
			path, data["disabled"] = "config", pick(true, false, false)
		case 2:
			method, data = "DELETE", nil
		case 3, 4:
			data["disabled"] = pick(true, false, false, false)
		case 5, 6:
			data["ttl"], data["max_ttl"] = 300, pick(0, 300, 500)
		default:
			data["scopes"], data["disabled"] = pick(name+":a", name+":b", name+":a,"+name+":b"), false
			if name == "ci" {
				data["ttl"], data["reuse_for"] = 600, pick(1, 2, 5)
			}
		}
		return change(random.IntN(clusterSize), method, path, data)
	})
	time.Sleep(*historiesFlag / 3)
	leader = c.leader(t)
	_, _ = c.node(leader).call(request{method: "PUT", path: "sys/step-down", token: c.root})
	say("node %d, which led, was told to step down", leader)
	time.Sleep(*historiesFlag / 3)
	leader = c.leader(t)
	c.node(leader).kill(t)
	say("node %d, which led, was killed", leader)
	say("node %d leads now", c.leader(t))
	time.Sleep(*historiesFlag / 3)
	writers.stop()
	load.stop()

	calls := make(map[string]*history.Call)
	for _, m := range c.sim.Minted() {
		role, _, _ := strings.Cut(m.Scopes[0], ":")
		slices.Sort(m.Scopes)
		issued := now(m.IssuedAt) + time.Second // at the latest, because it is in whole seconds
		calls[m.Token] = &history.Call{
			Node:         node,
			Role:         role,
			Organization: m.OrganizationID,
			Scopes:       strings.Join(m.Scopes, ","),
			Lifetime:     int(m.Expiry.Sub(m.IssuedAt) / time.Second),
			Granted:      int(m.Expiry.Sub(m.IssuedAt) / time.Second),
			Started:      issued,
			Gate:         issued,
			Ended:        issued + time.Second,
			Token:        fmt.Sprint("token-", len(calls)),
		}
		h.Calls = append(h.Calls, calls[m.Token])
	}
	got := 0
	for _, r := range h.Reads {
		if token := tokens[r]; token != "" {
			r.Call = calls[token]
			if got++; r.Role == "app" {
				r.Call.Read = r
			}
		}
	}
	unknown := 0
	for _, ch := range h.Changes {
		if ch.Committed == history.Never-1 {
			unknown++
			t.Log(ch)
		}
	}
	say("unknown %d", unknown)
	broken := h.Check()
	say("%d tokens from %d API calls in %d reads, %d changes", got, len(h.Calls), len(h.Reads), len(h.Changes))
	if len(broken) > 0 {
		t.Errorf("%s\n%s", h, strings.Join(broken, "\n"))
	}
	if got < 10*int(*historiesFlag/time.Second) {
		t.Errorf("%d tokens", got)
	}
}
