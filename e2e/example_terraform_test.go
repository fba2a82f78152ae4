// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"archive/zip"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/vaulttest"
)

// The modules of examples/terraform run with the OpenTofu that tools/opentofu
// pins, and with Terraform if it is on PATH. Their provider is that of
// tools/terraform-provider-vault, which says how it differs from the current one.

// withTerraform runs a test with each program.
func withTerraform(t *testing.T, test func(t *testing.T, program, cliConfig string)) {
	t.Helper()
	needExamples(t)
	needVault(t)
	programs := map[string]string{"OpenTofu": filepath.Join(needTool(t, "opentofu"), "tofu")}
	if path, err := exec.LookPath("terraform"); err == nil {
		programs["Terraform"] = path
	}
	provider := filepath.Join(needTool(t, "terraform-provider-vault"), "terraform-provider-vault")

	// A mirror in which the provider is of the version that the modules ask for.
	mirror := t.TempDir()
	for _, host := range []string{"registry.terraform.io", "registry.opentofu.org"} {
		dir := filepath.Join(mirror, host, "hashicorp/vault/5.10.0", runtime.GOOS+"_"+runtime.GOARCH)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(provider, filepath.Join(dir, "terraform-provider-vault_v5.10.0")); err != nil {
			t.Fatal(err)
		}
	}
	cliConfig := filepath.Join(mirror, "terraformrc")
	if err := os.WriteFile(cliConfig, fmt.Appendf(nil, "provider_installation {\n  filesystem_mirror {\n    path = %q\n  }\n}\n", mirror), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, program := range programs {
		t.Run(name, func(t *testing.T) { test(t, program, cliConfig) })
	}
}

// terraform is a person in a copy of a module.
type terraform struct {
	*shell
	v   *vaultServer
	sim *cabletest.Server
}

// newTerraform copies a module, for a person who is root on v.
func newTerraform(t *testing.T, v *vaultServer, sim *cabletest.Server, module, program, cliConfig string) *terraform {
	t.Helper()
	p := &terraform{shell: newShell(t, v, map[string]string{"terraform": program}), v: v, sim: sim}
	if err := os.CopyFS(p.dir, os.DirFS(filepath.Join("../examples/terraform", module))); err != nil {
		t.Fatal(err)
	}
	p.env = append(p.env, "TF_CLI_CONFIG_FILE="+cliConfig, "TF_IN_AUTOMATION=1", "TF_CLI_ARGS=-no-color", "CHECKPOINT_DISABLE=1")
	p.run("terraform fmt -check -diff")
	return p
}

// as has the person use a token with the module's policy from now on.
func (p *terraform) as(policy string) {
	p.t.Helper()
	token := p.v.ok(p.t, "POST", "auth/token/create", map[string]any{"policies": []string{policy}, "ttl": "1h"}).Auth.ClientToken
	p.env = append(p.env, "VAULT_TOKEN="+token)
}

// plan returns what a plan prints, and whether it has changes.
func (p *terraform) plan(environment ...string) (out string, changes bool) {
	p.t.Helper()
	out = p.run(strings.Join(append(environment, "code=0; terraform plan -detailed-exitcode || code=$?; echo EXIT $code"), "\n"))
	if !regexp.MustCompile(`EXIT [02]\n$`).MatchString(out) {
		p.t.Fatalf("plan: %s", out)
	}
	return out, strings.HasSuffix(out, "EXIT 2\n")
}

// settled: a plan has no changes.
func (p *terraform) settled(when string) {
	p.t.Helper()
	if out, changes := p.plan(); changes || !strings.Contains(out, "No changes.") {
		p.t.Errorf("%s the plan is not empty:\n%s", when, out)
	}
}

// clean: no file that Terraform wrote has a secret, the parts of plan files
// included.
func (p *terraform) clean(when string) {
	p.t.Helper()
	states, plans := 0, 0
	check := func(name string, data []byte) {
		if secret := findSecret(string(data), false); secret != "" {
			p.t.Errorf("%s %s has %s", when, name, secret)
		}
	}
	err := filepath.WalkDir(p.dir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == ".bin" || d.Name() == "providers"):
			return fs.SkipDir
		case !d.Type().IsRegular() || d.Name() == "refresh-key.txt":
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		check(d.Name(), data)
		if strings.HasPrefix(d.Name(), "terraform.tfstate") {
			states++
		}
		archive, err := zip.NewReader(bytes.NewReader(data), int64(len(data)))
		if err != nil {
			return nil // no plan file
		}
		plans++
		for _, part := range archive.File {
			r, err := part.Open()
			if err != nil {
				return err
			}
			data, err := io.ReadAll(r)
			if err != nil {
				return err
			}
			check(d.Name()+"/"+part.Name, data)
		}
		return nil
	})
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Logf("%s: no secret in %d state files and %d plan files", when, states, plans)
	if states+plans == 0 {
		p.t.Errorf("%s there is neither a state nor a plan", when)
	}
}

