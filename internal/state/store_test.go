// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package state

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"pgregory.net/rapid"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/mount"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/outcome"
)

// testStore is a Store over storage that counts reads and whose writes can fail. Its
// configuration and its role "ci" are stored.
type testStore struct {
	*Store
	logical.InmemStorage

	mu        sync.Mutex // guards reads, onWrite and changed
	reads     map[string]int
	onWrite   func(ctx context.Context, commit func() error) error // nil if it commits
	readDelay time.Duration
	late      []func() error // commits that an onWrite postponed
	changed   []string       // the arguments of the Store's callback
}

var (
	errStorage = errors.New("context canceled") // bare text, as it crosses the plugin boundary
	errPanic   = errors.New("the write panicked")
)

func newTestStore(t testing.TB) *testStore {
	s := &testStore{reads: make(map[string]int)}
	s.Store = New(func(cable.Call) {}, func(role string) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.changed = append(s.changed, role)
	})
	t.Cleanup(s.Close)
	config := NewConfig()
	config.RefreshKey, config.OrganizationID = cable.NewSecret("REFRESHKEYCANARY"), "org_1"
	s.put(t, ConfigKey, config)
	s.put(t, RoleKey("ci"), newRole())
	return s
}

func newRole() *Role {
	return &Role{OrganizationIDs: []string{"org_3"}, Scopes: []string{"a:b", "c:d"}, MaxTTL: time.Hour}
}

// entry is a *Config or a *Role.
type entry interface{ Encode() ([]byte, error) }

// put stores an entry as another node does.
func (s *testStore) put(t testing.TB, key string, e entry) {
	t.Helper()
	raw, err := e.Encode()
	if err == nil {
		err = s.InmemStorage.Put(context.Background(), &logical.StorageEntry{Key: key, Value: raw})
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Get takes the time of readDelay after it has read.
func (s *testStore) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	s.mu.Lock()
	s.reads[key]++
	s.mu.Unlock()
	defer time.Sleep(s.readDelay)
	return s.InmemStorage.Get(ctx, key)
}

func (s *testStore) Put(ctx context.Context, e *logical.StorageEntry) error {
	return s.commit(ctx, func() error { return s.InmemStorage.Put(context.Background(), e) })
}

func (s *testStore) Delete(ctx context.Context, key string) error {
	return s.commit(ctx, func() error { return s.InmemStorage.Delete(context.Background(), key) })
}

// changes returns the names that the Store's callback was called with.
func (s *testStore) changes() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.changed)
}

// setOnWrite replaces the way in which storage writes.
func (s *testStore) setOnWrite(f func(ctx context.Context, commit func() error) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.onWrite = f
}

func (s *testStore) commit(ctx context.Context, commit func() error) error {
	s.mu.Lock()
	f := s.onWrite
	s.mu.Unlock()
	if f == nil {
		return commit()
	}
	return f(ctx, commit)
}

// readCount returns how often an entry was read since the last call.
func (s *testStore) readCount(key string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.reads[key]
	s.reads[key] = 0
	return n
}

// write writes an entry as a handler does, or deletes it if next is nil. It returns
// errPanic if storage panicked.
func (s *testStore) write(ctx context.Context, key string, next entry) (err error) {
	e, err := s.Lock(ctx, s, key)
	if err != nil {
		return err
	}
	defer e.Unlock()
	defer func() {
		if p, ok := recover().(*mount.Panic); ok && p.Value == any(errPanic) {
			err = errPanic
		}
	}()
	stored, err := e.Read(ctx)
	if err != nil {
		return err
	}
	var raw []byte
	if next != nil {
		if raw, err = next.Encode(); err != nil {
			return err
		}
	}
	return e.Write(ctx, raw, narrows(stored, next))
}

// narrows reports whether next, written in place of the stored bytes, takes something
// away from readers, as the handlers decide it.
func narrows(stored []byte, next entry) bool {
	switch next := next.(type) {
	case *Role:
		before, _ := DecodeRole("r", stored)
		return before.NarrowedBy(next)
	case *Config:
		before, _ := DecodeConfig(stored)
		return before.NarrowedBy(next)
	default:
		return stored != nil
	}
}

// get returns the settings of a role, as a token request gets them.
func (s *testStore) get(role string) (Settings, error) {
	return s.Settings(context.Background(), s, role, time.Now())
}

func (s *testStore) mustGet(t testing.TB, role string) Settings {
	t.Helper()
	set, err := s.get(role)
	if err != nil {
		t.Fatal(err)
	}
	if !s.IsCurrent(set) {
		t.Fatal("settings that were just read are outdated")
	}
	return set
}

