// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"net/http"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/history"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/outcome"
)

var (
	seedFlag      = flag.Uint64("seed", 0, "make the one history of TestHistories that has this number, and show it")
	historiesFlag = flag.Duration("histories", 0, "make histories for so long; default: a fixed number of them")
)

// TestHistories makes random histories of a mount on several nodes, each in a bubble of virtual time, and checks them
// with package history. A seed decides a history, but for the order of goroutines that wake at the same instant.
//
//	go test -run '^TestHistories$' -histories 5m .
//	go test -run '^TestHistories$' -seed 17 .
func TestHistories(t *testing.T) {
	t.Parallel()
	var last atomic.Uint64
	var operations atomic.Int64
	most, end, workers := uint64(300), time.Time{}, runtime.GOMAXPROCS(0)
	if testing.Short() {
		most = 100
	}
	if *historiesFlag > 0 {
		most, end = 1<<62, time.Now().Add(*historiesFlag)
	}
	if *seedFlag != 0 {
		last.Store(*seedFlag - 1)
		most, workers = *seedFlag, 1
	}
	t.Run("seeds", func(t *testing.T) {
		for worker := range workers {
			t.Run(strconv.Itoa(worker), func(t *testing.T) {
				t.Parallel()
				for end.IsZero() || time.Now().Before(end) {
					seed := last.Add(1)
					if seed > most {
						return
					}
					h := makeHistory(t, seed)
					operations.Add(int64(len(h.Changes) + len(h.Calls) + len(h.Reads)))
					if *seedFlag != 0 {
						t.Logf("\n%s", h)
					}
					if broken := h.Check(); len(broken) > 0 {
						last.Store(most) // one is enough
						t.Errorf("seed %d\n%s\n%s\nAgain: go test -run '^TestHistories$' -seed %[1]d .", seed, h,
							strings.Join(broken, "\n"))
					}
				}
			})
		}
	})
	t.Logf("%d histories with %d operations", min(last.Load(), most), operations.Load())
}

// scenario is a history that is being made. One node is active, and another, a performance secondary, mints, and gets
// invalidations.
type scenario struct {
	testing.TB
	seed     uint64
	began    time.Time
	storage  logical.InmemStorage
	maxLease atomic.Int64 // max_lease_ttl in seconds

	mu                sync.Mutex // never held while time passes
	history           history.History
	nodes             []*scenarioNode
	active, secondary *scenarioNode
	late              map[string][]func() // commits of failed writes, by storage key
	tokens            map[string]*history.Call
}

// scenarioNode is a mount on a node, and its view of storage.
type scenarioNode struct {
	*history.Node
	*scenario
	b      *backend
	isOver bool // another node has become active, so storage is read-only
}

// contextKey is the context key of the *history.Read or *history.Change that a call to storage or to Cable is for.
type contextKey struct{}

// makeHistory makes the history of a seed.
func makeHistory(t *testing.T, seed uint64) *history.History {
	var s *scenario
	synctest.Test(t, func(t *testing.T) {
		s = &scenario{TB: t, seed: seed, began: time.Now()}
		s.late, s.tokens = make(map[string][]func()), make(map[string]*history.Call)
		s.history.IsExact = true
		s.active, s.secondary = s.newNode("A"), s.newNode("S")
		s.tune(3600)
		random := rand.New(rand.NewPCG(seed, 0))
		s.write(random, opUpdate, "config", kv{
			"refresh_key": "key-0", "token_url": "https://a.example/token", "organization_id": "org_1",
		})
		s.write(random, opUpdate, "roles/ci", kv{"scopes": "ci:a,ci:b", "ttl": 300, "reuse_for": 150})
		s.write(random, opUpdate, "roles/app", kv{"scopes": "app:a,app:b", "ttl": 600, "max_ttl": 900})
		var clients sync.WaitGroup
		for i := range uint64(7) {
			clients.Go(func() {
				random := rand.New(rand.NewPCG(seed, i+1))
				for range 24 {
					think := choose(random.IntN(10), 1, 1, 1, 1, 12, 12, 12, 12, 12, 90)
					if s.weather("clients") >= 7 { // many at once
						think = 1
					}
					time.Sleep(upTo(random, time.Duration(think)*time.Second))
					if i < 4 {
						s.read(random)
					} else {
						s.change(random)
					}
				}
			})
		}
		clients.Wait()
		time.Sleep(2 * time.Minute) // shared calls end, and late commits come
		s.clean(s.active)
		s.clean(s.secondary)
		synctest.Wait()
		for _, n := range s.nodes {
			s.history.Nodes = append(s.history.Nodes, n.Node)
			n.Undelivered = n.undelivered()
		}
	})
	return &s.history
}

