package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// blocks returns the README's code blocks of one language.
func blocks(t *testing.T, language string) []string {
	t.Helper()
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, m := range regexp.MustCompile("(?s)```"+language+"\n(.*?)```").FindAllStringSubmatch(string(readme), -1) {
		found = append(found, m[1])
	}
	if len(found) == 0 {
		t.Fatalf("the README has no block of %s", language)
	}
	return found
}

// TestReadme runs what the README shows: its transcripts print what they say,
// but for what differs each time; its policies and its Agent configuration work
// as they stand.
func TestReadme(t *testing.T) {
	t.Parallel()
	v := ownServer(t)
	watch(t, v)
	sim := cabletest.NewServer(t, nil)
	v.ok(t, "POST", "sys/mounts/cable", map[string]any{"type": pluginName})
	v.ok(t, "POST", "cable/config", map[string]any{"refresh_key": sim.RefreshKey(), "token_url": sim.URL})
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "refresh-key.txt"), []byte(sim.RefreshKey()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	shell := func(command string) string {
		cmd := exec.Command("bash", "-c", command)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "PATH="+suite.bin+":"+os.Getenv("PATH"), "VAULT_ADDR="+v.addr, "VAULT_TOKEN="+v.root)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", command, err, out)
		}
		return string(out)
	}

	// What differs each time, and how wide the columns get by it.
	differs := regexp.MustCompile(`(?m)^(lease_id|lease_duration|expires_at|expiry|token) .*$`)
	shape := func(text string) string {
		return strings.TrimSpace(regexp.MustCompile(` {2,}`).ReplaceAllString(differs.ReplaceAllString(text, "$1"), "  "))
	}
	for _, transcript := range blocks(t, "console") {
		for _, step := range strings.Split("\n"+transcript, "\n$ ")[1:] {
			command, want, _ := strings.Cut(step, "\n")
			if diff := cmp.Diff(shape(want), shape(shell(command))); diff != "" {
				t.Errorf("$ %s (-README +here):\n%s", command, diff)
			}
		}
	}

	v.ok(t, "POST", "cable/roles/ci", map[string]any{"scopes": "transactions:read"})
	agent := false
	for _, hcl := range blocks(t, "hcl") {
		if strings.Contains(hcl, "capabilities") {
			v.ok(t, "PUT", "sys/policies/acl/readme", map[string]any{"policy": hcl})
			token := v.ok(t, "POST", "auth/token/create", map[string]any{"policies": []string{"readme"}}).Auth.ClientToken
			for _, tt := range []struct {
				method, path string
				body         any
				status       int
			}{
				{"GET", "cable/creds/reports", nil, 200},
				{"GET", "cable/creds/ci", nil, 403},
				{"PUT", "cable/creds/ci", map[string]any{"ttl": "5m"}, 200},
				{"PUT", "cable/creds/ci", map[string]any{"scopes": "transactions:read"}, 403},
				{"PUT", "cable/roles/new", map[string]any{"scopes": "person:read"}, 204},
				{"PUT", "cable/roles/new", map[string]any{"scopes": "person:write"}, 403},
				{"PUT", "cable/config", map[string]any{"request_timeout": "10s"}, 204},
				{"DELETE", "cable/config", nil, 403},
			} {
				a, err := v.call(request{method: tt.method, path: tt.path, body: tt.body, token: token})
				if err != nil || a.status != tt.status {
					t.Errorf("%s %s %v under the README's policy: %v %v, want %d", tt.method, tt.path, tt.body, a, err, tt.status)
				}
			}
			continue
		}
		agent = true
		v.ok(t, "POST", "sys/auth/approle", map[string]any{"type": "approle"})
		v.ok(t, "POST", "auth/approle/role/app", map[string]any{"token_policies": "readme"})
		if err := os.WriteFile(filepath.Join(dir, "agent.hcl"), []byte("exit_after_auth = true\n"+hcl), 0o600); err != nil {
			t.Fatal(err)
		}
		shell("vault read -field=role_id auth/approle/role/app/role-id > role-id && vault write -f -field=secret_id auth/approle/role/app/secret-id > secret-id")
		shell("unset VAULT_TOKEN; vault agent -config=agent.hcl")
		rendered, err := os.ReadFile(filepath.Join(dir, "app.env"))
		if err != nil || !strings.HasPrefix(string(rendered), "CABLE_TOKEN=eyJ") {
			t.Errorf("Agent rendered %d bytes: %v", len(rendered), err)
		}
	}
	if !agent {
		t.Error("the README has no configuration for Agent")
	}
}