// failures are the ways in which a write can fail. Each has its effect on storage
// when the write has returned, and after a minute.
var failures = map[string]struct {
	onWrite        func(s *testStore) func(ctx context.Context, commit func() error) error
	want           error
	took           time.Duration
	stored, settle bool // the entry is stored in the end; the write's own end settles it
}{
	"fails": {
		onWrite: func(*testStore) func(context.Context, func() error) error {
			return func(context.Context, func() error) error { return errStorage }
		},
		want: errStorage,
	},
	"fails, but is committed": {
		onWrite: func(*testStore) func(context.Context, func() error) error {
			return func(_ context.Context, commit func() error) error { return errors.Join(commit(), errStorage) }
		},
		want:   errStorage,
		stored: true,
	},
	"fails, and is committed later": {
		onWrite: func(s *testStore) func(context.Context, func() error) error {
			return func(_ context.Context, commit func() error) error {
				s.late = append(s.late, commit)
				return errStorage
			}
		},
		want:   errStorage,
		stored: true,
	},
	"hangs until its context ends": {
		onWrite: func(*testStore) func(context.Context, func() error) error {
			return func(ctx context.Context, _ func() error) error { <-ctx.Done(); return ctx.Err() }
		},
		want: errWriteTimeout,
		took: writeTimeout,
	},
	"ignores its context, and succeeds late": {
		onWrite: func(*testStore) func(context.Context, func() error) error {
			return func(_ context.Context, commit func() error) error { time.Sleep(15 * time.Second); return commit() }
		},
		want:   errWriteTimeout,
		took:   writeTimeout,
		stored: true,
		settle: true,
	},
	"ignores its context, and fails late": {
		onWrite: func(*testStore) func(context.Context, func() error) error {
			return func(context.Context, func() error) error { time.Sleep(15 * time.Second); return errStorage }
		},
		want: errWriteTimeout,
		took: writeTimeout,
	},
	"panics": {
		onWrite: func(*testStore) func(context.Context, func() error) error {
			return func(context.Context, func() error) error { panic(errPanic) }
		},
		want: errPanic,
	},
}

// changes are the writes of a role and of the configuration.
var changes = map[string]struct {
	key     string
	role    string // of the token requests
	next    func(Settings) entry
	narrows bool
	same    bool // the bytes that are stored already
}{
	"create a role":   {RoleKey("new"), "new", func(Settings) entry { return newRole() }, false, false},
	"create disabled": {RoleKey("new"), "new", func(Settings) entry { return &Role{Disabled: true} }, false, false},
	"rewrite a role":  {RoleKey("ci"), "ci", func(s Settings) entry { return s.Role }, false, true},
	"delete a role":   {RoleKey("ci"), "ci", func(Settings) entry { return nil }, true, false},
	"widen a role": {
		RoleKey("ci"), "ci", changeRole(func(r *Role) { r.Scopes = append(r.Scopes, "e:f") }), false, false,
	},
	"a longer limit": {RoleKey("ci"), "ci", changeRole(func(r *Role) { r.MaxTTL = 0 }), false, false},
	"another ttl":    {RoleKey("ci"), "ci", changeRole(func(r *Role) { r.TTL = time.Hour }), false, false},
	"disable a role": {RoleKey("ci"), "ci", changeRole(func(r *Role) { r.Disabled = true }), true, false},
	"take a scope":   {RoleKey("ci"), "ci", changeRole(func(r *Role) { r.Scopes = r.Scopes[:1] }), true, false},
	"take an organization": {
		RoleKey("ci"), "ci", changeRole(func(r *Role) { r.OrganizationIDs = nil }), true, false,
	},
	"a shorter limit": {RoleKey("ci"), "ci", changeRole(func(r *Role) { r.MaxTTL = time.Minute }), true, false},
	"another organization": {
		RoleKey("ci"), "ci", changeRole(func(r *Role) { r.OrganizationID = "org_2" }), true, false,
	},
	"rewrite config": {ConfigKey, "ci", func(s Settings) entry { return s.Config.Config }, false, true},
	"rotate the key": {
		ConfigKey, "ci", changeConfig(func(c *Config) { c.RefreshKey = cable.NewSecret("x") }), false, false,
	},
	"delete config":     {ConfigKey, "ci", func(Settings) entry { return nil }, true, false},
	"disable the mount": {ConfigKey, "ci", changeConfig(func(c *Config) { c.Disabled = true }), true, false},
	"config, another organization": {
		ConfigKey, "ci", changeConfig(func(c *Config) { c.OrganizationID = "org_2" }), true, false,
	},
	"another destination": {
		ConfigKey, "ci", changeConfig(func(c *Config) { c.TokenURL = "https://cable.example/t" }), true, false,
	},
}

func changeRole(f func(*Role)) func(Settings) entry {
	return func(s Settings) entry {
		next := *s.Role
		next.Scopes = slices.Clone(next.Scopes)
		f(&next)
		return &next
	}
}

func changeConfig(f func(*Config)) func(Settings) entry {
	return func(s Settings) entry {
		next := *s.Config.Config
		f(&next)
		return &next
	}
}

// TestFailedWrites checks each change with each failure. The entry is uncertain; token
// requests fail if the write narrows, and read storage otherwise; equal bytes are the
// same entry; a later write or an invalidation settles it, and so does a late success.
func TestFailedWrites(t *testing.T) {
	t.Parallel()
	for failure := range failures {
		for name := range changes {
			for _, settle := range []string{"write", "invalidation"} {
				t.Run(name+", "+failure+", "+settle, func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) { testFailedWrite(t, failure, name, settle) })
				})
			}
		}
	}
}