// upTo returns a duration of 1ns to most, so that two events hardly ever happen at the same instant.
func upTo(random *rand.Rand, most time.Duration) time.Duration {
	return time.Duration(random.Int64N(int64(most)) + 1)
}

// maybe returns upTo(most) one time in n, and 0 otherwise.
func maybe(random *rand.Rand, n int, most time.Duration) time.Duration {
	if random.IntN(n) > 0 {
		return 0
	}
	return upTo(random, most)
}

// pass waits for d, and reports whether ctx has not ended.
func pass(ctx context.Context, d time.Duration) bool {
	if d > 0 {
		select {
		case <-time.After(d):
		case <-ctx.Done():
		}
	}
	return ctx.Err() == nil
}

func (s *scenario) now() time.Duration { return time.Since(s.began) }

// random returns a generator that depends on the seed, the time and the purpose alone.
func (s *scenario) random(purpose string) *rand.Rand {
	return rand.New(rand.NewPCG(s.seed, uint64(s.now())^uint64(crc32.ChecksumIEEE([]byte(purpose)))<<32))
}

// weather is how storage or Cable works for 40 s, a number below 10.
func (s *scenario) weather(of string) int {
	if s.now() == 0 {
		return 0 // the first writes succeed
	}
	window := uint64(s.now() / (40 * time.Second))
	return rand.New(rand.NewPCG(s.seed, window<<32|uint64(crc32.ChecksumIEEE([]byte(of))))).IntN(10)
}

// newNode sets up the mount on a node.
func (s *scenario) newNode(name string) *scenarioNode {
	n := &scenarioNode{Node: &history.Node{Name: name, SetUp: s.now(), Cleaned: history.Never}, scenario: s}
	lb, err := Factory(s.Context(), &logical.BackendConfig{
		Logger:      hclog.NewNullLogger(),
		System:      scenarioView{&logical.StaticSystemView{DefaultLeaseTTLVal: 768 * time.Hour}, s},
		StorageView: n,
		BackendUUID: "test",
	})
	must(s, err)
	n.b = lb.(*backend)
	n.b.requestToken = n.requestToken
	s.nodes = append(s.nodes, n)
	return n
}

// scenarioView reports the mount's max_lease_ttl, at times late.
type scenarioView struct {
	*logical.StaticSystemView
	s *scenario
}

// MaxLeaseTTL implements [logical.SystemView].
func (v scenarioView) MaxLeaseTTL() time.Duration {
	random := v.s.random("lease")
	time.Sleep(maybe(random, 10, time.Second))
	value := v.s.maxLease.Load()
	time.Sleep(maybe(random, 10, time.Second))
	return time.Duration(value) * time.Second
}

// caller returns the context of a caller that may leave after a while.
func caller(random *rand.Rand, record any) (context.Context, context.CancelFunc) {
	ctx := context.WithValue(context.Background(), contextKey{}, record)
	if leaves := maybe(random, 6, 5*time.Second); leaves > 0 {
		return context.WithTimeout(ctx, leaves)
	}
	return context.WithCancel(ctx)
}

