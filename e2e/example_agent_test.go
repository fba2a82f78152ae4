// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/vaulttest"
)

// smallest shows that the policy in a file permits the needed requests of a
// consumer, which it has by their path, and nothing else, and that they fail without
// each of its paths.
func (m *mount) smallest(t *testing.T, file string, needed map[string]request, refused []request) {
	t.Helper()
	policy := readFile(t, file)
	tokenWith := func(text string) string {
		m.writePolicy(t, "smallest", text)
		return m.tokenWith(t, "smallest", nil)
	}
	status := func(r request, token string) int {
		t.Helper()
		return m.as(t, token, r.method, r.path, r.body).status
	}
	for path := range needed {
		without := regexp.MustCompile(`(?ms)^path "`+path+`" \{.*?^\}`).ReplaceAllString(policy, "")
		if without == policy {
			t.Errorf("%s does not name %s", file, path)
		}
		if got := status(needed[path], tokenWith(without)); got != 403 {
			t.Errorf("%s without %s: HTTP %d", file, path, got)
		}
	}
	token := tokenWith(policy)
	for _, r := range refused {
		if got := status(r, token); got != 403 {
			t.Errorf("%s %s %v under %s: HTTP %d, want 403", r.method, r.path, r.body, file, got)
		}
	}
	for path, r := range needed { // last, because one may revoke the token
		if got := status(r, tokenWith(policy)); got/100 != 2 {
			t.Errorf("%s under %s: HTTP %d", path, file, got)
		}
	}
}

// costs fails the test unless do makes this number of API calls.
func (m *mount) costs(t *testing.T, want int, of string, do func()) {
	t.Helper()
	before := m.sim.CallCount()
	do()
	if n := m.sim.CallCount() - before; n != want {
		t.Errorf("%s: %d API calls, want %d", of, n, want)
	}
}

// requested fails the test unless the last API call requested this lifetime.
func (m *mount) requested(t *testing.T, seconds int64) {
	t.Helper()
	if calls := m.sim.Calls(); calls[len(calls)-1].ExpirySeconds != seconds {
		t.Errorf("%ds were requested, want %ds", calls[len(calls)-1].ExpirySeconds, seconds)
	}
}

// newExample returns a server with the role reports, and a shell that follows an
// example's page in a copy of its folder.
func newExample(t *testing.T, name string) (*shell, *mount) {
	t.Helper()
	s, m := newApplication(t)
	noError(t, os.CopyFS(s.dir, os.DirFS(filepath.Join("../examples", name))))
	// An Agent runs on another machine, without the operator's token.
	s.edit = strings.NewReplacer("vault agent", "env -u VAULT_TOKEN vault agent")
	return s, m
}

// change replaces text in a file of the example, which must be in it.
func (s *shell) change(file string, oldnew ...string) {
	s.t.Helper()
	text := readFile(s.t, s.place(file))
	for i := 0; i < len(oldnew); i += 2 {
		if !strings.Contains(text, oldnew[i]) {
			s.t.Fatalf("%s has no %q", file, oldnew[i])
		}
	}
	s.write(file, strings.NewReplacer(oldnew...).Replace(text))
}

// oneRead is smallest for a consumer that only reads.
func (m *mount) oneRead(t *testing.T, name string) {
	t.Helper()
	m.smallest(t, filepath.Join("../examples", name, "policy.hcl"), map[string]request{
		"cable/creds/reports": {method: "GET", path: "cable/creds/reports"},
	}, []request{
		{method: "PUT", path: "cable/creds/reports", body: map[string]any{"ttl": "10m"}},
		{method: "GET", path: "cable/creds/other"},
		{method: "GET", path: "cable/roles/reports"},
		{method: "GET", path: "cable/config"},
		{method: "GET", path: "cable/status"},
	})
}

// rendered checks the file that an Agent has written, which only its user may read.
func (s *shell) rendered(pattern string) {
	s.t.Helper()
	info, err := os.Stat(s.place("app.env"))
	noError(s.t, err)
	text := readFile(s.t, s.place("app.env"))
	if info.Mode() != 0o600 || !regexp.MustCompile(pattern).MatchString(text) {
		s.t.Errorf("app.env has the mode %v and %d bytes that do not match %s", info.Mode(), len(text), pattern)
	}
}

// soon is a renewal threshold with which a lease of 300 s is read again after 3
// to 18 s: Agent and consul-template vary it by a twentieth of the lease.
const soon = "0.01"

// failsFast has an Agent give up after its second attempt instead of its 13th.
const failsFast = "\nvault {\n  retry {\n    num_retries = 1\n  }\n}\n"