func testFailedWrite(t *testing.T, failure, change, settle string) {
	f, c := failures[failure], changes[change]
	s := newTestStore(t)
	before := s.mustGet(t, c.role)
	next := c.next(before)
	s.setOnWrite(f.onWrite(s))
	start := time.Now()
	err := s.write(t.Context(), c.key, next)
	if !errors.Is(err, f.want) || time.Since(start) != f.took {
		t.Fatalf("the write: %v after %s", err, time.Since(start))
	}
	synctest.Wait()
	s.setOnWrite(nil)
	s.readCount(c.key)

	// check makes two token requests.
	var set Settings
	check := func(isStored bool) {
		t.Helper()
		for range 2 {
			var err error
			set, err = s.get(c.role)
			since, trialErr := s.ConfigVersion()
			if trialErr == nil {
				_, trialErr = s.RoleSettings(t.Context(), s, c.role, since)
			}
			if c.narrows {
				if err == nil || !strings.Contains(err.Error(), "write it again") || trialErr == nil {
					t.Errorf("a token request, %v, or verify_role, %v, does not fail", err, trialErr)
				}
				continue
			}
			if err != nil || trialErr != nil {
				t.Fatal(err, trialErr)
			}
			sameEntry := before.Role == set.Role
			if c.key == ConfigKey {
				sameEntry = before.Config == set.Config
			}
			if sameEntry != (c.same || !isStored) {
				t.Errorf("the entry in memory is used: %t, the write is stored: %t", sameEntry, isStored)
			}
			if n := s.readCount(c.key); n < 1 || n > 2 {
				t.Errorf("storage was read %d times by a token request and verify_role", n)
			}
			if !s.IsCurrent(set) {
				t.Error("the settings are outdated at once")
			}
		}
		if !slices.Contains(s.Uncertain(), c.key) {
			t.Errorf("%s is not among %v", c.key, s.Uncertain())
		}
	}
	if s.IsCurrent(before) {
		t.Error("settings from before the write are still current")
	}
	check(f.stored && len(s.late) == 0 && !f.settle)
	for _, commit := range s.late {
		if err := commit(); err != nil {
			t.Fatal(err)
		}
	}
	n := len(s.changes())
	time.Sleep(time.Minute) // a hanging write ends
	synctest.Wait()
	if f.settle {
		n++
	}
	if len(s.changes()) != n {
		t.Errorf("the end of the storage call disturbed token requests: %q", s.changes()[n:])
	}
	if !f.settle {
		earlier := set
		check(f.stored)
		if len(s.late) > 0 && !c.same && !c.narrows && c.role == "ci" && s.IsCurrent(earlier) {
			t.Error("settings are current although a late commit was found")
		}
		switch settle {
		case "invalidation":
			s.Invalidate(c.key)
		default:
			if err := s.write(t.Context(), c.key, next); err != nil {
				t.Fatal(err)
			}
		}
	}
	set = s.mustGet(t, c.role)
	s.readCount(c.key)
	again := s.mustGet(t, c.role)
	isThere := set.Role != nil && set.Config != nil
	if isThere && (again.Role != set.Role || again.Config != set.Config || s.readCount(c.key) > 0) {
		t.Error("the settled entry is not served from memory")
	}
	if isDeleted := next == nil && (f.stored || settle == "write"); isThere == isDeleted && c.role == "ci" {
		t.Errorf("after the %s: %+v", settle, set)
	}
	if len(s.Uncertain()) > 0 || len(s.locks.held) > 0 {
		t.Errorf("uncertain: %v, %d locks are held", s.Uncertain(), len(s.locks.held))
	}
}

// TestIsCertain checks that settings are certain while they are current, unless the last write of either entry failed.
func TestIsCertain(t *testing.T) {
	t.Parallel()
	s := newTestStore(t)
	s.put(t, RoleKey("other"), newRole())
	check := func(want bool, set Settings, when string) {
		t.Helper()
		if got := s.IsCertain(set); got != want {
			t.Errorf("%s: certain %t", when, got)
		}
	}
	for _, key := range []string{RoleKey("ci"), ConfigKey, ConfigKey} {
		set := s.mustGet(t, "ci")
		check(true, set, "at first")
		s.setOnWrite(func(context.Context, func() error) error { return errStorage })
		next := map[string]entry{ConfigKey: set.Config.Config, RoleKey("ci"): set.Role}[key]
		for _, failing := range []string{RoleKey("other"), key} {
			if err := s.write(t.Context(), failing, next); !errors.Is(err, errStorage) {
				t.Fatal(err)
			}
			check(failing != key, s.mustGet(t, "ci"), "after a failed write of "+failing)
		}
		s.Invalidate(key)
		check(false, set, "outdated")
		check(true, s.mustGet(t, "ci"), "after the change of "+key)
		e, err := s.Lock(t.Context(), s, key)
		if err != nil {
			t.Fatalf("an entry that was locked: %v", err)
		}
		e.Unlock() // without a write
	}
}