// minimal: what a policy gives is what requests of a token with it needed, by
// the audit log, sudo included.
func (p *terraform) minimal(name string) {
	p.t.Helper()
	used := map[string]bool{}
	for line := range strings.Lines(readFile(p.t, p.v.audit)) {
		var entry struct {
			Type    string
			Error   string
			Auth    struct{ Policies []string }
			Request struct{ Path, Operation string }
		}
		if err := json.Unmarshal([]byte(line), &entry); err != nil {
			p.t.Fatal(err)
		}
		if entry.Type == "response" && slices.Contains(entry.Auth.Policies, name) && !strings.Contains(entry.Error, "permission denied") {
			used[entry.Request.Path+" "+entry.Request.Operation] = true
		}
	}
	text := p.v.ok(p.t, "GET", "sys/policies/acl/"+name, nil).Data["policy"].(string)
	rules := regexp.MustCompile(`(?s)path "([^"]+)" \{\s*capabilities = \[([^]]*)\]\s*\}`).FindAllStringSubmatch(text, -1)
	given := map[string]bool{}
	for _, rule := range rules {
		path := regexp.MustCompile("^" + strings.ReplaceAll(regexp.QuoteMeta(rule[1]), `\*`, ".*") + "$")
		for _, m := range regexp.MustCompile(`"(\w+)"`).FindAllStringSubmatch(rule[2], -1) {
			capability := m[1]
			if capability == "sudo" {
				// Without it, the same request is refused.
				p.v.ok(p.t, "PUT", "sys/policies/acl/part", map[string]any{"policy": strings.Replace(text, rule[0], strings.Replace(rule[0], `, "sudo"`, "", 1), 1)})
				token := p.v.ok(p.t, "POST", "auth/token/create", map[string]any{"policies": []string{"part"}}).Auth.ClientToken
				if a, err := p.v.call(request{method: "PUT", path: rule[1], body: map[string]any{}, token: token}); err != nil || a.status != 403 {
					p.t.Errorf("%s without sudo: %v %v", rule[1], a, err)
				}
				continue
			}
			found := false
			for request := range used {
				at, operation, _ := strings.Cut(request, " ")
				if path.MatchString(at) && operation == capability {
					found, given[request] = true, true
				}
			}
			if !found {
				p.t.Errorf("%s has %s on %s, and no request needed it", name, capability, rule[1])
			}
		}
	}
	for request := range used {
		if !given[request] && request != "auth/token/lookup-self read" {
			p.t.Errorf("%s does not have %s, which a request needed", name, request)
		}
	}
	if len(rules) == 0 || len(used) == 0 {
		p.t.Errorf("%d rules, %d kinds of requests", len(rules), len(used))
	}
}