// send sends a request, after the existence check if there is one, and returns the operation that it decides.
func (n *scenarioNode) send(
	ctx context.Context, op logical.Operation, path string, data kv,
) (resp *logical.Response, sent logical.Operation, status int, err error) {
	req := &logical.Request{
		ID: "req-1", Operation: op, Path: path, Storage: n, Data: overJSON(n.scenario, data), MountPoint: "cable/",
	}
	if op == opUpdate && strings.HasPrefix(path, "roles/") {
		_, exists, err := n.b.HandleExistenceCheck(ctx, req)
		if err != nil {
			return nil, op, 500, err
		} else if !exists {
			req.Operation = opCreate
		}
	}
	resp, err = n.b.HandleRequest(ctx, req)
	status, err = statusOf(resp, err)
	return resp, req.Operation, status, err
}

// read reads credentials on one of the nodes.
func (s *scenario) read(random *rand.Rand) {
	s.mu.Lock()
	n := choose(random.IntN(3), s.active, s.active, s.secondary)
	s.mu.Unlock()
	r := &history.Read{Node: n.Node, Role: choose(random.IntN(5), "app", "ci", "ci", "ci", "ci"), Start: s.now()}
	data := make(kv)
	if random.IntN(8) == 0 {
		r.TTL = choose(random.IntN(2), 300, 450)
		data["ttl"] = r.TTL
	}
	if random.IntN(8) == 0 {
		r.Scopes = r.Role + ":a"
		data["scopes"] = r.Scopes
	}
	if random.IntN(8) == 0 {
		r.Organization = choose(random.IntN(3), "org_1", "org_2", "org_3")
		data["organization_id"] = r.Organization
	}
	ctx, leave := caller(random, r)
	defer leave()
	resp, _, status, err := n.send(ctx, opRead, "creds/"+r.Role, data)
	if err == nil {
		err = ctx.Err() // Vault drops the response to a caller that has left
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	r.End, r.Status = s.now(), status
	if err != nil {
		r.Err = err.Error()
	} else {
		r.Call = s.tokens[resp.Data["token"].(string)]
		r.NoLease = resp.Secret == nil
		r.Fallback = strings.Contains(strings.Join(resp.Warnings, " "), "Cable is down")
	}
	s.history.Reads = append(s.history.Reads, r)
}

// change makes a change of some kind.
func (s *scenario) change(random *rand.Rand) {
	data, path := make(kv), "config"
	op := choose[logical.Operation](random.IntN(4), opPatch, opUpdate, opUpdate, opUpdate)
	sometimes := func(n int, field string, value any) {
		if random.IntN(n) == 0 {
			data[field] = value
		}
	}
	organization := choose[any](random.IntN(3), "org_1", "org_2", nil)
	if organization == nil && op != opPatch || random.IntN(4) > 0 {
		organization = "org_1"
	}
	switch kind := random.IntN(20); kind {
	case 0:
		s.tune(choose(random.IntN(3), 300, 450, 3600))
		return
	case 1:
		s.invalidate(choose(random.IntN(3), "config", "roles/ci", "roles/app"))
		return
	case 2:
		s.failOver(random)
		return
	case 3, 4, 5, 6, 7:
		sometimes(4, "disabled", random.IntN(3) == 0)
		if organization != nil { // config always has one
			sometimes(4, "organization_id", organization)
		}
		sometimes(4, "verify_role", choose(random.IntN(2), "ci", "app"))
		sometimes(12, "request_timeout", 20)
		if random.IntN(3) == 0 || len(data) == 0 {
			const a = "https://a.example/token"
			data["refresh_key"] = fmt.Sprint("key-", random.IntN(3))
			data["token_url"] = choose(random.IntN(4), "https://b.example/token", a, a, a)
		}
	default:
		name := choose(kind, "ci", "ci", "app")
		path = "roles/" + name
		sometimes(4, "disabled", random.IntN(3) == 0)
		sometimes(5, "organization_id", organization)
		sometimes(5, "organization_ids", choose(random.IntN(3), "org_1,org_2", "org_2,org_3", "org_3"))
		sometimes(5, "lease", random.IntN(3) > 0)
		scopes := choose(random.IntN(4), "N:a", "N:b", "N:a,N:b", "N:a,N:b,N:c")
		sometimes(2, "scopes", strings.ReplaceAll(scopes, "N", name))
		if random.IntN(3) == 0 {
			lifetimes := choose(random.IntN(6),
				[3]int{300, 0, 150}, [3]int{400, 500, 40}, [3]int{600, 900, 0},
				[3]int{300, 300, 100}, [3]int{900, 900, 300}, [3]int{0, 0, 0})
			data["ttl"], data["max_ttl"], data["reuse_for"] = lifetimes[0], lifetimes[1], lifetimes[2]
		}
		if len(data) == 0 {
			data["disabled"] = false
		}
	}
	if random.IntN(12) == 0 {
		op, data = opDelete, nil
	}
	s.write(random, op, path, data)
}

// write changes an entry on the active node.
func (s *scenario) write(random *rand.Rand, op logical.Operation, path string, data kv) {
	s.mu.Lock()
	n := s.active
	c := &history.Change{
		Node: n.Node, Path: path, Op: op, Data: data, Start: s.now(), End: history.Never, Committed: history.Never,
		Seen: make(map[*history.Node]time.Duration),
	}
	s.history.Changes = append(s.history.Changes, c)
	s.mu.Unlock()
	ctx, leave := caller(random, c)
	defer leave()
	_, sent, status, err := n.send(ctx, op, path, data)
	s.mu.Lock()
	defer s.mu.Unlock()
	c.End, c.Op, c.Status = s.now(), sent, status
	if err != nil {
		c.Err = err.Error()
	}
}

// tune sets the mount's max_lease_ttl.
func (s *scenario) tune(seconds int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.maxLease.Store(int64(seconds))
	now := s.now()
	s.history.Changes = append(s.history.Changes, &history.Change{
		Path: history.TunePath, Data: kv{"max_lease_ttl": seconds}, Start: now, End: now, Committed: now,
	})
}

// invalidate invalidates an entry on the secondary, and notes which changes it knows from then on.
func (s *scenario) invalidate(key string) {
	s.secondary.b.InvalidateKey(context.Background(), key)
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	s.history.Changes = append(s.history.Changes, &history.Change{
		Node: s.secondary.Node, Path: key, Start: now, End: now, Committed: history.Never, IsSpurious: true,
	})
	s.seenBy(s.secondary, key)
}

// seenBy notes that a node knows the changes that were committed so far. The caller holds mu.
func (s *scenario) seenBy(n *scenarioNode, key string) {
	for _, c := range s.history.Changes {
		if _, known := c.Seen[n.Node]; c.Seen != nil && !known && c.Path == key && c.Committed != history.Never {
			c.Seen[n.Node] = s.now()
		}
	}
}

// failOver makes another node active. Failed writes of the old one are committed before, or never. It ends some time
// later, with requests under way.
func (s *scenario) failOver(random *rand.Rand) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for key := range s.late {
		if random.IntN(2) == 0 {
			s.commitLate(key)
		}
		delete(s.late, key)
	}
	old := s.active
	old.isOver = true
	s.active = s.newNode(string(rune('A' + len(s.nodes) - 1)))
	time.AfterFunc(upTo(random, 5*time.Second), func() { s.clean(old) })
}

