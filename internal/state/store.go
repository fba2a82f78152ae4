// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Package state has the stored entries of a mount, the configuration and the roles, and keeps them in memory. It
// promises that a token request is resolved with entries that are current, and can tell whether they still are.
//
//   - An entry is kept from its first use until it is written, deleted or invalidated. A read that began before a
//     change is never kept after it.
//   - Each change gives its entry a new number, from one counter that only rises. [Settings] remember the numbers of
//     both entries, and [Store.IsCurrent] compares them as a pair under one lock. So a write of a role disturbs the
//     requests of that role alone.
//   - Once it has begun to store, a write does not depend on its caller; see [Entry.Write].
//   - A write that failed in Vault's storage may be committed all the same, at once or later. Until a later write, an
//     invalidation or a new set-up settles that, the entry is uncertain. It is then read from storage for each request,
//     and if its bytes are those in memory, it is the entry in memory. If the write would have disabled, deleted or
//     narrowed the entry, its token requests fail.
package state

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/fields"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/mount"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/outcome"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/version"
)

// maxRoles bounds the roles that are kept in memory, and the names of those whose last write failed. That takes some
// MiB if a role names a handful of scopes.
const maxRoles = 4096

// Live is a stored configuration with the client made from it. It is never changed, only replaced.
type Live struct {
	*Config
	Client *cable.Client
}

// Settings are the configuration and the role that a token request uses, or nil for an entry that is not stored. They
// are never changed.
type Settings struct {
	Config *Live
	Role   *Role

	// Version identifies the pair of entries.
	Version Version
	key     string // of the role
}

// Version has the numbers of the last change of the configuration and of a role.
type Version struct{ config, role uint64 }

// IsBefore reports whether v is older than the other version of the same role.
func (v Version) IsBefore(other Version) bool { return v.config < other.config || v.role < other.role }

// Store keeps a mount's entries in memory.
type Store struct {
	ctx    context.Context // ends with the mount
	cancel context.CancelFunc

	// observe is called after each API call. changed is called with the name of a role after each change of it, and
	// with "" after a change of the configuration; it must not call the Store.
	observe func(cable.Call)
	changed func(role string)

	locks keyedMutex // serializes read, merge and store, by storage key

	// mu guards the fields below. It is never held over a call to Vault or to Cable.
	mu sync.Mutex

	counter uint64 // the number of the last change of any entry

	// floor is the number of a role that has no record. Evicting a record raises it, so that a role created again is
	// never taken for the old one.
	floor uint64

	config record
	roles  *simplelru.LRU[string, *record] // by storage key

	// narrowed has the storage keys of entries whose last write failed and would have disabled, deleted or narrowed
	// them. It is never cut short. Its size is bounded all the same, because such a write needs an entry that exists.
	narrowed map[string]bool

	// uncertain has the storage keys of the other entries whose last write failed. If these are too many, it is nil,
	// and each entry without a certain record is read for each request.
	uncertain map[string]bool

	// pause is the last client's pause, and pauseFor a hash of its key and URL. A new client with the same key and URL
	// inherits it.
	pause    *cable.Pause
	pauseFor [sha256.Size]byte

	// timeout is the last known request_timeout, used until the configuration has been read.
	timeout time.Duration
}

// record is an entry in memory.
type record struct {
	number  uint64            // of its last change
	value   any               // a *Live or a *Role, nil until it is needed
	sum     [sha256.Size]byte // of the bytes that value was decoded from
	certain bool              // its last write did not fail
}

