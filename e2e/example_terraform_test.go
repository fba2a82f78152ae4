// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"archive/zip"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/vaulttest"
)

// The modules of examples/terraform run with each program on PATH, terraform and
// tofu, and with the provider from its registry, or from the mirror that
// TF_CLI_CONFIG_FILE names. With TERRAFORM=require in the environment, as in CI,
// a test without one of these fails; elsewhere it is skipped.

// withTerraform runs a test with each program.
func withTerraform(t *testing.T, test func(t *testing.T, program string)) {
	t.Helper()
	needExamples(t)
	needVault(t)
	for _, name := range []string{"terraform", "tofu"} {
		t.Run(name, func(t *testing.T) {
			program, err := exec.LookPath(name)
			if err != nil {
				noTerraform(t, err.Error())
			}
			test(t, program)
		})
	}
}

// noTerraform skips or fails a test that lacks the program or the provider.
func noTerraform(t *testing.T, reason string) {
	t.Helper()
	if os.Getenv("TERRAFORM") == "require" {
		t.Fatal("TERRAFORM=require: ", reason)
	}
	t.Skip(reason)
}

// terraform is a person in a copy of a module.
type terraform struct {
	*shell
	v   *vaultServer
	sim *cabletest.Server
}

// newTerraform copies a module, for a person who is root on v, and installs its
// provider, in a minute at most.
func newTerraform(t *testing.T, v *vaultServer, sim *cabletest.Server, module, program string) *terraform {
	t.Helper()
	p := &terraform{shell: newShell(t, v, map[string]string{"terraform": program}), v: v, sim: sim}
	noError(t, os.CopyFS(p.dir, os.DirFS(filepath.Join("../examples/terraform", module))))
	settings := []string{"TF_IN_AUTOMATION=1", "TF_CLI_ARGS=-no-color", "CHECKPOINT_DISABLE=1"}
	p.env = append(p.env, settings...)
	p.run("terraform fmt -check -diff")

	// With the home and the proxy of the test's own environment, unlike the page.
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, "init", "-input=false")
	cmd.Dir, cmd.Env, cmd.WaitDelay = p.dir, append(os.Environ(), settings...), time.Second
	out, err := cmd.CombinedOutput()
	unreachable := regexp.MustCompile(`(?s)Failed to (query available provider packages|install provider).*`)
	switch reason := unreachable.FindString(string(out)); {
	case ctx.Err() != nil:
		noTerraform(t, "the provider was not installed within a minute")
	case err != nil && reason != "":
		noTerraform(t, "the provider cannot be installed. "+strings.Join(strings.Fields(reason), " "))
	case err != nil:
		t.Fatalf("init: %v\n%s", err, out)
	}
	return p
}

// tokenWith returns a new token with a policy and the default one.
func (p *terraform) tokenWith(policy string) string {
	p.t.Helper()
	return p.v.tokenWith(p.t, policy, map[string]any{"no_default_policy": false, "ttl": "1h"})
}

// plan returns the output of a plan, and whether it has changes.
func (p *terraform) plan(environment ...string) (out string, changes bool) {
	p.t.Helper()
	command := "code=0; terraform plan -detailed-exitcode || code=$?; echo EXIT $code"
	out = p.run(strings.Join(append(environment, command), "\n"))
	if !regexp.MustCompile(`EXIT [02]\n$`).MatchString(out) {
		p.t.Fatalf("plan: %s", out)
	}
	return out, strings.HasSuffix(out, "EXIT 2\n")
}

// settled shows that a plan has no changes.
func (p *terraform) settled(when string) {
	p.t.Helper()
	if out, changes := p.plan(); changes || !strings.Contains(out, "No changes.") {
		p.t.Errorf("%s the plan is not empty:\n%s", when, out)
	}
}

// clean shows that no file that Terraform wrote has a secret, the parts of plan
// files included.
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
	noError(p.t, err)
	p.t.Logf("%s: no secret in %d state files and %d plan files", when, states, plans)
	if states+plans == 0 {
		p.t.Errorf("%s there is neither a state nor a plan", when)
	}
}