// clean ends the mount on a node.
func (s *scenario) clean(n *scenarioNode) {
	n.b.Cleanup(context.Background())
	s.mu.Lock()
	defer s.mu.Unlock()
	n.Cleaned = s.now()
	for _, key := range []string{"config", "roles/ci", "roles/app"} {
		s.seenBy(n, key)
	}
}

// undelivered returns how many tokens the node has counted as undelivered.
func (n *scenarioNode) undelivered() int {
	families, err := n.b.report.Metrics().Gather()
	must(n.scenario, err)
	for _, f := range families {
		if f.GetName() == "vault_cable_undelivered_tokens_total" {
			return int(f.GetMetric()[0].GetCounter().GetValue())
		}
	}
	n.Error("no counter of undelivered tokens")
	return 0
}

// errStorage is an error of the scenario's storage.
var errStorage = errors.New("storage is down")

// List implements [logical.Storage].
func (n *scenarioNode) List(ctx context.Context, prefix string) ([]string, error) {
	return n.storage.List(ctx, prefix)
}

// Get implements [logical.Storage]. It is slow at times, and fails. A read on behalf of a write follows the late
// commits, because the order of Vault's storage is that of its writes.
func (n *scenarioNode) Get(ctx context.Context, key string) (entry *logical.StorageEntry, err error) {
	random, weather := n.random("get"+key), n.weather("storage")
	isSlow, fails := 8, weather == 9 && random.IntN(4) == 0
	if weather >= 7 {
		isSlow = 2
	}
	before, after := maybe(random, isSlow, 2*time.Second), maybe(random, isSlow, 2*time.Second)
	if pass(ctx, before) && !fails {
		n.mu.Lock()
		if _, isWrite := ctx.Value(contextKey{}).(*history.Change); isWrite && !n.isOver {
			n.commitLate(key)
		}
		entry, err = n.storage.Get(context.Background(), key)
		n.mu.Unlock()
		pass(ctx, after)
	}
	if fails {
		err = errStorage
	}
	if err == nil {
		err = ctx.Err()
	}
	if r, ok := ctx.Value(contextKey{}).(*history.Read); ok && err != nil {
		n.mu.Lock()
		r.StorageErr = true
		n.mu.Unlock()
	}
	return entry, err
}

