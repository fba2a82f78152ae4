// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/vaulttest"
)

// TestTutorial runs each command of docs/tutorial.md beside the servers of make dev.
func TestTutorial(t *testing.T) {
	t.Parallel()
	needVault(t)
	printed := filepath.Join(t.TempDir(), "dev.out")
	out, err := os.Create(printed)
	noError(t, err)
	defer out.Close()
	stackBuild.Lock()
	started := sync.OnceFunc(stackBuild.Unlock)
	defer started()
	dev := exec.Command("../scripts/dev")
	dev.Stdout, dev.Stderr = out, out
	noError(t, dev.Start())
	t.Cleanup(func() {
		_ = dev.Process.Signal(syscall.SIGTERM) // as Ctrl-C does
		if err := dev.Wait(); err != nil {
			t.Errorf("make dev ended with %v", err)
		}
	})
	waitFor(t, 2*time.Minute, "make dev has started everything", func() bool {
		if errors.Is(dev.Process.Signal(syscall.Signal(0)), os.ErrProcessDone) {
			t.Fatal(readFile(t, printed))
		}
		return strings.Contains(readFile(t, printed), "Ctrl-C stops everything")
	})
	started()

	// The second shell has the lines that the first one printed.
	paste := regexp.MustCompile(`export VAULT_ADDR=(\S+) VAULT_TOKEN=(\S+) CABLE_CONTROL=(\S+)\n\s+alias vault=(\S+)`).
		FindStringSubmatch(readFile(t, printed))
	log := regexp.MustCompile(`Logs: (\S+)`).FindStringSubmatch(readFile(t, printed))
	if paste == nil || log == nil {
		t.Fatalf("make dev prints no lines to paste:\n%s", readFile(t, printed))
	}
	v := &vaultServer{Server: &vaulttest.Server{Addr: paste[1], Root: paste[2]}, addr: paste[1], root: paste[2]}
	s := newShell(t, v, map[string]string{"vault": paste[4]})
	s.env = append(s.env, "CABLE_CONTROL="+paste[3])

	lease, calls := "", ""
	stats := func() string { return s.run(`curl -sS "$CABLE_CONTROL/stats" | grep '"calls"'`) }
	pasted := "shopt -s expand_aliases\nalias vault=/gone\nexport VAULT_ADDR=gone\n"
	forget := named(t, "docs/tutorial.md")["forget"]
	forgot := s.run(pasted + forget + `type -t vault; echo "${VAULT_ADDR-}${VAULT_TOKEN-}"`)
	if forgot != "file\n\n" {
		t.Errorf("the second shell still has an alias or an address:\n%s", forgot)
	}
	s.runPage("docs/tutorial.md", map[string]step{
		"What is there/1": {
			want: []string{`token_url +http://127\.0\.0\.1:`, `(?m)^team-a$`, `scopes +\[person:read\]`},
			after: func(out string) {
				if strings.Contains(out, "refresh_key ") {
					t.Errorf("a read returns the refresh key:\n%s", out)
				}
			},
		},
		"Your first token/1": {want: []string{`lease_duration +14m5`, `(?m)^token +eyJ`, `scopes +\[person:read\]`}},
		"Your first token/2": {want: []string{`lease_duration +9m5`, `scopes +\[transactions:read\]`}},
		"Your first token/3": {fails: true, want: []string{"Code: 400", `"person:read"`, `"transactions:read"`}},
		"Your own role/1": {
			before: func() { calls = stats() },
			want: []string{
				`allowed +true`, `ttl +10m`, `scopes +\[person:read person:write\]`, `scopes outside role "mine"`,
			},
			after: func(string) {
				if now := stats(); now != calls {
					t.Errorf("explain called Cable: %s then %s", calls, now)
				}
			},
		},
		"Your own role/2": {
			want: []string{"Success! Uploaded policy", `20\d\d-\d\d-\d\dT[\d:]+Z$`},
			after: func(string) {
				out, err := s.try("VAULT_TOKEN=$mine vault read cable/creds/team-b")
				if err == nil || !strings.Contains(out, "permission denied") {
					t.Errorf("another role's token under the policy: %v\n%s", err, out)
				}
			},
		},
		"The one limit/1": {
			before: func() { lease = strings.TrimSpace(s.run("vault read -field=lease_id cable/creds/mine")) },
			after: func(string) {
				page := readFile(t, "../docs/tutorial.md")
				phrase := regexp.MustCompile("The log says\\s+`([^`]+)`").FindStringSubmatch(page)
				if phrase == nil {
					t.Fatal("the tutorial does not say what the log says")
				}
				waitFor(t, 10*time.Second, "the log says what the tutorial says", func() bool {
					return strings.Contains(readFile(t, log[1]), strings.Join(strings.Fields(phrase[1]), " "))
				})
				if a := v.do(t, "PUT", "sys/leases/lookup", map[string]any{"lease_id": lease}); a.status != 200 {
					t.Errorf("another lease is gone, too: %s", a)
				}
			},
		},
		"When Cable fails/1": {},
		"When Cable fails/2": {fails: true, want: []string{"Code: 429"}},
		"When Cable fails/3": {want: []string{`^[123]\d?rate_limited$`}},
		"Disable and clean up/1": {
			want: []string{"the role is disabled", `may\s+be\s+valid\s+until\s+20`},
			after: func(string) {
				if a := v.do(t, "GET", "cable/creds/mine", nil); a.status != 400 {
					t.Errorf("a read of the disabled role: %s", a)
				}
			},
		},
	})
}
