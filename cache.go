// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cablesecrets

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
)

// What is kept in memory of what is stored, and its rules:
//
//   - An entry is kept from its first use until it is written, deleted or
//     invalidated. What was read before a change is not kept after it.
//   - The generation counts the changes. A token request notes the generation
//     that it read its settings in, and reads them again if there is another
//     before it calls Cable, or when the token arrives.
//   - A storage write that failed may have been committed all the same, now or
//     later. Its entry is uncertain: it is not kept, and if the write would have
//     taken something away from readers, their token requests fail.

// maxCachedRoles bounds the memory that roles take: some MiB if a role names a
// handful of scopes.
const maxCachedRoles = 4096

// backend is one mount. Several run in one process, so nothing of a mount is
// kept outside of it.
type backend struct {
	*framework.Backend
	cache     *cache
	telemetry *telemetry

	maxLeaseTTL, defaultLeaseTTL leaseSetting

	ctx    context.Context // ends with the mount
	cancel context.CancelFunc

	requestToken func(context.Context, *cable.Client, cable.TokenRequest) (*cable.Token, error) // another one in tests
}

// cache is what a mount keeps in memory of its stored entries.
type cache struct {
	// observe is called for each API call, dropped for each shared token that is
	// dropped, with the number of its readers.
	observe func(cable.Call)
	dropped func(readers int)

	// writes makes read, merge and store of an entry one step, by storage key.
	writes keyedMutex

	// mu guards the fields below. It is never held over a call to Vault or to
	// Cable.
	mu sync.Mutex

	// generation counts the changes of what is stored.
	generation uint64

	// live is the configuration in use, or nil until it is needed.
	live *liveConfig

	// roles are those that a token was requested for, up to maxCachedRoles.
	// Entries are never changed, only replaced.
	roles map[string]*roleEntry

	// shared has what the readers of roles with reuse_for share, up to
	// maxCachedRoles.
	shared map[string]*sharedRole

	// uncertain are the storage keys of entries whose last write failed, with
	// whether their token requests fail meanwhile. keepsRoles turns false if they
	// are too many to remember.
	uncertain  map[string]bool
	keepsRoles bool

	// pause is that of the last client, with a hash of the key and URL that it
	// applies to: a new client for the same ones inherits it.
	pause    *cable.Pause
	pauseFor [sha256.Size]byte

	// timeout is the last known request_timeout, for the time until it is read.
	timeout time.Duration
}

// liveConfig is a stored configuration with the client made from it. It is
// never changed, only replaced.
type liveConfig struct {
	*configEntry
	client *cable.Client
}

// newCache returns an empty cache.
func newCache(observe func(cable.Call), dropped func(readers int)) *cache {
	return &cache{
		observe: observe, dropped: dropped, shared: make(map[string]*sharedRole), roles: make(map[string]*roleEntry), uncertain: make(map[string]bool), keepsRoles: true,
		timeout: maxRequestTimeout * time.Second,
	}
}

// isCurrent reports whether nothing was changed since that generation.
func (c *cache) isCurrent(generation uint64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.generation == generation
}

// now returns the present generation and the last known request_timeout.
func (c *cache) now() (generation uint64, timeout time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.generation, c.timeout
}

