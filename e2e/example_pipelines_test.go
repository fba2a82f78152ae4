// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"math/big"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"gopkg.in/yaml.v3"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// The pipelines of examples/ log in to the real Vault with tokens of an issuer
// that the tests run, which signs the claims that the providers document.

// issuer signs identity tokens, as a provider of pipelines does.
type issuer struct {
	url string
	key *rsa.PrivateKey
}

// newIssuer starts an issuer, where Vault finds its key by OIDC discovery.
func newIssuer(t *testing.T) *issuer {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	noError(t, err)
	s := &issuer{key: key}
	mux := http.NewServeMux()
	respond := func(path string, v func() any) {
		mux.HandleFunc(path, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(v())
		})
	}
	respond("/.well-known/openid-configuration", func() any {
		return map[string]any{
			"issuer": s.url, "jwks_uri": s.url + "/keys",
			"id_token_signing_alg_values_supported": []string{"RS256"},
		}
	})
	respond("/keys", func() any {
		return map[string]any{"keys": []any{map[string]any{
			"kty": "RSA", "use": "sig", "alg": "RS256", "kid": "1",
			"n": encode(key.N.Bytes()), "e": encode(big.NewInt(int64(key.E)).Bytes()),
		}}}
	})
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	s.url = server.URL
	return s
}

// encode is the encoding of the parts of a JWT.
func encode(data []byte) string { return base64.RawURLEncoding.EncodeToString(data) }

// sign returns a token with claims, each of which replaces one of the base's.
func (s *issuer) sign(t *testing.T, base, claims map[string]any) string {
	t.Helper()
	now := time.Now().Unix()
	all := map[string]any{"iss": s.url, "iat": now, "nbf": now, "exp": now + 300}
	maps.Copy(all, base)
	maps.Copy(all, claims)
	body, err := json.Marshal(all)
	noError(t, err)
	text := encode([]byte(`{"alg":"RS256","kid":"1","typ":"JWT"}`)) + "." + encode(body)
	sum := sha256.Sum256([]byte(text))
	signature, err := rsa.SignPKCS1v15(rand.Reader, s.key, crypto.SHA256, sum[:])
	noError(t, err)
	return text + "." + encode(signature)
}

// pipeline is an example whose page has been followed: Vault trusts the issuer.
type pipeline struct {
	*shell
	m      *mount
	issuer *issuer
	files  string         // the example's folder
	claims map[string]any // of the job that may log in
}

// newPipeline follows the page of an example. provider is the issuer's address
// on the page.
func newPipeline(t *testing.T, name, provider string, claims map[string]any) *pipeline {
	t.Helper()
	s, m := newApplication(t)
	p := &pipeline{shell: s, m: m, issuer: newIssuer(t), files: filepath.Join("../examples", name), claims: claims}
	for _, file := range []string{"policy.hcl", "role.json"} {
		s.write(file, readFile(t, filepath.Join(p.files, file)))
	}
	s.edit = strings.NewReplacer(provider, p.issuer.url)
	s.runPage("examples/"+name+"/README.md", map[string]step{"Set up/1": {}})
	return p
}

// parse reads a YAML file of the example.
func (p *pipeline) parse(name string, into any) {
	p.t.Helper()
	noError(p.t, yaml.Unmarshal([]byte(readFile(p.t, filepath.Join(p.files, name))), into))
}

// refusals shows that each claim that the role names keeps another job out.
func (p *pipeline) refusals(login string, others map[string]any) {
	p.t.Helper()
	var role struct {
		Bound map[string]string `json:"bound_claims"`
	}
	noError(p.t, json.Unmarshal([]byte(readFile(p.t, filepath.Join(p.files, "role.json"))), &role))
	refused := func(why, jwt string) {
		p.t.Helper()
		a := p.m.as(p.t, "", "POST", login, map[string]any{"role": "ci", "jwt": jwt})
		if a.status != 400 && a.status != 403 {
			p.t.Errorf("a job with %s: %v", why, a)
		}
	}
	p.m.costs(p.t, 0, "jobs that may not log in", func() {
		for claim := range role.Bound {
			if others[claim] == nil {
				p.t.Errorf("no test of the bound claim %s", claim)
			}
		}
		others["exp"] = time.Now().Add(-time.Hour).Unix()
		for claim, value := range others {
			refused(fmt.Sprintf("%s=%v", claim, value), p.issuer.sign(p.t, p.claims, map[string]any{claim: value}))
		}
		forged := newIssuer(p.t).sign(p.t, p.claims, map[string]any{"iss": p.issuer.url})
		refused("a token that another key signed", forged)
	})
}

// ended reports whether a Vault token has been revoked.
func (p *pipeline) ended(token string) bool {
	p.t.Helper()
	return p.m.do(p.t, "POST", "auth/token/lookup", map[string]any{"token": token}).status != 200
}