// New returns an empty Store. See Store for observe and changed.
func New(observe func(cable.Call), changed func(role string)) *Store {
	s := &Store{
		observe:   observe,
		changed:   changed,
		narrowed:  make(map[string]bool),
		uncertain: make(map[string]bool),
		timeout:   MaxRequestTimeout,
		locks:     keyedMutex{held: make(map[string]chan struct{})},
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.config.certain = true
	s.roles, _ = simplelru.NewLRU(maxRoles, func(_ string, r *record) { // fails for a size of 0 only
		s.floor = max(s.floor, r.number)
	})
	return s
}

// Close ends the mount on this node. It cancels writes under way, waits for none of them, and drops the refresh key.
func (s *Store) Close() {
	s.cancel()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.changeLocked(ConfigKey, true)
}

// Settings returns the entries that a request of the role, received at that time, is resolved with. It returns by the
// end of the request's budget.
func (s *Store) Settings(
	ctx context.Context, storage logical.Storage, role string, received time.Time,
) (Settings, error) {
	key := RoleKey(role)
	s.mu.Lock()
	timeout := s.timeout
	config, known := s.knownLocked(ConfigKey)
	r, roleKnown := s.knownLocked(key)
	s.mu.Unlock()
	set := Settings{key: key, Version: Version{config.number, r.number}}
	set.Config, _ = config.value.(*Live)
	set.Role, _ = r.value.(*Role)
	if known && roleKnown {
		return set, nil
	}
	var err error
	configCtx, cancel := WithBudget(ctx, received, timeout)
	defer cancel()
	if set.Config, set.Version.config, err = loadAs[*Live](configCtx, s, storage, ConfigKey); err != nil {
		return set, err
	}
	if set.Config != nil {
		timeout = set.Config.RequestTimeout
	}
	roleCtx, cancel := WithBudget(ctx, received, timeout)
	defer cancel()
	set.Role, set.Version.role, err = loadAs[*Role](roleCtx, s, storage, key)
	return set, err
}

// ConfigVersion returns the version of the configuration, or an error if its token requests fail.
func (s *Store) ConfigVersion() (Version, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Version{config: s.config.number}, s.narrowedLocked(ConfigKey)
}

// RoleSettings returns the settings without the configuration, to try another one, which was derived from bytes that
// were read since the configuration had that version.
func (s *Store) RoleSettings(
	ctx context.Context, storage logical.Storage, role string, since Version,
) (set Settings, err error) {
	set = Settings{key: RoleKey(role), Version: since}
	set.Role, set.Version.role, err = loadAs[*Role](ctx, s, storage, set.key)
	return set, err
}

// WithBudget bounds ctx by a request's budget, which begins at its receipt.
func WithBudget(ctx context.Context, received time.Time, timeout time.Duration) (context.Context, context.CancelFunc) {
	return context.WithDeadlineCause(ctx, received.Add(timeout), outcome.ErrBudget)
}

// IsCurrent reports whether no entry of the settings has changed since.
func (s *Store) IsCurrent(set Settings) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.isCurrentLocked(set)
}

func (s *Store) isCurrentLocked(set Settings) bool {
	return set.Version == Version{s.config.number, s.findLocked(set.key).number}
}

// IsCertain reports whether the settings are current and neither entry is uncertain, so that storage need not be read.
func (s *Store) IsCertain(set Settings) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.isCurrentLocked(set) && s.isCertainLocked(ConfigKey) && s.isCertainLocked(set.key)
}

// Config returns the configuration in use, or nil if none is stored.
func (s *Store) Config(ctx context.Context, storage logical.Storage) (*Live, error) {
	live, _, err := loadAs[*Live](ctx, s, storage, ConfigKey)
	return live, err
}

// Role returns the role, from memory or storage, or nil if there is none.
func (s *Store) Role(ctx context.Context, storage logical.Storage, name string) (*Role, error) {
	role, _, err := loadAs[*Role](ctx, s, storage, RoleKey(name))
	return role, err
}

// NewLive makes a client for a configuration, without using it yet.
func NewLive(c *Config, pause *cable.Pause, observe func(cable.Call)) (*Live, error) {
	client, err := cable.New(cable.Config{
		RefreshKey: c.RefreshKey,
		TokenURL:   c.TokenURL,
		Bearer:     c.AuthScheme == AuthSchemeBearer,
		CACert:     c.CACert,
		Timeout:    c.RequestTimeout,
		UserAgent:  "vault-plugin-secrets-cable/" + version.String(),
		Observe:    observe,
		Pause:      pause,
	})
	if err != nil {
		return nil, err
	}
	return &Live{Config: c, Client: client}, nil
}

// InheritedPause returns the pause of the last client, or nil if that client was for another key or URL, because a
// pause belongs to one refresh key at one URL.
func (s *Store) InheritedPause(c *Config) *cable.Pause {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pauseFor != pauseTarget(c) {
		return nil
	}
	return s.pause
}

// pauseTarget hashes the key and URL that a pause applies to, because the refresh key must not stay in memory for it.
func pauseTarget(c *Config) [sha256.Size]byte {
	return sha256.Sum256([]byte(c.TokenURL + "\x00" + c.RefreshKey.Reveal()))
}

// loadAs returns an entry from memory or storage, nil if there is none, and its number.
func loadAs[T *Live | *Role](ctx context.Context, s *Store, storage logical.Storage, key string) (T, uint64, error) {
	value, number, err := s.load(ctx, storage, key)
	entry, _ := value.(T)
	return entry, number, err
}