// config returns the configuration in use, building its client on first use and
// after a change; nil if none is stored.
func (c *cache) config(ctx context.Context, s logical.Storage) (*liveConfig, error) {
	c.mu.Lock()
	live, generation, uncertain := c.live, c.generation, c.uncertainLocked(configStoragePath)
	c.mu.Unlock()
	if live != nil || uncertain != nil {
		return live, uncertain
	}
	entry, err := getConfig(ctx, s)
	if entry == nil || err != nil {
		return nil, err
	}
	live, err = c.newLive(entry, c.inheritedPause(entry), c.observe)
	if err != nil {
		return nil, fmt.Errorf("using the stored configuration: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.generation != generation {
		live.client.Close() // for this one request: the configuration was changed meanwhile
		return live, nil
	}
	if c.live != nil {
		live.client.Close() // another request built it meanwhile
		return c.live, nil
	}
	c.pause, c.pauseFor = live.client.Pause(), pauseTarget(entry)
	c.timeout = entry.timeout()
	if _, isUncertain := c.uncertain[configStoragePath]; isUncertain {
		live.client.Close() // for this one request
	} else {
		c.live = live
	}
	return live, nil
}

// newLive makes a client for an entry, without using it yet.
func (c *cache) newLive(entry *configEntry, pause *cable.Pause, observe func(cable.Call)) (*liveConfig, error) {
	clientConfig := entry.clientConfig()
	clientConfig.Observe, clientConfig.Pause = observe, pause
	client, err := cable.New(clientConfig)
	if err != nil {
		return nil, err
	}
	return &liveConfig{configEntry: entry, client: client}, nil
}

// inheritedPause returns the pause of the last client, or nil if that was for
// another key or URL.
func (c *cache) inheritedPause(entry *configEntry) *cable.Pause {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pauseFor != pauseTarget(entry) {
		return nil
	}
	return c.pause
}

// pauseTarget hashes what a pause applies to: the refresh key must not stay in
// memory for it.
func pauseTarget(entry *configEntry) [sha256.Size]byte {
	return sha256.Sum256([]byte(entry.TokenURL + "\x00" + entry.RefreshKey.Reveal()))
}

// role returns the role, from memory or storage; nil if there is none.
func (c *cache) role(ctx context.Context, s logical.Storage, name string) (*roleEntry, error) {
	key := rolesStoragePrefix + name
	c.mu.Lock()
	role, generation, uncertain := c.roles[name], c.generation, c.uncertainLocked(key)
	c.mu.Unlock()
	if role != nil || uncertain != nil {
		return role, uncertain
	}
	role, err := getRole(ctx, s, name)
	if role == nil || err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, isUncertain := c.uncertain[key]; c.generation == generation && !isUncertain && c.keepsRoles {
		if known := c.roles[name]; known != nil {
			return known, nil // another request read it meanwhile, and its readers share a token
		}
		if len(c.roles) >= maxCachedRoles {
			clear(c.roles)
		}
		c.roles[name] = role
	}
	return role, nil
}

// settings returns the configuration and the role, with the generation that they
// are of, if both are in memory. What is kept there is certain.
func (c *cache) settings(name string) (set settings, generation uint64, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	set = settings{c.live, c.roles[name]}
	return set, c.generation, set.config != nil && set.role != nil
}

// uncertainLocked returns the error of an entry whose token requests fail. The
// caller holds mu.
func (c *cache) uncertainLocked(key string) error {
	if !c.uncertain[key] {
		return nil
	}
	what := "config"
	if name, ok := roleOfKey(key); ok {
		what = "role " + show(nameShape, name)
	}
	return fmt.Errorf("the last write of %s failed in Vault's storage, and whether it was stored is not known: write it again", what)
}

// isCertain reports whether the last write of an entry did not fail.
func (c *cache) isCertain(key string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, isUncertain := c.uncertain[key]
	return !isUncertain
}

// write has an entry stored or deleted by put. narrows says that this takes
// something away from readers.
func (c *cache) write(ctx context.Context, key string, narrows bool, put func() error) error {
	stored := false
	defer func() { // if put panics, too
		c.mu.Lock()
		defer c.mu.Unlock()
		c.dropLocked(key)
		switch _, isUncertain := c.uncertain[key]; {
		case stored:
			delete(c.uncertain, key)
		case narrows || isUncertain || key == configStoragePath || len(c.uncertain) < maxCachedRoles:
			c.uncertain[key] = c.uncertain[key] || narrows
		default:
			c.keepsRoles = false
			clear(c.roles)
		}
	}()
	_, err := within(ctx, func() (any, error) { return nil, put() })
	stored = err == nil
	return err
}

// invalidate drops an entry that another node has changed.
func (c *cache) invalidate(key string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.uncertain, key)
	c.dropLocked(key)
}

// dropLocked drops what was built from an entry; the next request reads it
// again. The caller holds mu.
func (c *cache) dropLocked(key string) {
	c.generation++
	if key == configStoragePath {
		if c.live != nil {
			c.live.client.Close()
			c.live = nil
		}
		for _, s := range c.shared {
			s.retire()
		}
		clear(c.shared)
	}
	if name, ok := roleOfKey(key); ok {
		delete(c.roles, name)
		if s := c.shared[name]; s != nil {
			s.retire()
			delete(c.shared, name)
		}
	}
}

// sharedRole returns what the readers of a role share that read these settings
// in this generation; nil if these are not kept, or there are too many roles.
func (c *cache) sharedRole(name string, set settings, generation uint64) *sharedRole {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.generation != generation {
		return nil // this reader mints alone, with what it read
	}
	s := c.shared[name]
	if s == nil && c.live == set.config && c.roles[name] == set.role && len(c.shared) < maxCachedRoles {
		s = &sharedRole{settings: set, dropped: c.dropped}
		c.shared[name] = s
	}
	return s
}

// rolesDown returns the roles whose readers get the previous token because Cable
// is down, with the outcome of their last call.
func (c *cache) rolesDown() map[string]any {
	c.mu.Lock()
	defer c.mu.Unlock()
	down := make(map[string]any)
	for name, s := range c.shared {
		if o := s.isDown(); o != "" {
			down[name] = string(o)
		}
	}
	return down
}

// keyedMutex is a mutex for each key.
type keyedMutex struct {
	mu   sync.Mutex
	held map[string]*heldKey
}