// TestExampleTerraformPlatform follows the page of the module for the platform.
func TestExampleTerraformPlatform(t *testing.T) {
	t.Parallel()
	withTerraform(t, func(t *testing.T, program, cliConfig string) {
		next, err := nextPlugin()
		if err != nil {
			t.Fatal(err)
		}
		// The plugin folder, as the runbook fills it; the last file is no plugin.
		const broken = "v0.0.9-broken"
		v := &vaultServer{plugins: t.TempDir()}
		sums := map[string]string{}
		install := func(version string, data []byte) {
			t.Helper()
			file := filepath.Join(v.plugins, pluginName+"-"+version)
			if err := os.WriteFile(file, data, 0o700); err != nil {
				t.Fatal(err)
			}
			if sums[version], err = (vaulttest.Plugin{File: file}).Sum(); err != nil {
				t.Fatal(err)
			}
		}
		install(pluginVersion, []byte(readFile(t, suite.plugin.File)))
		install(next.Version, []byte(readFile(t, next.File)))
		install(broken, []byte("#!/bin/sh\nexit 1\n"))
		if err := v.start(t.TempDir(), nil); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(v.stop)
		watch(t, v)
		sim := cabletest.NewServer(t, nil)
		p := newTerraform(t, v, sim, "platform", program, cliConfig)

		// The values of the example, but for sums, versions and Cable's address.
		values := readFile(t, p.place("terraform.tfvars"))
		set := func(version string, more ...string) {
			t.Helper()
			var entries strings.Builder
			for _, v := range append(more, version) {
				fmt.Fprintf(&entries, "  %q = { sha256 = %q }\n", v, sums[v])
			}
			text := regexp.MustCompile(`(?s)plugin_version = .*?\n\}\n`).ReplaceAllLiteralString(values, fmt.Sprintf("plugin_version  = %q\nplugin_versions = {\n%s}\n", version, &entries))
			if text == values {
				t.Fatal("the example's values name no version")
			}
			p.write("terraform.tfvars", text)
		}
		set(pluginVersion)
		p.env = append(p.env, "TF_VAR_token_url="+sim.URL)
		field := func(path, name string) string {
			t.Helper()
			return fmt.Sprint(v.ok(t, "GET", "cable/"+path, nil).Data[name])
		}
		runs := func(version string) {
			t.Helper()
			if got := field("status", "version"); got != version {
				t.Errorf("the mount runs %s, want %s", got, version)
			}
			if a := v.ok(t, "GET", "cable/creds/reports", nil); a.LeaseDuration < 3000 {
				t.Errorf("with %s a lease of %ds", version, a.LeaseDuration)
			}
		}

		p.write("refresh-key.txt", sim.RefreshKey())
		p.runPage("examples/terraform/platform/README.md", map[string]step{
			"Set up/1": {after: func(string) { p.as("terraform") }},
			"Write the key/1": {
				before: func() {
					// A plan sends nothing.
					if out := p.run("export TF_VAR_write_refresh_key=true TF_VAR_refresh_key=$(cat refresh-key.txt); terraform init; terraform validate; terraform plan -out=plan"); !strings.Contains(out, "8 to add") {
						t.Errorf("the first plan: %s", out)
					}
					if sim.CallCount() != 0 || v.do(t, "GET", "sys/mounts/cable", nil).status == 200 {
						t.Errorf("the first plan made %d API calls", sim.CallCount())
					}
					p.clean("after the first plan")
				},
				want: []string{"8 added, 0 changed, 0 destroyed"},
				after: func(string) {
					if p.exists("refresh-key.txt") || sim.CallCount() != 1 || sim.Calls()[0].ExpirySeconds != 300 {
						t.Errorf("the first apply made %d API calls", sim.CallCount())
					}
					p.clean("after the first apply")
					p.settled("after the first apply")
					runs(pluginVersion)
				},
			},
			"All other changes/1": {
				before: func() {
					// Changes by hand show up: a field, and a role that is gone.
					v.ok(t, "POST", "cable/roles/reports", map[string]any{"ttl": "15m"})
					v.ok(t, "DELETE", "cable/roles/ci", nil)
					v.ok(t, "POST", "cable/config", map[string]any{"request_timeout": "30s"})
					out, _ := p.plan()
					for _, want := range []string{`role\["reports"\] will be updated in-place`, `role\["ci"\] will be created`, `vault_generic_endpoint.config will be updated in-place`, "1 to add, 2 to change, 0 to destroy"} {
						if !regexp.MustCompile(want).MatchString(out) {
							t.Errorf("the plan after changes by hand does not match %q:\n%s", want, out)
						}
					}
				},
				want: []string{"1 added, 2 changed, 0 destroyed"},
				after: func(string) {
					if field("roles/reports", "ttl") != "3600" || field("roles/ci", "ttl") != "600" || field("config", "request_timeout") != "20" {
						t.Error("the apply did not undo the changes by hand")
					}
					p.clean("after a change")
					p.settled("after a change")
				},
			},
		})

		// Upgrade; the old version stays registered.
		apply := "export VAULT_MAX_RETRIES=0; terraform apply -auto-approve"
		set(next.Version, pluginVersion)
		if out := p.run(apply); !strings.Contains(out, "2 added, 1 changed, 1 destroyed") {
			t.Errorf("the upgrade: %s", out)
		}
		runs(next.Version)
		p.settled("after the upgrade")
		if out := p.run("VAULT_TOKEN=" + v.root + " vault plugin list secret"); !strings.Contains(out, pluginVersion) || !strings.Contains(out, next.Version) {
			t.Errorf("the catalog after the upgrade: %s", out)
		}
		// A version that does not start, and back.
		set(broken, next.Version)
		if out, err := p.try(apply); err == nil || !strings.Contains(out, "vault_generic_endpoint.reload") {
			t.Errorf("the upgrade to a version that does not start: %v %s", err, out)
		}
		set(next.Version, broken)
		p.run(apply)
		runs(next.Version)
		set(next.Version)
		p.run(apply)
		p.settled("after a failed upgrade")

		// A rotation: a key that does not work, then one that does.
		write := func(key string, version int) string {
			return fmt.Sprintf("export VAULT_MAX_RETRIES=0 TF_VAR_write_refresh_key=true TF_VAR_refresh_key=%s TF_VAR_refresh_key_version=%d", key, version)
		}
		calls := sim.CallCount()
		if out, err := p.try(write("wrong", 2) + "; terraform apply -auto-approve"); err == nil || !strings.Contains(out, "401") || sim.CallCount() != calls+1 {
			t.Errorf("a key that does not work: %v, %d API calls %s", err, sim.CallCount()-calls, out)
		}
		if got := field("config", "refresh_key_version"); got != "1" {
			t.Errorf("a key that does not work is stored as version %s", got)
		}
		if out, changes := p.plan(); !changes || !strings.Contains(out, "terraform_data.refresh_key_written will be created") {
			t.Errorf("the plan after a key that does not work: %s", out)
		}
		newKey := cabletest.NewRefreshKey()
		sim.SetRefreshKey(newKey)
		calls = sim.CallCount()
		if out, _ := p.plan(write(newKey, 3)); sim.CallCount() != calls {
			t.Errorf("the plan of a rotation made %d API calls: %s", sim.CallCount()-calls, out)
		}
		p.run(write(newKey, 3) + "; terraform apply -auto-approve")
		if got := field("config", "refresh_key_version"); got != "2" || sim.CallCount() != calls+1 {
			t.Errorf("after the rotation: version %s, %d API calls", got, sim.CallCount()-calls)
		}
		runs(next.Version)
		p.clean("after the rotation")
		p.env = append(p.env, "TF_VAR_refresh_key_version=3")
		p.settled("after the rotation")
		// The trap: the version was not raised.
		calls = sim.CallCount()
		if _, changes := p.plan(write(newKey, 3)); changes || sim.CallCount() != calls+1 {
			t.Errorf("a plan that writes a key of the same version: %d API calls", sim.CallCount()-calls)
		}
		// A key without write_refresh_key, and the other way round.
		for _, environment := range []string{"export TF_VAR_refresh_key=x", "export TF_VAR_write_refresh_key=true"} {
			if out, err := p.try(environment + "; terraform plan"); err == nil || !strings.Contains(out, "write_refresh_key=true needs refresh_key") {
				t.Errorf("%s: %v %s", environment, err, out)
			}
		}

		p.run("terraform destroy -auto-approve")
		if out := p.run("VAULT_TOKEN=" + v.root + " vault plugin list secret; VAULT_TOKEN=" + v.root + " vault secrets list"); strings.Contains(out, "cable") {
			t.Errorf("after destroy: %s", out)
		}
		p.clean("after destroy")
		p.minimal("terraform")
	})
}