// load returns an entry and its number. It reads storage unless a certain value is in memory. A value whose bytes are
// those in memory is the value in memory; any other replaces that, unless the entry was changed since the read began.
func (s *Store) load(ctx context.Context, storage logical.Storage, key string) (any, uint64, error) {
	s.mu.Lock()
	before, known := s.knownLocked(key)
	err := cmp.Or(s.endedLocked(), s.narrowedLocked(key))
	s.mu.Unlock()
	if err != nil || known {
		return before.value, before.number, err
	}
	raw, err := Read(ctx, storage, key)
	if err != nil {
		return nil, before.number, err
	}
	sum := sha256.Sum256(raw)
	if raw != nil && before.value != nil && before.sum == sum {
		return before.value, before.number, nil
	}
	var value any
	if raw != nil {
		if value, err = s.decode(key, raw); err != nil {
			return nil, before.number, err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.findLocked(key)
	switch {
	case raw == nil && r.value == nil: // there is none
	case r.number != before.number: // only for this request, which will find that it is outdated
		discard(value)
	case raw != nil && r.value != nil && r.sum == sum: // another request has read the same bytes
		discard(value)
		return r.value, r.number, nil
	default:
		if r.value != nil { // an uncertain entry turned out to be changed
			discard(r.value)
			s.changeLocked(key, false)
		}
		r.value, r.sum = value, sum
		s.keepLocked(key, r)
		return value, r.number, nil
	}
	return value, before.number, nil
}

// decode makes the value of an entry from its bytes. That of the configuration has a client.
func (s *Store) decode(key string, raw []byte) (any, error) {
	if name, ok := RoleName(key); ok {
		return DecodeRole(name, raw)
	}
	c, err := DecodeConfig(raw)
	if err != nil {
		return nil, err
	}
	live, err := NewLive(c, s.InheritedPause(c), s.observe)
	if err != nil {
		return nil, fmt.Errorf("using the stored configuration: %w", err)
	}
	return live, nil
}

// discard closes the client of a configuration that is replaced or not kept.
func discard(value any) {
	if live, ok := value.(*Live); ok {
		live.Client.Close()
	}
}

// findLocked returns the record of an entry. A new one is not kept yet, because names of roles that do not exist must
// not displace others. The caller holds mu.
func (s *Store) findLocked(key string) *record {
	if key == ConfigKey {
		return &s.config
	}
	if r, ok := s.roles.Get(key); ok {
		return r
	}
	return &record{number: s.floor, certain: s.uncertain != nil && !s.uncertain[key]}
}

// keepLocked keeps the record of an entry. The caller holds mu.
func (s *Store) keepLocked(key string, r *record) {
	if key != ConfigKey {
		s.roles.Add(key, r)
	} else if live, ok := r.value.(*Live); ok {
		s.pause, s.pauseFor, s.timeout = live.Client.Pause(), pauseTarget(live.Config), live.RequestTimeout
	}
}

// knownLocked returns the record of an entry, and whether it is current without a read of storage. The caller holds mu.
func (s *Store) knownLocked(key string) (r record, known bool) {
	r = *s.findLocked(key)
	return r, r.value != nil && s.isCertainLocked(key)
}

// isCertainLocked reports whether the last write of an entry did not fail. The caller holds mu.
func (s *Store) isCertainLocked(key string) bool {
	return !s.narrowed[key] && s.findLocked(key).certain
}

// narrowedLocked returns the error for token requests of an entry if its last write failed and would have taken
// something away from readers. The caller holds mu.
func (s *Store) narrowedLocked(key string) error {
	if !s.narrowed[key] {
		return nil
	}
	return fmt.Errorf("the last write of %s failed in Vault's storage, and whether it was stored is not known: "+
		"write it again", describe(key))
}

// endedLocked returns the error for token requests that are under way when the mount ends on this node. A role in
// memory may be outdated by then, and Vault would drop the token. The caller holds mu.
func (s *Store) endedLocked() error {
	if s.ctx.Err() == nil {
		return nil
	}
	return fmt.Errorf("the mount has ended on this node: %w", s.ctx.Err())
}

// describe names an entry in a sentence.
func describe(key string) string {
	if name, ok := RoleName(key); ok {
		return "role " + fields.RoleName.Quote(name)
	}
	return key
}

// Uncertain returns the storage keys of the entries whose last write failed, sorted. "roles/*" stands for the roles if
// too many writes failed to know each. The names of roles are redacted if needed.
func (s *Store) Uncertain() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	keys := slices.AppendSeq([]string{}, maps.Keys(s.uncertain)) // a list, even if it is empty
	keys = slices.AppendSeq(keys, maps.Keys(s.narrowed))
	if s.uncertain == nil {
		keys = append(keys, RoleKey("*"))
	}
	if !s.config.certain {
		keys = append(keys, ConfigKey)
	}
	for i, key := range keys {
		if name, ok := RoleName(key); ok && name != "*" {
			keys[i] = RoleKey(fields.RoleName.Redact(name))
		}
	}
	slices.Sort(keys)
	return slices.Compact(keys)
}

// Invalidate drops an entry that another node has changed.
func (s *Store) Invalidate(key string) {
	if _, isRole := RoleName(key); !isRole && key != ConfigKey {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.settleLocked(key)
}

// writeFailed notes that a write of an entry failed, which drops the entry's shared token.
func (s *Store) writeFailed(key string, narrows bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.changeLocked(key, false).certain = false
	switch {
	case narrows:
		s.narrowed[key] = true
	case s.uncertain != nil:
		if s.uncertain[key] = true; len(s.uncertain) > maxRoles {
			s.uncertain = nil // too many, so only the records tell which entries are certain
		}
	}
}

// settleLocked notes that an entry has changed and is certain. The caller holds mu.
func (s *Store) settleLocked(key string) {
	delete(s.narrowed, key)
	delete(s.uncertain, key)
	s.changeLocked(key, true).certain = true
}

// changeLocked gives an entry a new number, and drops its value from memory if drop is true. The caller holds mu.
func (s *Store) changeLocked(key string, drop bool) *record {
	s.counter++
	r := s.findLocked(key)
	r.number = s.counter
	if drop {
		discard(r.value)
		r.value = nil
	}
	s.keepLocked(key, r)
	name, _ := RoleName(key)
	s.changed(name)
	return r
}

const (
	writeTimeout = 10 * time.Second // of a write, from when it begins to store
	lockTimeout  = 10 * time.Second // of the wait for another write of the same entry

	errLockTimeout  = outcome.Timeout("it has not ended within 10s; nothing was stored, try again")
	errWriteTimeout = outcome.Timeout("Vault's storage did not respond to the write within 10s, " +
		"and whether it was stored is not known: write it again")
)

var errClosed = errors.New("the mount was closed during the write")

// keyedMutex is a mutex per key.
type keyedMutex struct {
	mu   sync.Mutex
	held map[string]chan struct{} // closed when the mutex is unlocked
}

// lock waits for the mutex of key, no longer than ctx lasts.
func (m *keyedMutex) lock(ctx context.Context, key string) (unlock func(), err error) {
	for {
		m.mu.Lock()
		held, isHeld := m.held[key]
		if !isHeld {
			mine := make(chan struct{})
			m.held[key] = mine
			m.mu.Unlock()
			return func() {
				m.mu.Lock()
				defer m.mu.Unlock()
				delete(m.held, key)
				close(mine)
			}, nil
		}
		m.mu.Unlock()
		select {
		case <-held:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// Entry is a stored entry under its lock, which makes read, merge and store one step.
type Entry struct {
	store   *Store
	storage logical.Storage
	key     string
	release func()
	written chan struct{} // closed unless a storage call is under way
}

// Lock locks an entry by its storage key. It fails after 10 s, or when the caller leaves.
func (s *Store) Lock(ctx context.Context, storage logical.Storage, key string) (*Entry, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, lockTimeout, errLockTimeout)
	defer cancel()
	release, err := s.locks.lock(ctx, key)
	if err != nil {
		return nil, fmt.Errorf("waiting for another write of %s: %w", describe(key), err)
	}
	e := &Entry{store: s, storage: storage, key: key, release: release, written: make(chan struct{})}
	close(e.written)
	return e, nil
}

// Unlock ends the lock, once the storage call of a write has returned.
func (e *Entry) Unlock() {
	select {
	case <-e.written:
		e.release()
	default:
		go func() {
			<-e.written
			e.release()
		}()
	}
}

// Read returns the entry's bytes, nil if it is not stored.
func (e *Entry) Read(ctx context.Context) ([]byte, error) { return Read(ctx, e.storage, e.key) }

// IsCertain reports whether the last write of the entry did not fail.
func (e *Entry) IsCertain() bool {
	e.store.mu.Lock()
	defer e.store.mu.Unlock()
	return e.store.isCertainLocked(e.key)
}

// Write stores raw, or deletes the entry if raw is nil. narrows says that the change takes something away from readers.
//
// The write does not depend on its caller. It has a context of its own, which ends after 10 s or with the mount. If
// storage has not responded by then, the write has failed, until a late success of the same call settles it.
func (e *Entry) Write(ctx context.Context, raw []byte, narrows bool) error {
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	defer time.AfterFunc(writeTimeout, func() { cancel(errWriteTimeout) }).Stop()
	defer context.AfterFunc(e.store.ctx, func() { cancel(errClosed) })()
	written := make(chan struct{})
	e.written = written
	var once sync.Once // a write fails once, and not after it has succeeded
	failed := func() { e.store.writeFailed(e.key, narrows) }
	_, err := mount.Call(ctx, func() (any, error) {
		stored := false
		defer close(written)
		defer func() {
			if !stored { // even if storage panics
				once.Do(failed)
				return
			}
			once.Do(func() {})
			e.store.Invalidate(e.key)
		}()
		var err error
		if raw == nil {
			err = e.storage.Delete(ctx, e.key)
		} else {
			err = e.storage.Put(ctx, &logical.StorageEntry{Key: e.key, Value: raw})
		}
		stored = err == nil
		return nil, err
	})
	once.Do(failed) // if the call was abandoned
	return err
}
