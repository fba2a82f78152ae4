// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"fmt"
	"testing"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// expireTime reads the end of a lease from Vault.
func (v *vaultServer) expireTime(t *testing.T, lease string) time.Time {
	t.Helper()
	a := v.ok(t, "PUT", "sys/leases/lookup", map[string]any{"lease_id": lease})
	text, _ := a.Data["expire_time"].(string)
	end, err := time.Parse(time.RFC3339Nano, text)
	if err != nil {
		t.Fatalf("expire_time of %s: %v", a, err)
	}
	return end
}

// TestLeaseAndToken shows that the lease that Vault keeps never ends after the token, and at
// most three seconds before it unless the token is valid for longer than was
// requested. The arithmetic is tested in the root package.
func TestLeaseAndToken(t *testing.T) {
	t.Parallel()
	v := sharedServer(t)
	for name, tt := range map[string]struct {
		fault   cabletest.Fault
		granted time.Duration
	}{
		"as requested":     {granted: time.Hour},
		"shorter":          {cabletest.Fault{Grant: &cabletest.Grant{Lifetime: ptr(7 * time.Minute)}}, 7 * time.Minute},
		"longer":           {cabletest.Fault{Grant: &cabletest.Grant{Lifetime: ptr(3 * time.Hour)}}, 3 * time.Hour},
		"Cable runs ahead": {cabletest.Fault{ClockSkew: 5 * time.Hour}, time.Hour},
		"slow response":    {cabletest.Fault{Stall: time.Second}, time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMount(t, v, nil)
			m.configure(t)
			m.sim.SetFault(tt.fault)
			before := time.Now()
			a := m.read(t)
			now := time.Now()
			end := m.expireTime(t, a.LeaseID)

			expiry := time.Unix(a.number("expiry"), 0).Add(-tt.fault.ClockSkew) // by our clock
			lease := time.Duration(a.LeaseDuration) * time.Second
			const requested = time.Hour
			if d := expiry.Sub(before.Add(tt.granted)); d < -time.Second || d > now.Sub(before) {
				t.Fatalf("the simulator's token is valid until %s", expiry)
			}
			if want := min(requested, tt.granted); lease > want || lease <= want-5*time.Second {
				t.Errorf("lease_duration %s, requested %s, granted %s", lease, requested, tt.granted)
			}
			if lease > expiry.Sub(before) || end.After(expiry) {
				t.Errorf("the lease (%s, until %s) ends after the token (%s)", lease, end, expiry)
			}
			if early := expiry.Sub(end); tt.granted <= requested && early > 3*time.Second {
				t.Errorf("the lease ends %s before the token", early)
			}
		})
	}
}

// TestVaultEndsLeases shows that leases that Vault ends by itself, because Cable's token or
// Vault's expires, leave nothing behind.
func TestVaultEndsLeases(t *testing.T) {
	t.Parallel()
	m := newMount(t, sharedServer(t), nil)
	m.configure(t)
	creds := m.path + "/creds/app"
	m.writePolicy(t, m.path, fmt.Sprintf("path %q { capabilities = [\"read\"] }", creds))
	token := m.tokenWith(t, m.path, map[string]any{"ttl": "3s", "explicit_max_ttl": "3s"})
	if a := m.as(t, token, "GET", creds, nil); a.status != 200 {
		t.Fatal(a)
	}
	m.sim.SetFault(cabletest.Fault{Grant: &cabletest.Grant{Lifetime: ptr(5 * time.Second)}})
	for range 3 {
		if a := m.read(t); a.LeaseDuration < 3 || a.LeaseDuration > 5 {
			t.Errorf("lease_duration %d of a token of 5s", a.LeaseDuration)
		}
	}
	m.ok(t, "DELETE", m.path+"/config", nil)
	if n := m.leaseCount(creds); n < 1 {
		t.Errorf("%d leases, want some that are to end", n)
	}
	waitFor(t, 30*time.Second, "Vault ends the leases", func() bool { return m.leaseCount(creds) == 0 })
	noneIrrevocable(t, m.vaultServer)
}