// TestUncertainNames checks by which names errors and status show entries, and that other keys of storage are none.
func TestUncertainNames(t *testing.T) {
	t.Parallel()
	s := newTestStore(t)
	n := len(s.changes())
	if s.Invalidate("salt"); len(s.changes()) > n {
		t.Error("another key of storage changes an entry")
	}
	const secret = "9f8b7c6d5e4a3b2c1d0e9f8b7c6d5e4a"
	for _, key := range []string{ConfigKey, RoleKey("ci"), RoleKey(secret)} {
		s.writeFailed(key, true)
	}
	if got := s.Uncertain(); !slices.Equal(got, []string{ConfigKey, "roles/(not shown: length 32)", "roles/ci"}) {
		t.Errorf("uncertain: %q", got)
	}
	_, configErr := s.Config(t.Context(), s)
	_, roleErr := s.Role(t.Context(), s, "ci")
	_, secretErr := s.Role(t.Context(), s, secret)
	for name, err := range map[string]error{
		"config": configErr, `role "ci"`: roleErr, "role (not shown: length 32)": secretErr,
	} {
		if !strings.Contains(fmt.Sprint(err), "the last write of "+name+" failed") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestSettingsKeepToTheBudget checks that the first request's budget is the stored one as soon as that has been read.
func TestSettingsKeepToTheBudget(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newTestStore(t)
		config := NewConfig()
		config.RefreshKey, config.RequestTimeout = cable.NewSecret("k"), 4*time.Second
		s.put(t, ConfigKey, config)
		s.readDelay = 3 * time.Second
		start := time.Now()
		if set, err := s.get("ci"); !errors.Is(err, outcome.ErrBudget) || time.Since(start) != config.RequestTimeout {
			t.Errorf("%+v %v after %s", set, err, time.Since(start))
		}
		time.Sleep(s.readDelay)
	})
}

// oddStorage is storage that returns an entry, an error, or both, and whose lists are in no order.
type oddStorage struct {
	logical.InmemStorage
	entry *logical.StorageEntry
	err   error
}

func (s *oddStorage) Get(context.Context, string) (*logical.StorageEntry, error) {
	return s.entry, s.err
}

func (s *oddStorage) List(context.Context, string) ([]string, error) {
	return []string{"b", "a"}, s.err
}

// TestReads checks that an error of storage is returned as it is and never means that an entry is not stored, nor does
// an entry without a value.
func TestReads(t *testing.T) {
	t.Parallel()
	failing := &oddStorage{entry: &logical.StorageEntry{Value: []byte("{}")}, err: errStorage}
	raw, err := Read(t.Context(), failing, ConfigKey)
	_, configErr := ReadConfig(t.Context(), failing)
	_, roleErr := ReadRole(t.Context(), failing, "ci")
	_, listErr := RoleNames(t.Context(), failing)
	_, storeErr := newTestStore(t).Role(t.Context(), failing, "ci")
	errs := []error{err, configErr, roleErr, listErr, storeErr}
	if raw != nil || !slices.Equal(errs, slices.Repeat([]error{errStorage}, len(errs))) {
		t.Errorf("%q %v", raw, errs)
	}
	for _, text := range []string{"", "{", `{"scopes":"", "refresh_key":"k","token_url":"k"}`} {
		odd := &oddStorage{entry: &logical.StorageEntry{Value: []byte(text)}}
		role, roleErr := newTestStore(t).Role(t.Context(), odd, "ci")
		config, configErr := newTestStore(t).Config(t.Context(), odd)
		if roleErr == nil || configErr == nil {
			t.Errorf("%q is the role %+v and the configuration %+v", text, role, config)
		}
	}
	empty := &oddStorage{entry: new(logical.StorageEntry)}
	if raw, err := Read(t.Context(), empty, ConfigKey); raw == nil || err != nil {
		t.Errorf("an entry without a value: %q %v", raw, err)
	}
	if names, err := RoleNames(t.Context(), new(oddStorage)); !slices.Equal(names, []string{"a", "b"}) {
		t.Errorf("%q %v", names, err)
	}
}

// TestWriteDoesNotDependOnItsCaller checks that a write that has begun to store ends
// although its caller leaves, that its lock is held until the storage call has returned, and that
// another write of the entry waits for 10 s at most.
func TestWriteDoesNotDependOnItsCaller(t *testing.T) {
	t.Parallel()
	for _, takes := range []time.Duration{5 * time.Second, 25 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			s := newTestStore(t)
			before := s.mustGet(t, "ci")
			disabled := changeRole(func(r *Role) { r.Disabled = true })(before)
			s.setOnWrite(func(ctx context.Context, commit func() error) error {
				time.Sleep(takes)
				if takes < writeTimeout && ctx.Err() != nil {
					t.Error("the storage call was cancelled")
				}
				return commit()
			})
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- s.write(ctx, RoleKey("ci"), disabled) }()
			synctest.Wait()
			s.setOnWrite(nil)
			cancel()

			// The lock is held; other entries are not.
			if err := s.write(t.Context(), RoleKey("other"), newRole()); err != nil {
				t.Error(err)
			}
			left, leave := context.WithCancel(t.Context())
			time.AfterFunc(time.Second, leave)
			start := time.Now()
			err := s.write(left, RoleKey("ci"), newRole())
			if !errors.Is(err, context.Canceled) || time.Since(start) != time.Second {
				t.Errorf("a caller that leaves: %v after %s", err, time.Since(start))
			}
			start = time.Now()
			err = s.write(t.Context(), RoleKey("ci"), disabled)
			switch held := takes - time.Second; {
			case held < lockTimeout && (err != nil || time.Since(start) != held):
				t.Errorf("the next write: %v after %s", err, time.Since(start))
			case held >= lockTimeout && (!errors.Is(err, errLockTimeout) || time.Since(start) != lockTimeout):
				t.Errorf("the next write: %v after %s", err, time.Since(start))
			}
			var want error
			if takes > writeTimeout {
				want = errWriteTimeout
			}
			if err := <-done; !errors.Is(err, want) {
				t.Errorf("the write: %v", err)
			}
			time.Sleep(time.Minute)
			if set := s.mustGet(t, "ci"); !set.Role.Disabled || len(s.Uncertain()) > 0 {
				t.Errorf("after the write: %+v, uncertain: %v", set.Role, s.Uncertain())
			}
		})
	}
}