// TestExampleGitHubActions makes the requests of hashicorp/vault-action, as its
// source says that it makes them from the workflow's inputs, and runs the
// workflow's commands.
func TestExampleGitHubActions(t *testing.T) {
	t.Parallel()
	p := newPipeline(t, "github-actions", "https://token.actions.githubusercontent.com", map[string]any{
		"sub": "repo:example/reports:environment:production", "aud": "https://vault.example.com",
		"repository": "example/reports", "repository_id": "123456789", "repository_owner": "example",
		"ref": "refs/heads/main", "ref_type": "branch", "environment": "production", "event_name": "push",
		"job_workflow_ref":   "example/reports/.github/workflows/report.yml@refs/heads/main",
		"runner_environment": "github-hosted",
	})
	m := p.m
	var workflow struct {
		Permissions map[string]string
		Jobs        map[string]struct {
			Environment string
			Env         map[string]string
			Steps       []struct {
				ID, Uses, Name, Run, If string
				With, Env               map[string]string
			}
		}
	}
	p.parse("report.yml", &workflow)
	job := workflow.Jobs["report"]
	if fmt.Sprint(workflow.Permissions) != "map[id-token:write]" || job.Environment != "production" ||
		len(job.Steps) != 3 {
		t.Fatalf("the workflow is %+v", workflow)
	}
	with := job.Steps[0].With
	if !regexp.MustCompile(`^hashicorp/vault-action@[0-9a-f]{40}$`).MatchString(job.Steps[0].Uses) ||
		with["method"] != "jwt" || with["url"] != "${{ env.VAULT_ADDR }}" ||
		with["exportEnv"] != "false" || with["exportToken"] != "" || with["outputToken"] != "true" {
		t.Fatalf("the first step is %+v", job.Steps[0])
	}

	// The action logs in, then sends one GET for each path, with its query.
	login := "auth/" + with["path"] + "/login"
	act := func() (outputs map[string]string) {
		t.Helper()
		jwt := p.issuer.sign(t, p.claims, map[string]any{"aud": with["jwtGithubAudience"]})
		a := m.ok(t, "POST", login, map[string]any{"role": with["role"], "jwt": jwt})
		outputs = map[string]string{"vault_token": a.Auth.ClientToken}
		responses := map[string]*response{}
		for entry := range strings.SplitSeq(strings.TrimSpace(with["secrets"]), ";") {
			fields := regexp.MustCompile(`^\s*(\S+)\s+(\S+)\s*\|\s*(\S+)\s*$`).FindStringSubmatch(entry)
			if fields == nil {
				t.Fatalf("secrets has %q", entry)
			}
			path, key, name := fields[1], fields[2], fields[3]
			if responses[path] == nil {
				responses[path] = m.as(t, outputs["vault_token"], "GET", path, nil)
			}
			outputs[name], _ = responses[path].Data[key].(string)
		}
		return outputs
	}
	var outputs map[string]string
	m.costs(t, 1, "the action", func() { outputs = act() })
	m.requested(t, 600)
	if !strings.HasPrefix(outputs["CABLE_TOKEN"], "eyJ") || p.ended(outputs["vault_token"]) {
		t.Errorf("the outputs have a token of %d characters", len(outputs["CABLE_TOKEN"]))
	}

	// The steps with commands, each with its own variables alone.
	for _, step := range job.Steps[1:] {
		p.edit = strings.NewReplacer()
		kept := p.env
		for name, value := range step.Env {
			output := regexp.MustCompile(`^\$\{\{ steps\.vault\.outputs\.(\w+) \}\}$`).FindStringSubmatch(value)
			if output == nil || outputs[output[1]] == "" {
				t.Fatalf("%s: %s is %s", step.Name, name, value)
			}
			p.env = append(p.env, name+"="+outputs[output[1]])
		}
		out := p.run(step.Run)
		p.env = kept
		if secret := findSecret(out, false); secret != "" {
			t.Errorf("%s prints %s", step.Name, secret)
		}
		want := regexp.MustCompile(`^a Cable token of \d{2,} characters, valid until 2\S+Z\n$`)
		if strings.Contains(step.Run, "CABLE_TOKEN") && !want.MatchString(out) {
			t.Errorf("%s prints %q", step.Name, out)
		}
	}
	if !strings.Contains(job.Steps[2].If, "always()") || !p.ended(outputs["vault_token"]) {
		t.Error("the last step does not always revoke the Vault token")
	}

	p.refusals(login, map[string]any{
		"repository": "example/other", "repository_id": "987654321", "ref": "refs/heads/feature",
		"environment": "test", "aud": "https://github.com/example",
	})
	m.smallest(t, filepath.Join(p.files, "policy.hcl"), map[string]request{
		"cable/creds/ci":         {method: "GET", path: "cable/creds/ci?ttl=10m"},
		"auth/token/revoke-self": {method: "POST", path: "auth/token/revoke-self"},
	}, []request{
		{method: "GET", path: "cable/creds/ci?ttl=1h"},
		{method: "GET", path: "cable/creds/ci?ttl=10m&scopes=transactions:read"},
		{method: "PUT", path: "cable/creds/ci", body: map[string]any{"ttl": "10m"}},
		{method: "GET", path: "cable/creds/reports"},
		{method: "GET", path: "cable/roles/ci"},
		{method: "GET", path: "auth/token/lookup-self"},
	})
}

