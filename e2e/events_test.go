// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// findEventsVault finds or builds the server with subscriptions to events,
// once.
var findEventsVault = sync.OnceValues(func() (string, error) {
	out, err := run("../scripts/vault", "--events")
	return strings.TrimSpace(out), err
})

// eventsServer starts a server with subscriptions to events for one test.
func eventsServer(t *testing.T) *vaultServer {
	t.Helper()
	needVault(t)
	binary, err := findEventsVault()
	if err != nil {
		skipUnlessRequired(t, err)
	}
	v := &vaultServer{binary: binary}
	if err := v.startDev(t.TempDir()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.stop)
	return v
}

// cloudEvent is a line of `vault events subscribe`.
type cloudEvent struct {
	Time time.Time `json:"time"` // when Vault got it
	Data struct {
		Event struct {
			Metadata map[string]string `json:"metadata"`
		} `json:"event"`
		Type   string            `json:"event_type"`
		Plugin map[string]string `json:"plugin_info"`
	} `json:"data"`
}

// event is what the tests compare of it.
type event struct {
	Type     string
	Metadata map[string]string
}

// subscription is `vault events subscribe` as it runs.
type subscription struct {
	lines  <-chan []byte // closed at its end
	stderr *bytes.Buffer // to be read after that
	stop   context.CancelFunc
}

// subscribe runs `vault events subscribe` until the test ends, and waits until
// Vault counts it.
func (v *vaultServer) subscribe(t *testing.T, token, pattern string) *subscription {
	t.Helper()
	before := v.subscriptions(t)
	ctx, stop := context.WithCancel(t.Context())
	cmd := v.subscribeCommand(ctx, token, pattern)
	lines := make(chan []byte, 1024)
	s := &subscription{lines: lines, stderr: new(bytes.Buffer), stop: stop}
	cmd.Stderr = s.stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(lines)
		for r := bufio.NewReader(stdout); ; {
			line, err := r.ReadBytes('\n')
			if len(line) > 0 {
				lines <- line
			}
			if err != nil {
				_ = cmd.Wait()
				return
			}
		}
	}()
	t.Cleanup(func() {
		s.rest(t)
		if s.stderr.Len() > 0 {
			t.Logf("vault events subscribe: %s", s.stderr)
		}
	})
	waitFor(t, 30*time.Second, "the subscription is counted", func() bool { return v.subscriptions(t) > before })
	return s
}

// subscribeCommand is `vault events subscribe` of the server's own version.
func (v *vaultServer) subscribeCommand(ctx context.Context, token, pattern string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, v.binary, "events", "subscribe", pattern)
	cmd.Env = append(os.Environ(), "VAULT_ADDR="+v.addr, "VAULT_TOKEN="+token)
	return cmd
}

// subscriptionsMetric is how many subscriptions Vault serves.
var subscriptionsMetric = regexp.MustCompile(`(?m)^vault_events_subscriptions (\d+)$`)