// heldKey is a mutex that is held or waited for.
type heldKey struct {
	token chan struct{} // full while it is held
	users int           // that hold it or wait for it
}

// lock waits for the mutex of key, but not longer than the caller does.
func (m *keyedMutex) lock(ctx context.Context, key string) (unlock func(), err error) {
	m.mu.Lock()
	if m.held == nil {
		m.held = make(map[string]*heldKey)
	}
	h := m.held[key]
	if h == nil {
		h = &heldKey{token: make(chan struct{}, 1)}
		m.held[key] = h
	}
	h.users++
	m.mu.Unlock()
	leave := func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		if h.users--; h.users == 0 {
			delete(m.held, key)
		}
	}
	select {
	case h.token <- struct{}{}:
		return func() { <-h.token; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, fmt.Errorf("waiting for another write of the same entry: %w", context.Cause(ctx))
	}
}

// leaseSettingPatience is how long requests wait for a call to Vault that began
// before they needed its result, before the next one is made.
const leaseSettingPatience = time.Second

// leaseSetting is one of the mount's lease settings. It is read from Vault for
// each request, because tuning a mount takes effect at the next one, but by one
// call for all that wait: those that come while a call is under way, which may
// have read the setting before they came, wait for the next call.
type leaseSetting struct {
	read func() time.Duration

	mu     sync.Mutex
	reader *leaseSettingReader // at work, or nil
	next   *leaseSettingCall   // not begun yet; nil if nobody waits
}

// leaseSettingReader makes calls for as long as there are requests that wait.
type leaseSettingReader struct{ began time.Time } // its last call

// leaseSettingCall is one call to Vault.
type leaseSettingCall struct {
	done     chan struct{} // closed when what follows is set
	ttl      time.Duration
	panicked *panicked
}

// get returns the setting as it is now, in seconds. It waits until ctx ends at
// most, and panics if the call did.
func (s *leaseSetting) get(ctx context.Context) (int64, error) {
	s.mu.Lock()
	if s.next == nil {
		s.next = &leaseSettingCall{done: make(chan struct{})}
	}
	call := s.next
	if s.reader == nil || time.Since(s.reader.began) > leaseSettingPatience {
		s.reader = &leaseSettingReader{began: time.Now()}
		go s.run(s.reader)
	}
	s.mu.Unlock()
	select {
	case <-call.done:
		if call.panicked != nil {
			panic(call.panicked)
		}
		return int64(call.ttl / time.Second), nil
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
}

// run makes calls until nobody waits, or another reader has taken over.
func (s *leaseSetting) run(me *leaseSettingReader) {
	for {
		s.mu.Lock()
		call := s.next
		if s.reader != me {
			s.mu.Unlock()
			return
		}
		if call == nil {
			s.reader = nil
			s.mu.Unlock()
			return
		}
		s.next, me.began = nil, time.Now()
		s.mu.Unlock()
		call.make(s.read)
	}
}

// make makes the call. A panic becomes that of those who wait.
func (c *leaseSettingCall) make(read func() time.Duration) {
	defer func() {
		if value := recover(); value != nil {
			c.panicked = &panicked{value: value, stack: debug.Stack()}
		}
		close(c.done)
	}()
	c.ttl = read()
}

// replicationStateMaxAge is how long a node's replication state is used, and
// how long it is waited for.
const replicationStateMaxAge = time.Second

// systemView remembers the replication state for a second. The framework asks
// for it on each request, which is a call to Vault; a mount is set up again
// when a node becomes or ceases to be a performance standby, and a write on a
// node that has just become a secondary is refused by its storage.
//
// NOTE: lease settings are not remembered: tuning a mount takes effect at the
// next read.
type systemView struct {
	logical.SystemView

	mu     sync.Mutex
	state  consts.ReplicationState
	readAt time.Time
}

// errNoState stands for a state that Vault did not report.
var errNoState = errors.New("no replication state")

// ReplicationState implements [logical.SystemView]. If Vault does not report it,
// which the SDK returns as ReplicationUnknown, or not in time, it is the last
// known one.
func (s *systemView) ReplicationState() consts.ReplicationState {
	s.mu.Lock()
	last, readAt := s.state, s.readAt
	s.mu.Unlock()
	if last != consts.ReplicationUnknown && time.Since(readAt) < replicationStateMaxAge {
		return last
	}
	ctx, cancel := context.WithTimeout(context.Background(), replicationStateMaxAge)
	defer cancel()
	now := time.Now()
	state, err := within(ctx, func() (consts.ReplicationState, error) {
		if state := s.SystemView.ReplicationState(); state != consts.ReplicationUnknown {
			return state, nil
		}
		return consts.ReplicationUnknown, errNoState
	})
	if err != nil {
		return last
	}
	s.mu.Lock()
	s.state, s.readAt = state, now
	s.mu.Unlock()
	return state
}