// fileText matches the file that Agent writes with file.hcl.
const fileText = `^CABLE_TOKEN=eyJ\S+\nCABLE_TOKEN_EXPIRES_AT=2\S+Z\nCABLE_SCOPE="person:read transactions:read"\n$`

// TestExampleVaultAgent follows the page of examples/vault-agent, with an Agent
// that exits and one that keeps a file up to date, and shows the use of each
// setting of the files.
func TestExampleVaultAgent(t *testing.T) {
	t.Parallel()
	s, m := newExample(t, "vault-agent")
	m.ok(t, "POST", "cable/roles/reports", map[string]any{"ttl": "300s"})
	m.costs(t, 1, "an init container", func() {
		s.runPage("examples/vault-agent/README.md", map[string]step{
			"Set up/1": {},
			"Run/1": {after: func(string) {
				s.rendered(`^CABLE_TOKEN=eyJ\S+\n$`)
				if s.exists("secret-id") {
					t.Error("the SecretID is left")
				}
			}},
		})
	})
	m.oneRead(t, "vault-agent")

	newSecretID := "vault write -f -field=secret_id auth/approle/role/reports/secret-id > secret-id"
	s.run(newSecretID)
	// once runs an Agent that exits when it has written its file.
	once := func(text string) (string, error) {
		t.Helper()
		s.write("once.hcl", "exit_after_auth = true\n"+text)
		return s.try("rm -f app.env; timeout 50 vault agent -config=login.hcl -config=once.hcl")
	}
	file := readFile(t, s.place("file.hcl"))

	// One read for all values of a file, and another one before the lease ends.
	if lacks(vaulttest.RenewalThreshold) == "" {
		s.run("rm app.env")
		s.write("soon.hcl", strings.Replace(file, "0.75", soon, 1))
		calls := m.sim.CallCount()
		stop := s.start(t, "vault", "agent", "-config=login.hcl", "-config=soon.hcl")
		waitFor(t, 30*time.Second, "Agent writes the file", func() bool { return s.exists("app.env") })
		s.rendered(fileText)
		first := readFile(t, s.place("app.env"))
		waitFor(t, 50*time.Second, "Agent writes the next token", func() bool {
			return readFile(t, s.place("app.env")) != first
		})
		s.rendered(fileText)
		stop()
		if n := m.sim.CallCount() - calls; n < 2 || n > 4 {
			t.Errorf("two leases cost %d API calls", n)
		}
	}
	if !s.exists("secret-id") {
		t.Error("an Agent that may start again has removed the SecretID")
	}

	// Without perms, each user of the host can read the token.
	if out, err := once(strings.Replace(file, `perms                = "0600"`, "", 1)); err != nil {
		t.Errorf("without perms: %v\n%s", err, out)
	} else if info, err := os.Stat(s.place("app.env")); err != nil || info.Mode()&0o044 == 0 {
		t.Errorf("without perms: %v, %v", info.Mode(), err)
	}
	// Of a name that the secret does not have, Agent writes nothing, or a file that
	// looks well.
	misspelled := strings.Replace(file, ".Data.token", ".Data.tokn", 1)
	out, err := once(misspelled)
	if err == nil || s.exists("app.env") || !strings.Contains(out, "tokn") {
		t.Errorf("with a misspelled field: %v\n%s", err, out)
	}
	out, err = once(strings.Replace(misspelled, "error_on_missing_key = true", "", 1))
	if err != nil || !strings.HasPrefix(readFile(t, s.place("app.env")), "CABLE_TOKEN=<no value>") {
		t.Errorf("with a misspelled field and without error_on_missing_key: %v\n%s", err, out)
	}
	// A list takes sprig_join, not join.
	joined := func(function string) error {
		_, err := once(strings.Replace(file, ".Data.scope ", `.Data.scopes | `+function+` "," `, 1))
		return err
	}
	if err := joined("sprig_join"); err != nil {
		t.Errorf("sprig_join: %v", err)
	} else {
		s.rendered(`CABLE_SCOPE="person:read,transactions:read"`)
	}
	if err := joined("join"); err == nil {
		t.Error("join takes the list")
	}
	// Parameters are an update.
	short := strings.Replace(file, `"cable/creds/reports"`, `"cable/creds/reports" "ttl=5m"`, 1)
	if _, err := once(short); err == nil {
		t.Error("a template with parameters needs no update")
	}
	m.writePolicy(t, "reports", `path "cable/creds/reports" { capabilities = ["update"] }`)
	if out, err := once(short); err != nil {
		t.Errorf("a template with parameters: %v\n%s", err, out)
	}
	m.writePolicy(t, "reports", readFile(t, s.place("policy.hcl")))
	// While Cable is down, Agent exits in the end, and the file stays.
	s.write("app.env", "the last token")
	m.sim.SetFault(cabletest.Fault{Status: 500})
	s.write("down.hcl", failsFast+file)
	out, err = s.try("timeout 50 vault agent -config=login.hcl -config=down.hcl")
	if err == nil || !strings.Contains(err.Error(), "exit status 1") || !strings.Contains(out, "responded 500") {
		t.Errorf("while Cable is down, Agent ends with %v:\n%s", err, out)
	}
	if got := readFile(t, s.place("app.env")); got != "the last token" {
		t.Error("while Cable is down, Agent changes the file")
	}
	m.sim.ClearFaults()
	// Without exit_on_retry_failure, one disabled role has Agent mint again for its other
	// roles, each time that it gives up.
	m.ok(t, "POST", "cable/roles/off", map[string]any{"scopes": "person:read", "disabled": true})
	m.writePolicy(t, "reports", `path "cable/creds/*" { capabilities = ["read"] }`)
	_, template, _ := strings.Cut(file, "\n}\n")
	s.write("off.hcl", failsFast+template+strings.NewReplacer("creds/reports", "creds/off", "app.env", "off").
		Replace(template))
	minted := m.sim.Stats().Minted
	stop := s.start(t, "vault", "agent", "-config=login.hcl", "-config=off.hcl")
	waitFor(t, 50*time.Second, "Agent mints the good role's third token", func() bool {
		return m.sim.Stats().Minted >= minted+3
	})
	stop()
	if s.exists("off") {
		t.Error("Agent rendered a token of the disabled role")
	}
}