// TestClose checks that Close cancels the writes under way, waits for none of them, and
// drops the configuration.
func TestClose(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ended := newTestStore(t)
		ended.mustGet(t, "ci")
		ended.Close()
		if _, err := ended.get("ci"); !errors.Is(err, context.Canceled) {
			t.Errorf("a token request at the end of the mount: %v", err) // its role may be outdated
		}
		s := newTestStore(t)
		s.mustGet(t, "ci")
		s.setOnWrite(func(_ context.Context, commit func() error) error { time.Sleep(time.Hour); return commit() })
		done := make(chan error)
		go func() { done <- s.write(t.Context(), RoleKey("ci"), nil) }()
		synctest.Wait()
		start := time.Now()
		s.Close()
		if err := <-done; !errors.Is(err, errClosed) || time.Since(start) > 0 {
			t.Errorf("%v after %s", err, time.Since(start))
		}
		if s.config.value != nil {
			t.Error("the configuration is still in memory")
		}
		if _, err := s.get("ci"); err == nil {
			t.Error("a token request does not fail although the deletion may have been stored")
		}
		time.Sleep(2 * time.Hour)
	})
}

// TestNewLive checks in which form the client of a configuration sends the refresh key, and which configurations send
// it to the same destination.
func TestNewLive(t *testing.T) {
	t.Parallel()
	for scheme, want := range map[string]string{AuthSchemeRaw: "k", AuthSchemeBearer: "Bearer k"} {
		got := make(chan string, 1)
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			got <- r.Header.Get("Authorization")
			w.WriteHeader(http.StatusUnauthorized)
		}))
		defer server.Close()
		c := &Config{RefreshKey: cable.NewSecret("k"), TokenURL: server.URL, AuthScheme: scheme}
		live, err := NewLive(c, nil, func(cable.Call) {})
		if err != nil {
			t.Fatal(err)
		}
		_, _ = live.Client.RequestToken(t.Context(), cable.TokenRequest{Lifetime: cable.MinLifetime})
		if header := <-got; header != want {
			t.Errorf("%s: %q, want %q", scheme, header, want)
		}
		other := *c
		if other.CACert = "x"; c.SameDestination(&other) || !c.SameDestination(c) {
			t.Error("other certificates are the same destination, or the same ones are not")
		}
		if live, err := NewLive(&other, nil, nil); live != nil || err == nil {
			t.Errorf("a client with unreadable certificates: %+v %v", live, err)
		}
	}
}

// TestDeletedElsewhere checks that an uncertain role that another node has deleted is gone as soon as storage is read.
func TestDeletedElsewhere(t *testing.T) {
	t.Parallel()
	s := newTestStore(t)
	role := s.mustGet(t, "ci").Role
	s.setOnWrite(failures["fails"].onWrite(s))
	if err := s.write(t.Context(), RoleKey("ci"), role); err == nil {
		t.Fatal("the write did not fail")
	}
	before := s.mustGet(t, "ci")
	if err := s.InmemStorage.Delete(t.Context(), RoleKey("ci")); err != nil {
		t.Fatal(err)
	}
	if after, err := s.get("ci"); after.Role != nil || err != nil || s.IsCurrent(before) {
		t.Errorf("%+v %v, the earlier settings are current: %t", after.Role, err, s.IsCurrent(before))
	}
}