// Put implements [logical.Storage].
func (n *scenarioNode) Put(ctx context.Context, entry *logical.StorageEntry) error {
	return n.store(ctx, entry.Key, func() error { return n.storage.Put(context.Background(), entry) })
}

// Delete implements [logical.Storage].
func (n *scenarioNode) Delete(ctx context.Context, key string) error {
	return n.store(ctx, key, func() error { return n.storage.Delete(context.Background(), key) })
}

// store changes storage, which is slow at times, fails, and commits what failed, at once or late.
func (n *scenarioNode) store(ctx context.Context, key string, change func() error) (err error) {
	c := ctx.Value(contextKey{}).(*history.Change)
	random, weather := n.random("put"+key), n.weather("storage")
	began := n.now()
	n.mu.Lock()
	c.Began = true
	n.mu.Unlock()
	defer func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		if c.StorageTook = n.now() - began; err != nil {
			c.StorageErr = err.Error()
		}
	}()
	commit := func() {
		must(n.scenario, change())
		c.Committed = n.now()
		time.AfterFunc(upTo(random, 3*time.Second), func() { n.invalidate(key) })
	}
	takes, how := 2*time.Second, 0
	if weather >= 7 {
		takes, how = choose(random.IntN(4), 30*time.Second, takes, takes, takes), random.IntN(6)
	}
	before, after := maybe(random, 2, takes), maybe(random, 2, takes)
	if how < 5 && random.IntN(2) == 0 {
		ctx = context.WithoutCancel(ctx) // as a call of the SDK that ignores its context
	}
	if !pass(ctx, before) {
		how = choose(random.IntN(2), 1, 3)
	}
	n.mu.Lock()
	switch {
	case n.isOver:
		how = 1
	case how == 3: // commits late
		n.late[key] = append(n.late[key], commit)
		time.AfterFunc(upTo(random, 40*time.Second), func() {
			n.mu.Lock()
			defer n.mu.Unlock()
			if !n.isOver {
				n.commitLate(key)
			}
		})
	case how != 1:
		n.commitLate(key)
		commit()
	}
	n.mu.Unlock()
	pass(ctx, after)
	if err := ctx.Err(); err != nil || how == 0 || how > 3 {
		return err
	}
	return errStorage
}

// commitLate commits the failed writes of an entry. The caller holds mu.
func (s *scenario) commitLate(key string) {
	for _, commit := range s.late[key] {
		commit()
	}
	delete(s.late, key)
}