// TestExampleVaultAgentSupervisor runs the application of examples/vault-agent
// under Agent. It starts again with each new token, and runs on while Cable is
// down, if Agent may.
func TestExampleVaultAgentSupervisor(t *testing.T) {
	t.Parallel()
	s, m := newExample(t, "vault-agent")
	m.ok(t, "POST", "cable/roles/reports", map[string]any{"ttl": "300s"})
	s.runPage("examples/vault-agent/README.md", map[string]step{"Set up/1": {}, "Run/1": {}})
	s.run("vault write -f -field=secret_id auth/approle/role/reports/secret-id > secret-id")
	starts := func() int {
		data, _ := os.ReadFile(s.place("app.log"))
		return strings.Count(string(data), "started with a token of")
	}
	alive := func() bool { _, err := s.try(`kill -0 "$(cat app.pid)"`); return err == nil }
	s.change("app", "while :", "echo $$ > app.pid\nwhile :")
	end := func() { // also when the test's context has ended
		kill := exec.Command("sh", "-c", `kill "$(cat app.pid)"`)
		kill.Dir = s.dir
		_ = kill.Run()
	}
	t.Cleanup(end)

	if lacks(vaulttest.RenewalThreshold) == "" {
		s.change("supervisor.hcl", "0.75", soon)
		calls := m.sim.CallCount()
		stop := s.start(t, "vault", "agent", "-config=login.hcl", "-config=supervisor.hcl")
		waitFor(t, time.Minute, "the application starts again", func() bool { return starts() >= 2 })
		stop()
		// Two variables of one path take one read.
		if n := m.sim.CallCount() - calls; n > starts()+1 {
			t.Errorf("%d starts cost %d API calls", starts(), n)
		}
		log := readFile(t, s.place("app.log"))
		started := regexp.MustCompile(`(?m)^started with a token of \d{2,} characters, valid until 2\S+Z$`)
		if !started.MatchString(log) {
			t.Errorf("the application's log:\n%s", log)
		}
		waitFor(t, 10*time.Second, "the application ends with Agent", func() bool { return !alive() })
	}

	if reason := lacks(vaulttest.RenewalThreshold); reason != "" {
		t.Skip("an outage while the application runs: ", reason)
	}

	// While Cable is down, the application runs on.
	s.write("supervisor.hcl", failsFast+readFile(t, s.place("supervisor.hcl")))
	before := starts()
	stop := s.start(t, "vault", "agent", "-config=login.hcl", "-config=supervisor.hcl")
	waitFor(t, 30*time.Second, "the application starts", func() bool { return starts() > before && alive() })
	m.sim.SetFault(cabletest.Fault{Status: 500})
	calls := m.sim.CallCount()
	waitFor(t, 50*time.Second, "Agent gives up and tries again", func() bool { return m.sim.CallCount()-calls >= 7 })
	if !alive() {
		t.Error("while Cable is down, the application ends")
	}
	stop()
	end() // an Agent that is ended between two tries leaves it behind, too
	m.sim.ClearFaults()

	// With exit_on_retry_failure, Agent exits and leaves it behind.
	s.change("supervisor.hcl", "template_config {", "template_config {\n  exit_on_retry_failure = true")
	before = starts()
	exited := make(chan error, 1)
	go func() {
		_, err := s.try("timeout 50 vault agent -config=login.hcl -config=supervisor.hcl > agent.log 2>&1")
		exited <- err
	}()
	waitFor(t, 30*time.Second, "the application starts", func() bool { return starts() > before && alive() })
	m.sim.SetFault(cabletest.Fault{Status: 500})
	if err := <-exited; err == nil || err.Error() != "exit status 1" || !alive() {
		t.Errorf("while Cable is down, Agent ends with %v; the application runs: %t", err, alive())
	}
}