// TestClientIsKept checks that the client of an uncertain configuration, with its
// connections and its pause, is used as long as the stored bytes are the same, and is
// closed once they are others.
func TestClientIsKept(t *testing.T) {
	t.Parallel()
	states := make(chan http.ConnState, 10)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "60")
		w.WriteHeader(http.StatusTooManyRequests)
	}))
	server.Config.ConnState = func(_ net.Conn, state http.ConnState) { states <- state }
	server.Start()
	defer server.Close()
	s := newTestStore(t)
	toServer := changeConfig(func(c *Config) { c.TokenURL = server.URL })(s.mustGet(t, "ci"))
	if err := s.write(t.Context(), ConfigKey, toServer); err != nil {
		t.Fatal(err)
	}
	before := s.mustGet(t, "ci").Config
	request := cable.TokenRequest{OrganizationID: "o", Scopes: []string{"a:b"}, Lifetime: cable.MinLifetime}
	var ce *cable.Error
	if _, err := before.Client.RequestToken(t.Context(), request); !errors.As(err, &ce) || ce.StatusCode != 429 {
		t.Fatal(err)
	}
	s.setOnWrite(failures["fails, and is committed later"].onWrite(s))
	longer := changeConfig(func(c *Config) { c.RequestTimeout = time.Minute })(s.mustGet(t, "ci"))
	if err := s.write(t.Context(), ConfigKey, longer); err == nil {
		t.Fatal("the write did not fail")
	}
	for _, want := range []http.ConnState{http.StateNew, http.StateActive, http.StateIdle} {
		if got := <-states; got != want {
			t.Fatalf("the connection is %s, want %s", got, want)
		}
	}
	if s.mustGet(t, "ci").Config != before {
		t.Error("the client was replaced although the stored bytes are the same")
	}
	if err := s.late[0](); err != nil {
		t.Fatal(err)
	}
	after := s.mustGet(t, "ci").Config
	if after == before || after.RequestTimeout != time.Minute || s.mustGet(t, "ci").Config != after {
		t.Error("the client was not replaced once")
	}
	select {
	case got := <-states:
		if got != http.StateClosed {
			t.Errorf("the connection of the old client is %s", got)
		}
	case <-time.After(10 * time.Second): // an idle connection ends by itself after 30 s
		t.Error("the connection of the old client is open")
	}
	if after.Client.Pause() != before.Client.Pause() || after.Client.Pause().Remaining() <= 0 {
		t.Error("the pause is lost")
	}
	other := *after.Config
	other.RefreshKey = cable.NewSecret("another")
	if s.InheritedPause(&other) != nil {
		t.Error("another key inherits the pause")
	}
	s.setOnWrite(nil)
	if err := s.write(t.Context(), ConfigKey, &other); err != nil {
		t.Fatal(err)
	}
	client := s.mustGet(t, "ci").Config.Client
	if _, err := client.RequestToken(t.Context(), request); !errors.As(err, &ce) || ce.StatusCode != 429 {
		t.Fatal(err)
	}
	s.Invalidate(ConfigKey)
	for _, want := range []http.ConnState{http.StateNew, http.StateActive, http.StateIdle, http.StateClosed} {
		if got := <-states; got != want {
			t.Errorf("the connection of an invalidated client is %s, want %s", got, want)
		}
	}
}

// TestConcurrentReads checks that requests which read an entry at the same time use one
// entry, and that one which was read before a change is not kept.
func TestConcurrentReads(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(s *testStore, key string, next entry) error{
		"none":  func(*testStore, string, entry) error { return nil },
		"write": func(s *testStore, key string, next entry) error { return s.write(context.Background(), key, next) },
		"other node": func(s *testStore, key string, next entry) error {
			s.put(t, key, next)
			s.Invalidate(key)
			return nil
		},
	} {
		for _, c := range []string{"disable a role", "disable the mount"} {
			synctest.Test(t, func(t *testing.T) {
				s := newTestStore(t)
				key, next := changes[c].key, changes[c].next(s.mustGet(t, "ci"))
				s.Invalidate(key)
				s.readDelay = time.Second
				done := make(chan Settings)
				for range 2 {
					go func() {
						set, err := s.get("ci")
						if err != nil {
							t.Error(err)
						}
						done <- set
					}()
				}
				synctest.Wait()
				s.readDelay = 0
				if err := change(s, key, next); err != nil {
					t.Fatal(err)
				}
				a, b := <-done, <-done
				after := s.mustGet(t, "ci")
				isSame := a.Role == b.Role && a.Config == b.Config && after.Role == a.Role && after.Config == a.Config
				if isSame != (name == "none") {
					t.Errorf("%s, change %s: the requests use one entry: %t", c, name, isSame)
				}
				isDisabled := after.Role.Disabled || after.Config.Disabled
				if name != "none" && (s.IsCurrent(a) || s.IsCurrent(b) || !isDisabled) {
					t.Errorf("%s, change %s: what was read before is in use", c, name)
				}
			})
		}
	}
}