// TestExampleGitLab runs the job's commands as a runner does, script in one shell
// and after_script in another.
func TestExampleGitLab(t *testing.T) {
	t.Parallel()
	p := newPipeline(t, "gitlab", "https://gitlab.com", map[string]any{
		"sub": "project_path:example/reports:ref_type:branch:ref:main", "aud": "https://vault.example.com",
		"namespace_id": "42", "namespace_path": "example", "project_id": "4242", "project_path": "example/reports",
		"user_login": "someone", "pipeline_source": "push", "ref": "main", "ref_type": "branch",
		"ref_path": "refs/heads/main", "ref_protected": "true",
	})
	m := p.m
	var config struct {
		Report struct {
			IDTokens map[string]struct{ Aud string } `yaml:"id_tokens"`
			Script   []string
			After    []string `yaml:"after_script"`
		}
	}
	p.parse(".gitlab-ci.yml", &config)
	job := config.Report
	if len(job.IDTokens) != 1 || len(job.Script) == 0 || len(job.After) != 1 {
		t.Fatalf("the job is %+v", job)
	}
	for name, token := range job.IDTokens {
		p.env = append(p.env, "VAULT_TOKEN=", name+"="+p.issuer.sign(t, p.claims, map[string]any{"aud": token.Aud}))
	}
	script, after := strings.Join(job.Script, "\n"), job.After[0]
	m.costs(t, 1, "the script", func() {
		if out := p.run(script); !regexp.MustCompile(`^a Cable token of \d{2,} characters\n$`).MatchString(out) {
			t.Errorf("the script prints %q", out)
		}
	})
	m.requested(t, 600)
	token := readFile(t, p.place(".vault-token"))
	if p.ended(token) {
		t.Error("the Vault token is revoked before after_script")
	}
	p.run(after)
	if !p.ended(token) {
		t.Error("after_script does not revoke the Vault token")
	}
	// OpenBao ends a token's leases a moment after the token.
	waitFor(t, 10*time.Second, "the lease ends", func() bool {
		return m.do(t, "LIST", "sys/leases/lookup/cable/creds/ci", nil).status == 404
	})
	// If Cable is down, the job fails at once and still revokes.
	m.sim.SetFault(cabletest.Fault{Status: 500})
	m.costs(t, 1, "while Cable is down", func() {
		if out, err := p.try(script); err == nil || !strings.Contains(out, "responded 500") {
			t.Errorf("while Cable is down: %v\n%s", err, out)
		}
	})
	m.sim.ClearFaults()
	p.run(after)

	p.refusals("auth/jwt/login", map[string]any{
		"project_id": "4343", "ref": "feature", "ref_type": "tag", "ref_protected": "false",
		"aud": "https://gitlab.com",
	})
	m.smallest(t, filepath.Join(p.files, "policy.hcl"), map[string]request{
		"cable/creds/ci":         {method: "PUT", path: "cable/creds/ci", body: map[string]any{"ttl": "10m"}},
		"auth/token/revoke-self": {method: "PUT", path: "auth/token/revoke-self"},
	}, []request{
		{method: "PUT", path: "cable/creds/ci", body: map[string]any{"ttl": "1h"}},
		{method: "PUT", path: "cable/creds/ci", body: map[string]any{"ttl": "10m", "scopes": "transactions:read"}},
		{method: "GET", path: "cable/creds/ci"},
		{method: "PUT", path: "cable/creds/reports", body: map[string]any{"ttl": "10m"}},
		{method: "GET", path: "cable/roles/ci"},
		{method: "GET", path: "auth/token/lookup-self"},
	})
}

// TestExampleWorkflow shows that actionlint accepts the workflow.
func TestExampleWorkflow(t *testing.T) {
	t.Parallel()
	actionlint := filepath.Join(needTool(t, "ci"), "actionlint")
	out, err := run(actionlint, "-shellcheck=", "../examples/github-actions/report.yml")
	if err != nil || out != "" {
		t.Errorf("%v %s", err, out)
	}
}