// subscriptions asks Vault how many subscriptions it serves.
func (v *vaultServer) subscriptions(t *testing.T) int {
	t.Helper()
	found := subscriptionsMetric.FindStringSubmatch(v.ok(t, "GET", "sys/metrics?format=prometheus", nil).text)
	if found == nil {
		return 0 // there was none yet
	}
	n, err := strconv.Atoi(found[1])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// next waits for n events and returns them in the order in which Vault got
// them: its bus hands each on by a goroutine of its own.
func (s *subscription) next(t *testing.T, n int) []cloudEvent {
	t.Helper()
	var events []cloudEvent
	for limit := time.After(20 * time.Second); len(events) < n; {
		select {
		case line, ok := <-s.lines:
			if !ok {
				t.Fatalf("the subscription ended after %d of %d events: %s", len(events), n, s.stderr)
			}
			events = append(events, parseEvent(t, line))
		case <-limit:
			t.Fatalf("%d of %d events came: %+v", len(events), n, events)
		}
	}
	slices.SortStableFunc(events, func(a, b cloudEvent) int { return a.Time.Compare(b.Time) })
	return events
}

// rest ends the subscription and returns what nobody waited for.
func (s *subscription) rest(t *testing.T) (events []cloudEvent) {
	t.Helper()
	s.stop()
	for line := range s.lines {
		events = append(events, parseEvent(t, line))
	}
	return events
}

// parseEvent reads a line, which may hold no secret.
func parseEvent(t *testing.T, line []byte) (e cloudEvent) {
	t.Helper()
	if secret := findSecret(string(line), false); secret != "" {
		t.Errorf("an event holds %s: %s", secret, line)
	}
	if err := json.Unmarshal(line, &e); err != nil {
		t.Fatalf("%v: %s", err, line)
	}
	return e
}

// settle puts words in the place of what differs between two runs, where it is
// as it must be: times become what was left at the time of the event, to the
// minute, and the id of a request says that the audit log has it.
func (v *vaultServer) settle(t *testing.T, e cloudEvent, seen map[string]bool) event {
	t.Helper()
	left := func(d time.Duration) string { return d.Round(time.Minute).String() }
	settled := maps.Clone(e.Data.Event.Metadata)
	for key, value := range settled {
		switch key {
		case "expiry", "seconds_left":
			n, err := strconv.ParseInt(value, 10, 64)
			if err != nil {
				t.Errorf("%s: %v", key, err)
			}
			settled[key] = left(time.Duration(n) * time.Second)
			if key == "expiry" {
				settled[key] = left(time.Unix(n, 0).Sub(e.Time))
			}
		case "expires_at", "maybe_alive_until":
			end, err := time.Parse("2006-01-02T15:04:05Z", value)
			if err != nil {
				t.Errorf("%s: %v", key, err)
			}
			settled[key] = left(end.Sub(e.Time))
		case "request_id":
			audit, err := os.ReadFile(v.audit)
			if err != nil {
				t.Fatal(err)
			}
			if value != "" && !seen[value] && bytes.Contains(audit, []byte(`"id":"`+value+`"`)) {
				settled[key] = "audited"
			}
			seen[value] = true
		}
	}
	return event{e.Data.Type, settled}
}

// TestEvents pins the events of a mount: each kind with its metadata, in their
// order, and no other.
func TestEvents(t *testing.T) {
	t.Parallel()
	v := eventsServer(t)
	m := newMount(t, v, nil)
	sub := v.subscribe(t, v.root, "cable/*")
	plugin := map[string]string{
		"mount_class": "secret", "mount_path": m.path + "/", "plugin": pluginName, "plugin_version": pluginVersion,
		"mount_accessor": fmt.Sprint(v.ok(t, "GET", "sys/mounts/"+m.path, nil).Data["accessor"]),
	}

	const both = "transactions:read,transactions:write"
	metadata := func(operation, path, dataPath string, modified bool, more []string) map[string]string {
		pairs := map[string]string{
			"path": m.path + "/" + path, "data_path": m.path + "/" + dataPath,
			"operation": operation, "modified": strconv.FormatBool(modified),
		}
		for pair := range slices.Chunk(more, 2) {
			pairs[pair[0]] = pair[1]
		}
		return pairs
	}
	config := func(operation, version string) event {
		return event{"cable/config-write", metadata(operation, "config", "config", true, []string{"refresh_key_version", version})}
	}
	role := func(kind, operation string, more ...string) event {
		return event{kind, metadata(operation, "roles/app", "roles/app", true, append(more, "role", "app"))}
	}
	mint := func(kind, operation, path string, more ...string) event {
		return event{kind, metadata(operation, path, "roles/app", false, append(more,
			"role", "app", "organization_id", cabletest.DefaultOrganizationID, "request_id", "audited"))}
	}
	minted := func(operation, path, scopes, life string) event {
		return mint("cable/creds-create", operation, path, "scopes", scopes, "expiry", life, "expires_at", life)
	}
	request := func(method, path string, body any) func() *answer {
		return func() *answer {
			r := request{method: method, path: m.path + "/" + path, body: body, token: v.root}
			if method == "PATCH" {
				r.header = map[string]string{"Content-Type": "application/merge-patch+json"}
			}
			a, err := v.call(r)
			if err != nil {
				t.Errorf("%s %s: %v", method, path, err)
				return new(answer)
			}
			return a
		}
	}
	read := request("GET", "creds/app", nil)
	failing := func(f cabletest.Fault) func() *answer {
		return func() *answer {
			m.sim.SetFault(f)
			defer m.sim.ClearFaults()
			return read()
		}
	}
	failed := func(outcome string, more ...string) []event {
		return []event{mint("cable/creds-create-fail", "read", "creds/app", append(more, "outcome", outcome)...)}
	}
	refused := func(g cabletest.Grant) func() *answer { return failing(cabletest.Fault{Grant: &g}) }
	refusal := []event{mint("cable/grant-refuse", "read", "creds/app", "outcome", "grant_refused", "cable_status", "200", "maybe_alive_until", "1h0m0s")}
	settings := map[string]any{"refresh_key": m.sim.RefreshKey(), "token_url": m.sim.URL, "organization_id": cabletest.DefaultOrganizationID}

	var lease string // of a token for five minutes
	seen := map[string]bool{}
	for _, tt := range []struct {
		name   string
		do     func() *answer
		status int
		want   []event
	}{
		{"config", request("POST", "config", settings), 204, []event{config("update", "1")}},
		{"config again", request("POST", "config", map[string]any{"request_timeout": "15s"}), 204, []event{config("update", "1")}},
		{"config patched", request("PATCH", "config", map[string]any{"request_timeout": "20s"}), 204, []event{config("patch", "1")}},
		{"config refused", request("POST", "config", map[string]any{"auth_scheme": "none"}), 400, nil},
		{"config read", request("GET", "config", nil), 200, nil},

		{"role", request("POST", "roles/app", map[string]any{"scopes": both}), 204, []event{role("cable/role-write", "create", "organization_id", "")}},
		{"role again", request("POST", "roles/app", map[string]any{"max_ttl": "1h"}), 204, []event{role("cable/role-write", "update", "organization_id", "")}},
		{"role patched", request("PATCH", "roles/app", map[string]any{"organization_id": cabletest.DefaultOrganizationID}), 204, []event{role("cable/role-write", "patch", "organization_id", cabletest.DefaultOrganizationID)}},
		{"role refused", request("POST", "roles/app", map[string]any{"ttl": "1s"}), 400, nil},

		{"read", read, 200, []event{minted("read", "creds/app", both, "1h0m0s")}},
		{"written", func() *answer {
			a := request("POST", "creds/app", map[string]any{"ttl": "5m", "scopes": "transactions:read"})()
			lease = a.LeaseID
			return a
		}, 200, []event{minted("update", "creds/app", "transactions:read", "5m0s")}},
		{"revoked", func() *answer {
			return v.do(t, "PUT", "sys/leases/revoke", map[string]any{"lease_id": lease, "sync": true})
		}, 204, []event{
			{"cable/lease-revoke", metadata("revoke", "creds/app", "roles/app", false, []string{
				"role", "app", "organization_id", cabletest.DefaultOrganizationID, "expiry", "5m0s", "expires_at", "5m0s", "seconds_left", "5m0s",
			})},
		}},
		{"no role", request("GET", "creds/other", nil), 400, nil},
		{"no scope", request("POST", "creds/app", map[string]any{"scopes": "person:read"}), 400, nil},
		{"many at once", func() *answer {
			var wg sync.WaitGroup
			for range 20 {
				wg.Go(func() {
					if a := read(); a.status != 200 {
						t.Errorf("one of many: %s", a)
					}
				})
			}
			wg.Wait()
			return nil
		}, 0, slices.Repeat([]event{minted("read", "creds/app", both, "1h0m0s")}, 20)},

		{"a key that is tried", request("POST", "config", map[string]any{"refresh_key": m.sim.RefreshKey(), "verify_role": "app"}), 200, []event{config("update", "1")}},
		{"a wrong key", request("POST", "config", map[string]any{"refresh_key": cabletest.NewRefreshKey(), "verify_role": "app"}), 400, nil},
		{"another key", request("POST", "config", map[string]any{"refresh_key": cabletest.NewRefreshKey()}), 204, []event{config("update", "2")}},
		{"the key again", request("POST", "config", map[string]any{"refresh_key": m.sim.RefreshKey()}), 204, []event{config("update", "3")}},

		{"401", failing(cabletest.Fault{Status: 401, Message: "{refresh_key}"}), 400, failed("key_refused", "cable_status", "401")},
		{"403", failing(cabletest.Fault{Status: 403, Message: "{refresh_key}"}), 400, failed("cable_refused", "cable_status", "403")},
		{"500", failing(cabletest.Fault{Status: 500}), 502, failed("cable_failed", "cable_status", "500", "maybe_alive_until", "1h0m0s")},
		{"503", failing(cabletest.Fault{Status: 503}), 502, failed("cable_failed", "cable_status", "503")},
		{"reset", failing(cabletest.Fault{Reset: cabletest.ResetAfter}), 502, failed("unreachable", "maybe_alive_until", "1h0m0s")},
		{"html", failing(cabletest.Fault{Body: "<html></html>"}), 502, failed("answer_refused", "cable_status", "200", "maybe_alive_until", "1h0m0s")},
		{"other organization", refused(cabletest.Grant{OrganizationID: ptr("org_other")}), 502, refusal},
		{"more scopes", refused(cabletest.Grant{Scopes: &[]string{"transactions:read", "transactions:write", "person:write"}}), 502, refusal},
		{"less patience", request("POST", "config", map[string]any{"request_timeout": "1s"}), 204, []event{config("update", "3")}},
		{"hang", failing(cabletest.Fault{Delay: time.Minute}), 504, failed("timed_out", "maybe_alive_until", "1h0m0s")},
		{"429", failing(cabletest.Fault{Status: 429, Header: map[string]string{"Retry-After": "600"}}), 429, failed("rate_limited", "cable_status", "429")},
		{"held", read, 429, failed("held")},

		{"role deleted", request("DELETE", "roles/app", nil), 200, []event{role("cable/role-delete", "delete")}},
		{"role deleted again", request("DELETE", "roles/app", nil), 204, nil},
		{"config deleted", request("DELETE", "config", nil), 200, []event{{"cable/config-delete", metadata("delete", "config", "config", true, nil)}}},
		{"config deleted again", request("DELETE", "config", nil), 204, nil},
		// The last, so that what should not have come is seen before it.
		{"another role", request("POST", "roles/app", map[string]any{"scopes": both}), 204, []event{role("cable/role-write", "create", "organization_id", "")}},
	} {
		a := tt.do()
		if a != nil && a.status != tt.status {
			t.Errorf("%s: %s, want status %d", tt.name, a, tt.status)
		}
		var got []event
		for _, e := range sub.next(t, len(tt.want)) {
			// The event of a token says what its reader was told.
			for _, key := range []string{"expiry", "expires_at"} {
				if a != nil && a.token() != "" && e.Data.Event.Metadata[key] != fmt.Sprint(a.Data[key]) {
					t.Errorf("%s: %s is %q, want %v", tt.name, key, e.Data.Event.Metadata[key], a.Data[key])
				}
			}
			if diff := cmp.Diff(plugin, e.Data.Plugin); diff != "" {
				t.Errorf("%s: plugin_info (-want +got):\n%s", tt.name, diff)
			}
			got = append(got, v.settle(t, e, seen))
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Fatalf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
	if rest := sub.rest(t); len(rest) > 0 {
		t.Errorf("events that nothing explains: %+v", rest)
	}
}

// TestWhoSeesEvents: who may read tokens of a role sees no events; who has a
// policy for that sees those that the policy names.
func TestWhoSeesEvents(t *testing.T) {
	t.Parallel()
	v := eventsServer(t)
	m := newMount(t, v, nil)
	policies := map[string]string{
		"reader": fmt.Sprintf(`path "%s/creds/app" { capabilities = ["read"] }`, m.path),
		"watcher": fmt.Sprintf(`
path "sys/events/subscribe/cable/*" { capabilities = ["read"] }
path "%s/creds/*" {
  capabilities          = ["list", "subscribe"]
  subscribe_event_types = ["cable/creds-*"]
}`, m.path),
	}
	tokens := map[string]string{"nobody": "hvs.nobody"}
	for name, policy := range policies {
		v.ok(t, "PUT", "sys/policies/acl/"+name, map[string]any{"policy": policy})
		tokens[name] = v.ok(t, "POST", "auth/token/create", map[string]any{"policies": []string{name}}).Auth.ClientToken
	}
	for _, tt := range []struct{ who, pattern string }{{"nobody", "cable/*"}, {"reader", "cable/*"}, {"watcher", "*"}} {
		out, err := v.subscribeCommand(t.Context(), tokens[tt.who], tt.pattern).CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || !strings.Contains(string(out), "got 403") {
			t.Errorf("%s subscribes to %s: %v, %s, want 403", tt.who, tt.pattern, err, out)
		}
	}

	sub := v.subscribe(t, tokens["watcher"], "cable/*")
	m.configure(t)
	m.read(t)
	if a, err := v.call(request{method: "GET", path: m.path + "/creds/app", token: tokens["watcher"]}); err != nil || a.status != 403 {
		t.Errorf("the watcher reads a token: %s, %v", a, err)
	}
	m.sim.SetFault(cabletest.Fault{Status: 401})
	m.do(t, "GET", m.path+"/creds/app", nil)
	var got []string
	for _, e := range sub.next(t, 2) {
		got = append(got, e.Data.Type)
	}
	if diff := cmp.Diff([]string{"cable/creds-create", "cable/creds-create-fail"}, got); diff != "" {
		t.Errorf("what the watcher sees (-want +got):\n%s", diff)
	}
}