// TestExampleVaultProxy follows the page of examples/vault-proxy. Each request
// through Proxy is a read, and is sent once.
func TestExampleVaultProxy(t *testing.T) {
	t.Parallel()
	s, m := newExample(t, "vault-proxy")
	addr := fmt.Sprintf("127.0.0.1:%d", freePort(t))
	s.change("proxy.hcl", "127.0.0.1:8100", addr)
	s.edit = strings.NewReplacer("127.0.0.1:8100", addr)
	m.costs(t, 1, "one request through Proxy", func() {
		s.runPage("examples/vault-proxy/README.md", map[string]step{
			"Set up/1": {},
			"Run/2": {
				before: func() {
					s.start(t, "vault", "proxy", "-config=proxy.hcl")
					waitFor(t, 30*time.Second, "Proxy forwards", func() bool {
						_, err := s.try("curl -sf -H 'X-Vault-Request: true' http://" + addr + "/v1/sys/health")
						return err == nil
					})
				},
				want: []string{`"token":"eyJ`},
			},
		})
	})
	const header = "-H 'X-Vault-Request: true'"
	read := "curl -s -o out -w '%{http_code}' " + header + " http://" + addr + "/v1/cable/creds/reports"
	responds := func(calls int, status, command string) {
		t.Helper()
		m.costs(t, calls, status, func() {
			if out := s.run(command); out != status {
				t.Errorf("%s: HTTP %s, want %s", command, out, status)
			}
		})
	}
	responds(1, "200", read)
	responds(0, "412", strings.Replace(read, header, "", 1)) // as a page in a browser sends it
	m.sim.SetFault(cabletest.Fault{Status: 500})
	responds(1, "502", read)
	m.sim.ClearFaults()
	m.ok(t, "POST", "cable/roles/reports", map[string]any{"ttl": "1h", "reuse_for": "5m"})
	responds(1, "200", read)
	responds(0, "200", read)
	m.oneRead(t, "vault-proxy")
}

// TestExampleConsulTemplate follows the page of examples/consul-template, with
// the real program.
func TestExampleConsulTemplate(t *testing.T) {
	t.Parallel()
	dir := needTool(t, "consumers/consul-template")
	s, m := newExample(t, "consul-template")
	noError(t, os.Symlink(filepath.Join(dir, "consul-template"), s.place(".bin/consul-template")))
	m.ok(t, "POST", "cable/roles/reports", map[string]any{"ttl": "300s"})
	calls := m.sim.CallCount()
	s.runPage("examples/consul-template/README.md", map[string]step{
		"Set up/1": {},
		"Run/1": {after: func(string) {
			s.rendered(`^CABLE_TOKEN=eyJ\S+\nCABLE_SCOPE="person:read transactions:read"\n$`)
		}},
	})
	if n := m.sim.CallCount() - calls; n != 1 {
		t.Errorf("once: %d API calls", n)
	}
	s.change("consul-template.hcl", "0.75", soon)
	s.env = append(s.env, "VAULT_TOKEN="+strings.TrimSpace(readFile(t, s.place("vault-token"))))
	first := readFile(t, s.place("app.env"))
	stop := s.start(t, "consul-template", "-config=consul-template.hcl")
	waitFor(t, 50*time.Second, "consul-template writes two more tokens", func() bool {
		return m.sim.CallCount()-calls >= 3 && readFile(t, s.place("app.env")) != first
	})
	stop()
	m.oneRead(t, "consul-template")
}