// TestManyFailedCreates checks that thousands of failed creates take bounded memory,
// that a role in use is still served from memory, and that a failed write that would
// have narrowed is not forgotten.
func TestManyFailedCreates(t *testing.T) {
	t.Parallel()
	s := newTestStore(t)
	s.put(t, RoleKey("old"), newRole())
	s.put(t, RoleKey("narrowed"), newRole())
	old := s.mustGet(t, "old")
	s.mustGet(t, "narrowed")
	s.setOnWrite(func(context.Context, func() error) error { return errStorage })
	if err := s.write(t.Context(), RoleKey("narrowed"), nil); err == nil {
		t.Fatal("the deletion did not fail")
	}
	for i := range 3 * maxRoles {
		name := fmt.Sprintf("new%d", i)
		if err := s.write(t.Context(), RoleKey(name), newRole()); err == nil {
			t.Fatal("the write did not fail")
		}
		if i%100 == 0 {
			s.mustGet(t, "ci")
		}
		if i == 10 && !slices.Contains(s.Uncertain(), "roles/new10") {
			t.Error("status does not show a failed create")
		}
		if i == 4095 {
			if slices.Contains(s.Uncertain(), "roles/*") {
				t.Error("4096 failed creates are too many to be named")
			}
			s.put(t, RoleKey("new0"), newRole()) // which was committed late, and whose record was evicted
			s.mustGet(t, "new0")
		}
		if s.readCount(RoleKey("new0")); i == 4096 {
			if s.mustGet(t, "new0"); s.readCount(RoleKey("new0")) != 1 {
				t.Error("a role whose last write failed is served from memory after too many writes failed")
			}
		}
	}
	s.setOnWrite(nil)
	if n := len(s.uncertain) + s.roles.Len() + len(s.narrowed) + len(s.locks.held); n > maxRoles+1 {
		t.Errorf("%d names are kept", n)
	}
	s.readCount(RoleKey("ci"))
	s.readCount(ConfigKey)
	s.mustGet(t, "ci")
	if s.readCount(RoleKey("ci"))+s.readCount(ConfigKey) > 0 {
		t.Error("a role in use is not served from memory")
	}
	s.setOnWrite(func(context.Context, func() error) error { return errStorage })
	if err := s.write(t.Context(), RoleKey("ci"), newRole()); err == nil {
		t.Fatal("the write did not fail")
	}
	s.setOnWrite(nil)
	s.readCount(RoleKey("ci"))
	if s.mustGet(t, "ci"); s.readCount(RoleKey("ci")) != 1 {
		t.Error("a role whose last write failed is served from memory")
	}
	s.readCount(RoleKey("old"))
	first := s.mustGet(t, "old")
	if first.Role == old.Role || s.mustGet(t, "old").Role != first.Role || s.readCount(RoleKey("old")) != 2 {
		t.Error("a role that is not known to be certain is not read for each request, or not kept")
	}
	if err := s.write(t.Context(), RoleKey("old"), newRole()); err != nil {
		t.Fatal(err)
	}
	s.mustGet(t, "old")
	s.readCount(RoleKey("old"))
	if s.mustGet(t, "old"); s.readCount(RoleKey("old")) > 0 {
		t.Error("a role that was written is not served from memory")
	}
	if _, err := s.get("narrowed"); err == nil || !slices.Equal(s.Uncertain(), []string{"roles/*", "roles/narrowed"}) {
		t.Errorf("the failed deletion is forgotten: %v, %v", err, s.Uncertain())
	}
	config := s.mustGet(t, "ci").Config.Config
	s.setOnWrite(func(context.Context, func() error) error { return errStorage })
	if err := s.write(t.Context(), ConfigKey, config); err == nil || s.Uncertain()[0] != ConfigKey {
		t.Errorf("config is not among the uncertain entries: %v, %v", err, s.Uncertain())
	}
	s.setOnWrite(nil)
	if err := s.write(t.Context(), ConfigKey, nil); err != nil {
		t.Fatal(err)
	}
}

// TestNamesOfNoRole checks that names of roles that do not exist take no memory, and
// displace no role.
func TestNamesOfNoRole(t *testing.T) {
	t.Parallel()
	s := newTestStore(t)
	set := s.mustGet(t, "ci")
	for i := range 2 * maxRoles {
		if none := s.mustGet(t, fmt.Sprintf("none-%d", i)); none.Role != nil {
			t.Fatal("a role that is not stored")
		}
	}
	s.readCount(RoleKey("ci"))
	isCurrent, again := s.IsCurrent(set), s.mustGet(t, "ci")
	if !isCurrent || again.Role != set.Role || s.readCount(RoleKey("ci")) > 0 || s.roles.Len() != 1 {
		t.Errorf("the role was displaced; %d records", s.roles.Len())
	}
	for key := range map[string]bool{"roles": true, "other": true, "": true} {
		s.Invalidate(key)
	}
	if !s.IsCurrent(set) {
		t.Error("an invalidation of another key disturbs a token request")
	}
}