// minimal shows by the audit log that a policy gives the capabilities that requests
// of a token with it needed, sudo included, and no other.
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
		noError(p.t, json.Unmarshal([]byte(line), &entry))
		if entry.Type == "response" && slices.Contains(entry.Auth.Policies, name) &&
			!strings.Contains(entry.Error, "permission denied") {
			used[entry.Request.Path+" "+entry.Request.Operation] = true
		}
	}
	text := p.v.ok(p.t, "GET", "sys/policies/acl/"+name, nil).Data["policy"].(string)
	rule := regexp.MustCompile(`(?s)path "([^"]+)" \{\s*capabilities = \[([^]]*)\]\s*\}`)
	given := map[string]bool{}
	for _, rule := range rule.FindAllStringSubmatch(text, -1) {
		path := regexp.MustCompile("^" + strings.ReplaceAll(regexp.QuoteMeta(rule[1]), `\*`, ".*") + "$")
		for _, capability := range regexp.MustCompile(`\w+`).FindAllString(rule[2], -1) {
			if capability == "sudo" { // without it, the same request is refused
				part := strings.Replace(text, rule[0], strings.Replace(rule[0], `, "sudo"`, "", 1), 1)
				p.v.writePolicy(p.t, "part", part)
				if a := p.v.as(p.t, p.tokenWith("part"), "PUT", rule[1], map[string]any{}); a.status != 403 {
					p.t.Errorf("%s without sudo: %v", rule[1], a)
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
	if len(given) == 0 {
		p.t.Errorf("%s: no request needed it", name)
	}
}

// TestExampleTerraformPlatform follows the page of the module for the platform.
func TestExampleTerraformPlatform(t *testing.T) {
	t.Parallel()
	withTerraform(t, func(t *testing.T, program string) {
		next, err := nextPlugin()
		noError(t, err)
		// The plugin folder, as the runbook fills it; the last file is no plugin.
		const broken = "v0.0.9-broken"
		v := &vaultServer{plugins: t.TempDir()}
		sums := map[string]string{}
		install := func(version string, data []byte) {
			t.Helper()
			file := filepath.Join(v.plugins, pluginName+"-"+version)
			noError(t, os.WriteFile(file, data, 0o700))
			if sums[version], err = (vaulttest.Plugin{File: file}).Sum(); err != nil {
				t.Fatal(err)
			}
		}
		install(pluginVersion, []byte(readFile(t, suite.plugin.File)))
		install(next.Version, []byte(readFile(t, next.File)))
		install(broken, []byte("#!/bin/sh\nexit 1\n"))
		noError(t, v.start(t.TempDir(), nil))
		t.Cleanup(v.stop)
		sim := cabletest.NewServer(t, nil)
		p := newTerraform(t, v, sim, "platform", program)
		watch(t, v)

		// The values of the example, but for sums, versions and Cable's address.
		values := readFile(t, p.place("terraform.tfvars"))
		set := func(version string, more ...string) {
			t.Helper()
			var entries strings.Builder
			for _, v := range append(more, version) {
				fmt.Fprintf(&entries, "  %q = { sha256 = %q }\n", v, sums[v])
			}
			named := regexp.MustCompile(`(?s)plugin_version = .*?\n\}\n`)
			text := named.ReplaceAllLiteralString(values,
				fmt.Sprintf("plugin_version  = %q\nplugin_versions = {\n%s}\n", version, &entries))
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
			"Set up/1": {after: func(string) { p.env = append(p.env, "VAULT_TOKEN="+p.tokenWith("terraform")) }},
			"Write the key/1": {
				before: func() {
					// A plan sends nothing.
					out := p.run("export TF_VAR_write_refresh_key=true TF_VAR_refresh_key=$(cat refresh-key.txt)\n" +
						"terraform init; terraform validate; terraform plan -out=plan")
					if !strings.Contains(out, "8 to add") {
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
					// A field that was changed by hand shows up, and a role that is gone.
					v.ok(t, "POST", "cable/roles/reports", map[string]any{"ttl": "15m"})
					v.ok(t, "DELETE", "cable/roles/ci", nil)
					v.ok(t, "POST", "cable/config", map[string]any{"request_timeout": "30s"})
					out, _ := p.plan()
					for _, want := range []string{
						`role["reports"] will be updated in-place`,
						`role["ci"] will be created`,
						`vault_generic_endpoint.config will be updated in-place`,
						"1 to add, 2 to change, 0 to destroy",
					} {
						if !strings.Contains(out, want) {
							t.Errorf("the plan after changes by hand has no %q:\n%s", want, out)
						}
					}
				},
				want: []string{"1 added, 2 changed, 0 destroyed"},
				after: func(string) {
					if field("roles/reports", "ttl") != "3600" || field("roles/ci", "ttl") != "600" ||
						field("config", "request_timeout") != "20" {
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
		catalog := "VAULT_TOKEN=" + v.root + " vault plugin list secret"
		if out := p.run(catalog); !strings.Contains(out, pluginVersion) || !strings.Contains(out, next.Version) {
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

		// A rotation to a key that does not work, then to one that does.
		write := func(key string, version int) string {
			return fmt.Sprintf("export VAULT_MAX_RETRIES=0 TF_VAR_write_refresh_key=true TF_VAR_refresh_key=%s"+
				" TF_VAR_refresh_key_version=%d", key, version)
		}
		m := &mount{vaultServer: v, path: "cable", sim: sim}
		m.costs(t, 1, "a key that does not work", func() {
			out, err := p.try(write("wrong", 2) + "; terraform apply -auto-approve")
			if err == nil || !strings.Contains(out, "401") {
				t.Errorf("a key that does not work: %v %s", err, out)
			}
		})
		if got := field("config", "refresh_key_version"); got != "1" {
			t.Errorf("a key that does not work is stored as version %s", got)
		}
		out, changes := p.plan()
		if !changes || !strings.Contains(out, "terraform_data.refresh_key_written will be created") {
			t.Errorf("the plan after a key that does not work: %s", out)
		}
		newKey := cabletest.NewRefreshKey()
		sim.SetRefreshKey(newKey)
		m.costs(t, 0, "the plan of a rotation", func() { p.plan(write(newKey, 3)) })
		m.costs(t, 1, "a rotation", func() { p.run(write(newKey, 3) + "; terraform apply -auto-approve") })
		if got := field("config", "refresh_key_version"); got != "2" {
			t.Errorf("after the rotation: version %s", got)
		}
		runs(next.Version)
		p.clean("after the rotation")
		p.env = append(p.env, "TF_VAR_refresh_key_version=3")
		p.settled("after the rotation")
		// If the version was not raised, a plan writes the key.
		m.costs(t, 1, "a plan that writes a key of the same version", func() {
			if _, changes := p.plan(write(newKey, 3)); changes {
				t.Error("a plan that writes a key of the same version has changes")
			}
		})
		// A key without write_refresh_key, and the other way round.
		for _, environment := range []string{"export TF_VAR_refresh_key=x", "export TF_VAR_write_refresh_key=true"} {
			out, err := p.try(environment + "; terraform plan")
			if err == nil || !strings.Contains(out, "write_refresh_key=true needs refresh_key") {
				t.Errorf("%s: %v %s", environment, err, out)
			}
		}

		p.run("terraform destroy -auto-approve")
		if out := p.run(catalog + "; VAULT_TOKEN=" + v.root + " vault secrets list"); strings.Contains(out, "cable") {
			t.Errorf("after destroy: %s", out)
		}
		p.clean("after destroy")
		p.minimal("terraform")
	})
}

// TestExampleTerraformApp follows the page of the module for an app.
func TestExampleTerraformApp(t *testing.T) {
	t.Parallel()
	withTerraform(t, func(t *testing.T, program string) {
		_, m := newApplication(t)
		p := newTerraform(t, m.vaultServer, m.sim, "app", program)
		p.runPage("examples/terraform/app/README.md", map[string]step{
			"Set up and run/1": {after: func(string) { p.env = append(p.env, "VAULT_TOKEN="+p.tokenWith("report")) }},
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
		m.costs(t, 0, "an empty plan", func() { p.settled("after the apply") })
		leases := m.ok(t, "LIST", "sys/leases/lookup/cable/creds/reports", nil)
		if len(leases.Data["keys"].([]any)) != 3 {
			t.Errorf("the leases of two plans and an apply: %s", leases)
		}

		// Without reuse_for each plan and each apply mints.
		m.ok(t, "POST", "cable/roles/reports", map[string]any{"reuse_for": 0})
		m.costs(t, 2, "without reuse_for, plan and apply", func() {
			p.run("export TF_VAR_revision=2; terraform plan -out=plan; terraform apply plan")
		})
		p.clean("without reuse_for")

		// While Cable is down.
		m.sim.SetFault(cabletest.Fault{Status: 500})
		for retries, want := range map[string]int{"true": 3, "export VAULT_MAX_RETRIES=0": 1} {
			m.costs(t, want, retries+"; while Cable is down, a plan", func() {
				out, err := p.try(retries + "; terraform plan")
				if err == nil || !strings.Contains(out, "responded 500") {
					t.Errorf("while Cable is down: %v %s", err, out)
				}
			})
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