// requestToken is Cable. Like the client, it asks Allow before the connection is made, and again at the gate.
func (n *scenarioNode) requestToken(
	caller context.Context, client *cable.Client, r cable.TokenRequest,
) (token *cable.Token, err error) {
	if err := r.Allow(); err != nil {
		return nil, err
	}
	role, _, _ := strings.Cut(r.Scopes[0], ":")
	known := reflect.ValueOf(client).Elem()
	c := &history.Call{
		Node:         n.Node,
		Role:         role,
		Organization: r.OrganizationID,
		Scopes:       strings.Join(r.Scopes, ","),
		Key:          known.FieldByName("auth").FieldByName("text").Elem().String(),
		URL:          "https://" + known.FieldByName("url").Elem().FieldByName("Host").String() + "/token",
		Lifetime:     int(r.Lifetime / time.Second),
		Started:      n.now(),
		Gate:         history.Never,
	}
	c.Read, _ = caller.Value(contextKey{}).(*history.Read)
	c.Tries, _ = caller.Value(contextKey{}).(*history.Change)
	defer func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		if c.Ended = n.now(); err != nil {
			c.Err = err.Error()
		}
		if !errors.Is(err, outcome.ErrChanged) || c.Gate != history.Never {
			n.history.Calls = append(n.history.Calls, c)
		}
	}()
	random, weather := n.random("cable"+c.Scopes), n.weather("Cable")
	takes := choose(weather, 100*time.Millisecond, time.Second, 3*time.Second, 3*time.Second, 30*time.Second)
	ctx, cancel := context.WithDeadline(caller, r.Start.Add(cable.DefaultTimeout))
	defer cancel()
	failed := func(e cable.Error) error {
		e.Attempts, e.MaybeIssued = 1, c.MayBeIssued
		if caller.Err() != nil {
			e = cable.Error{Kind: cable.Canceled, Attempts: 1, MaybeIssued: c.MayBeIssued}
		} else if ctx.Err() != nil {
			e = cable.Error{Kind: cable.TimedOut, Attempts: 1, MaybeIssued: c.MayBeIssued}
		}
		return &e
	}
	sentAt, isDown := time.Now(), weather >= 8 && random.IntN(3) > 0
	if !pass(ctx, maybe(random, 2, takes)) || isDown && random.IntN(3) == 0 {
		return nil, failed(cable.Error{Kind: cable.Unreachable})
	}
	if err := r.Allow(); err != nil {
		return nil, err
	}
	c.Gate = n.now()
	status := http.StatusOK
	if isDown || random.IntN(16) == 0 {
		status = choose(random.IntN(5), 200, 500, 503, 429, 401)
	}
	c.MayBeIssued = status == 200 || status >= 500
	if !pass(ctx, upTo(random, takes)) || status != 200 {
		e := cable.Error{Kind: cable.Responded, StatusCode: status}
		if status == 429 {
			e.RetryAfter = 5 * time.Second
		}
		return nil, failed(e)
	}
	if isDown || random.IntN(16) == 0 { // the response is lost
		return nil, failed(cable.Error{Kind: cable.Unreachable})
	}
	shorter, asked := 40+random.IntN(200), c.Lifetime
	c.Granted = choose(random.IntN(6), shorter, asked+1000, asked, asked, asked, asked)
	now := time.Now()
	n.mu.Lock()
	c.Token = fmt.Sprint("token-", len(n.tokens))
	n.tokens[c.Token] = c
	n.mu.Unlock()
	token = &cable.Token{
		Value: cable.NewSecret(c.Token), Expiry: now.Unix() + int64(c.Granted), OrganizationID: r.OrganizationID,
		Date: now.Truncate(time.Second), SentAt: sentAt, ReceivedAt: now, Attempts: 1,
	}
	if random.IntN(20) == 0 {
		token.Scopes = slices.Concat(r.Scopes, []string{"more:than"}) // the engine refuses it
	}
	return token, nil
}