// TestNumbers checks that a write of a role or of the configuration outdates the
// requests that it concerns and no others, and that a role that was deleted and created
// again is never taken for the old one, although its record was evicted.
func TestNumbers(t *testing.T) {
	t.Parallel()
	s := newTestStore(t)
	s.put(t, RoleKey("other"), newRole())
	ci, other := s.mustGet(t, "ci"), s.mustGet(t, "other")
	for _, step := range []struct {
		key       string
		next      entry
		ci, other bool // still current
		changed   string
	}{
		{RoleKey("third"), newRole(), true, true, "third"},
		{RoleKey("other"), &Role{Disabled: true}, true, false, "other"},
		{RoleKey("other"), nil, true, false, "other"},
		{RoleKey("ci"), newRole(), false, false, "ci"},
		{ConfigKey, ci.Config.Config, false, false, ""},
	} {
		if err := s.write(t.Context(), step.key, step.next); err != nil {
			t.Fatal(err)
		}
		changed := s.changes()
		if s.IsCurrent(ci) != step.ci || s.IsCurrent(other) != step.other || changed[len(changed)-1] != step.changed {
			t.Errorf("after a write of %s: ci is current %t, other %t, changed %q",
				step.key, s.IsCurrent(ci), s.IsCurrent(other), changed)
		}
		next := s.mustGet(t, "ci")
		if next.Version.IsBefore(ci.Version) || ci.Version.IsBefore(next.Version) == step.ci {
			t.Errorf("after a write of %s: %v is not before %v", step.key, ci.Version, next.Version)
		}
	}

	if v := (Version{2, 2}); !(Version{1, 2}).IsBefore(v) || !(Version{2, 1}).IsBefore(v) || v.IsBefore(v) {
		t.Error("a version with an older number of either entry is older")
	}

	old := s.mustGet(t, "ci")
	for _, next := range []entry{nil, newRole()} { // deleted, created again
		if err := s.write(t.Context(), RoleKey("ci"), next); err != nil {
			t.Fatal(err)
		}
		for i := range maxRoles + 1 {
			s.Invalidate(RoleKey(fmt.Sprintf("r%d", i)))
		}
		if _, ok := s.roles.Peek("ci"); ok || s.IsCurrent(old) {
			t.Errorf("the record is evicted: %t, the settings are current: %t", !ok, s.IsCurrent(old))
		}
		if again := s.mustGet(t, "ci"); again.Version == old.Version || again.Version.IsBefore(old.Version) {
			t.Errorf("the number went from %v to %v", old.Version, again.Version)
		}
	}
}

// TestSettingsAreCurrent checks over random histories, with room for two records, that
// settings are those stored, and that settings which are current have not changed.
func TestSettingsAreCurrent(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		s := newTestStore(t)
		defer s.Close()
		s.roles.Resize(2)
		names := []string{"ci", "b", "c", "d"}
		keys := []string{ConfigKey, RoleKey("ci"), RoleKey("b"), RoleKey("c"), RoleKey("d")}
		changed := make(map[string]int)
		blocked := make(map[string]bool)
		late := make(map[string]func() error) // commits of failed writes, by key
		type held struct {
			Settings
			name         string
			config, role int
		}
		var all []held
		rt.Repeat(map[string]func(*rapid.T){
			"write": func(rt *rapid.T) {
				key := rapid.SampledFrom(keys).Draw(rt, "key")
				how := rapid.SampledFrom([]string{"succeeds", "fails", "commits", "commits late"}).Draw(rt, "how")
				n := rapid.IntRange(0, 2).Draw(rt, "next") // 0 deletes
				s.setOnWrite(func(_ context.Context, commit func() error) error {
					switch how {
					case "commits":
						return errors.Join(commit(), errStorage)
					case "commits late":
						late[key] = commit
						return errStorage
					case "fails":
						return errStorage
					}
					return commit()
				})
				stored, _ := Read(context.Background(), &s.InmemStorage, key)
				var next entry
				if key == ConfigKey && n > 0 {
					c := NewConfig()
					c.RefreshKey, c.OrganizationID = cable.NewSecret("k"), fmt.Sprint("org_", n)
					next = c
				} else if n > 0 {
					next = &Role{Scopes: []string{"a:b"}, MaxTTL: time.Duration(n) * time.Hour}
				}
				err := s.write(context.Background(), key, next)
				changed[key]++
				if err == nil {
					delete(blocked, key)
					delete(late, key)
					return
				}
				blocked[key] = blocked[key] || narrows(stored, next)
			},
			"commit late": func(*rapid.T) {
				for key, commit := range late {
					delete(late, key)
					_ = commit() // found at the next read
					return
				}
			},
			"invalidate": func(rt *rapid.T) {
				key := rapid.SampledFrom(keys).Draw(rt, "key")
				s.Invalidate(key)
				changed[key]++
				delete(blocked, key)
				delete(late, key)
			},
			"get": func(rt *rapid.T) {
				name := rapid.SampledFrom(names).Draw(rt, "role")
				set, err := s.get(name)
				if isBlocked := blocked[ConfigKey] || blocked[RoleKey(name)]; isBlocked != (err != nil) {
					rt.Fatalf("blocked %t, error %v", isBlocked, err)
				} else if err != nil {
					return
				}
				config, _ := ReadConfig(context.Background(), &s.InmemStorage)
				role, _ := ReadRole(context.Background(), &s.InmemStorage, name)
				if (config == nil) != (set.Config == nil) || (role == nil) != (set.Role == nil) ||
					config != nil && config.OrganizationID != set.Config.OrganizationID ||
					role != nil && role.MaxTTL != set.Role.MaxTTL {
					rt.Fatalf("settings %+v are not those stored: %+v, %+v", set, config, role)
				}
				if !s.IsCurrent(set) {
					rt.Fatal("settings that were just read are outdated")
				}
				all = append(all, held{set, name, changed[ConfigKey], changed[RoleKey(name)]})
			},
			"": func(rt *rapid.T) {
				for _, h := range all {
					hasChanged := h.config != changed[ConfigKey] || h.role != changed[RoleKey(h.name)]
					if s.IsCurrent(h.Settings) && hasChanged {
						rt.Fatalf("%s is current although it has changed", h.name)
					}
				}
				if s.roles.Len() > 2 {
					rt.Fatalf("%d records", s.roles.Len())
				}
			},
		})
	})
}