// TestExampleTerraformApp follows the page of the module for an app.
func TestExampleTerraformApp(t *testing.T) {
	t.Parallel()
	withTerraform(t, func(t *testing.T, program, cliConfig string) {
		_, m := newApplication(t)
		p := newTerraform(t, m.vaultServer, m.sim, "app", program, cliConfig)
		calls := func(do func()) int {
			t.Helper()
			before := m.sim.CallCount()
			do()
			return m.sim.CallCount() - before
		}
		p.runPage("examples/terraform/app/README.md", map[string]step{
			"Set up and run/1": {after: func(string) { p.as("report") }},
			"Set up and run/2": {
				want: []string{`(?m)^a Cable token of \d{2,} characters$`},
				after: func(out string) {
					if n := m.sim.CallCount(); n != 1 {
						t.Errorf("with reuse_for, plan and apply made %d API calls", n)
					}
					if secret := findSecret(out, false); secret != "" {
						t.Errorf("Terraform printed %s", secret)
					}
					p.clean("after an apply")
				},
			},
		})
		if n := calls(func() { p.settled("after the apply") }); n != 0 {
			t.Errorf("an empty plan made %d API calls", n)
		}
		if a := m.ok(t, "LIST", "sys/leases/lookup/cable/creds/reports", nil); len(a.Data["keys"].([]any)) != 3 {
			t.Errorf("the leases of two plans and an apply: %s", a)
		}

		// Without reuse_for each plan and each apply mints.
		m.ok(t, "POST", "cable/roles/reports", map[string]any{"reuse_for": 0})
		if n := calls(func() { p.run("export TF_VAR_revision=2; terraform plan -out=plan; terraform apply plan") }); n != 2 {
			t.Errorf("without reuse_for, plan and apply made %d API calls", n)
		}
		p.clean("without reuse_for")

		// While Cable is down.
		m.sim.SetFault(cabletest.Fault{Status: 500})
		for retries, want := range map[string]int{"true": 3, "export VAULT_MAX_RETRIES=0": 1} {
			n := calls(func() {
				if out, err := p.try(retries + "; terraform plan"); err == nil || !strings.Contains(out, "Cable responded 500") {
					t.Errorf("while Cable is down: %v %s", err, out)
				}
			})
			if n != want {
				t.Errorf("%s; while Cable is down a plan made %d API calls, want %d", retries, n, want)
			}
		}
		m.sim.ClearFaults()
		m.ok(t, "POST", "cable/roles/reports", map[string]any{"reuse_for": "5s"})
		p.plan()
		m.sim.SetFault(cabletest.Fault{Status: 500})
		waitFor(t, 10*time.Second, "readers get the previous token", func() bool {
			return strings.Contains(m.ok(t, "GET", "cable/creds/reports", nil).text, "Cable is down")
		})
		p.plan()
		p.minimal("report")

		// The same with a data source, which the page warns of.
		p.write("data.tf", `data "vault_generic_secret" "cable" { path = "cable/creds/reports" }`)
		p.run("terraform apply -auto-approve")
		if findSecret(readFile(t, p.place("terraform.tfstate")), false) == "" {
			t.Error("a data source leaves no token in the state")
		}
	})
}
