// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// newClients follows the top of the clients' page, and returns a Vault token with
// the page's policy.
func newClients(t *testing.T) (s *shell, m *mount, token string) {
	t.Helper()
	s, m = newExample(t, "clients")
	s.run(blocksOf(t, "examples/clients/README.md")[0].text)
	return s, m, m.tokenWith(t, "reports", nil)
}

// TestExampleClients builds the application of examples/clients/go as its page
// says, runs its own tests, and runs it against the real Vault.
func TestExampleClients(t *testing.T) {
	t.Parallel()
	s, m, token := newClients(t)
	for _, name := range []string{"GOCACHE", "GOMODCACHE", "GOPROXY"} {
		s.env = append(s.env, name+"="+strings.TrimSpace(must(t, "go", "env", name)))
	}
	s.env = append(s.env, "GOFLAGS=-mod=readonly")
	s.runPage("examples/clients/README.md", map[string]step{"Top/1": {}, "Go/1": {}})
	s.run("go -C go test ./...")
	m.oneRead(t, "clients")
	s.endsWithTheReason(m, token, "./application")
	s.readsInTime(m, token, "./application", false)
}

// TestExampleClientsInstalled runs the clients that need something installed, and
// the playbook. It runs under make examples.
func TestExampleClientsInstalled(t *testing.T) {
	t.Parallel()
	needExamples(t)
	blocks := named(t, "examples/clients/README.md")
	// While the file suspended exists, the wall clock of the application is two hours
	// ahead, and its monotonic clock is not, as after the machine was suspended.
	for name, suspend := range map[string]struct{ file, text, env string }{
		"Python": {
			file: "sitecustomize.py",
			text: "import os, time\nreal = time.time\n" +
				"time.time = lambda: real() + (7200 if os.path.exists('suspended') else 0)\n",
			env: "PYTHONPATH=.",
		},
		"Node": {
			file: "suspend.mjs",
			text: "import fs from 'node:fs';\nconst real = Date.now;\n" +
				"Date.now = () => real() + (fs.existsSync('suspended') ? 7_200_000 : 0);\n",
			env: "NODE_OPTIONS=--import=./suspend.mjs",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, m, token := newClients(t)
			s.write(suspend.file, suspend.text)
			s.env = append(s.env, suspend.env)
			s.endsWithTheReason(m, token, blocks[name+"/1"])
			s.readsInTime(m, token, blocks[name+"/1"], true)
		})
	}
	t.Run("fork", func(t *testing.T) {
		t.Parallel()
		s, m, token := newClients(t)
		s.write("python/fork.py", `
import os, signal, threading, time
from tokensource import TokenSource
source = TokenSource()
threading.Thread(target=source.token, daemon=True).start()
while not source._reading:
    time.sleep(0.01)
pid = os.fork()
signal.alarm(20)  # ends a process that still waits then
source.token()
if pid:
    assert os.waitpid(pid, 0)[1] == 0, "the child has no token"
os._exit(0)
`)
		m.sim.SetFault(cabletest.Fault{Delay: 2 * time.Second, Times: 1})
		calls := m.sim.CallCount()
		s.run("export VAULT_TOKEN=" + token + "; /usr/bin/python3 python/fork.py")
		if n := m.sim.CallCount() - calls; n != 2 {
			t.Errorf("a process and its child made %d API calls", n)
		}
	})
	t.Run("Ansible", func(t *testing.T) {
		t.Parallel()
		s, m, token := newClients(t)
		addr, root := m.front(t, true, func(_ http.ResponseWriter, r *http.Request) bool {
			leaveNamespace(t, r)
			return false
		})
		s.write("ca.pem", root)
		s.env = append(s.env, "VAULT_ADDR="+addr, "VAULT_TOKEN="+token, "VAULT_NAMESPACE=team-a",
			"VAULT_CACERT="+s.place("ca.pem"))
		calls := m.sim.CallCount()
		out := s.run(blocks["Ansible/1"])
		log := readFile(t, s.place("ansible/report.log"))
		if !regexp.MustCompile(`^(a token of [1-9]\d+ characters\n){2}$`).MatchString(log) {
			t.Errorf("the hosts' log: %q", log)
		}
		if n := m.sim.CallCount() - calls; n != 1 || findSecret(out, false) != "" {
			t.Errorf("two hosts cost %d API calls, and the playbook prints %q", n, findSecret(out, false))
		}
		m.sim.SetFault(cabletest.Fault{Status: 500})
		if _, err := s.try(blocks["Ansible/1"]); err == nil || m.sim.CallCount() != calls+2 {
			t.Errorf("while Cable is down: %v, %d API calls", err, m.sim.CallCount()-calls-1)
		}
	})
}

// front starts a server in front of Vault, as a load balancer is. It forwards
// each request to which odd does not respond itself. With TLS, its certificate is
// of the authority root.
func (m *mount) front(
	t *testing.T, withTLS bool, odd func(http.ResponseWriter, *http.Request) bool,
) (addr, root string) {
	t.Helper()
	target, err := url.Parse(m.addr)
	noError(t, err)
	proxy := httputil.NewSingleHostReverseProxy(target)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !odd(w, r) {
			proxy.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(server.Close)
	server.Config.ErrorLog = log.New(io.Discard, "", 0) // clients that refuse the certificate
	if withTLS {
		certificate, ca := issue(t, "127.0.0.1")
		server.TLS = &tls.Config{Certificates: []tls.Certificate{certificate}}
		server.StartTLS()
		return server.URL, string(ca)
	}
	server.Start()
	return server.URL, ""
}

// leaveNamespace fails the test if a request is not for the namespace team-a, and
// removes the namespace, because not all servers have namespaces.
func leaveNamespace(t *testing.T, r *http.Request) {
	if got := r.Header.Get("X-Vault-Namespace"); strings.TrimSuffix(got, "/") != "team-a" {
		t.Errorf("a request for the namespace %q", got)
	}
	r.Header.Del("X-Vault-Namespace")
}

// endsWithTheReason shows that an application that has no token, and that a retry
// cannot help, ends at once with an error that says why.
func (s *shell) endsWithTheReason(m *mount, token, command string) {
	t := s.t
	t.Helper()
	at := func(path string) string {
		addr, _ := m.front(t, false, func(_ http.ResponseWriter, r *http.Request) bool {
			r.URL.Path = path
			return false
		})
		return addr
	}
	certificate, _ := m.front(t, true, func(http.ResponseWriter, *http.Request) bool { return false })
	for _, tt := range []struct{ name, addr, token, want string }{
		{"no policy", at("/v1/cable/creds/other"), token, "403|permission denied"},
		{"nothing there", at("/v1/nothing"), m.root, "404|no token"},
		{"no token there", at("/v1/cable/config"), m.root, "no token with a lease or a ttl"},
		{"unknown certificate", certificate, token, "(?i)certificate"},
		{"no TLS", strings.Replace(m.addr, "http:", "https:", 1), token, "(?i)ssl|https"},
	} {
		out, err := s.try(fmt.Sprintf("export VAULT_ADDR=%s VAULT_TOKEN=%s; timeout 20 %s", tt.addr, tt.token, command))
		if err == nil || err.Error() == "exit status 124" || !regexp.MustCompile(tt.want).MatchString(out) {
			t.Errorf("%s: the application ends with %v:\n%s", tt.name, err, out)
		}
	}
}

// readsInTime runs an application that uses a token once a second, through a
// load balancer with a certificate of its own authority. The application waits as
// long as a Retry-After asks, in each of its forms; it uses a token of 30 seconds
// during an outage, and reads again after it; of a token without a lease, it reads
// the next one when ttl says; and, where the test can suspend the application, it
// does not use a token whose lease ended meanwhile.
func (s *shell) readsInTime(m *mount, token, command string, suspends bool) {
	t := s.t
	t.Helper()
	var requests [4]atomic.Int64 // when the first of them came
	var n atomic.Int32
	addr, root := m.front(t, true, func(w http.ResponseWriter, r *http.Request) bool {
		leaveNamespace(t, r)
		i := n.Add(1) - 1
		if int(i) < len(requests) {
			requests[i].Store(time.Now().UnixNano())
		}
		switch i {
		case 0:
			w.Header().Set("Retry-After", time.Now().Add(4*time.Second).UTC().Format(http.TimeFormat))
		case 1:
			w.Header()["Retry-After"] = []string{"2", "2"}
		case 2:
			w.Header().Set("Retry-After", "9, 9")
		default:
			return false
		}
		http.Error(w, `{"errors":["no backend"]}`, http.StatusServiceUnavailable)
		return true
	})

	// With a longer wait than the engine's own for a request.
	m.ok(t, "POST", "cable/config", map[string]any{"request_timeout": "5s"})
	before := m.sim.CallCount()
	lifetime := 30 * time.Second
	m.sim.SetFault(cabletest.Fault{Status: 429, Header: map[string]string{"Retry-After": "8"}, Times: 1})
	m.sim.AddFault(cabletest.Fault{Grant: &cabletest.Grant{Lifetime: &lifetime}, Times: 1})
	m.sim.AddFault(cabletest.Fault{Status: 500})
	s.write("ca.pem", root)
	s.write("run", fmt.Sprintf("export VAULT_ADDR=%s VAULT_TOKEN=%s VAULT_CACERT=ca.pem VAULT_NAMESPACE=team-a\n"+
		"exec > out 2>&1\nexec %s", addr, token, command))
	stop := s.start(t, "sh", "run")
	defer stop()
	calls := func() int { return m.sim.CallCount() - before }
	waitFor(t, 90*time.Second, "the application mints after the pauses", func() bool { return calls() == 2 })
	all := m.sim.Calls()
	since := func(i int) time.Duration { return time.Duration(requests[i].Load() - requests[i-1].Load()) }
	for _, tt := range []struct {
		header    string
		got, want time.Duration
	}{
		{"a date in 3 to 4 seconds", since(1), 3 * time.Second},
		{"2, twice", since(2), 2 * time.Second},
		{"9, 9", since(3), 9 * time.Second},
		{"8", all[before+1].Time.Sub(all[before].Time), 8 * time.Second},
	} {
		if tt.got < tt.want || tt.got > tt.want*5/4+10*time.Second {
			t.Errorf("Retry-After: %s: the next request came %s later", tt.header, tt.got)
		}
	}
	status, _ := m.ok(t, "GET", "cable/status", nil).Data["token_requests"].(map[string]any)
	if fmt.Sprint(status["rate_limited"]) != "1" || status["paused"] != nil && fmt.Sprint(status["paused"]) != "0" {
		t.Errorf("the application did not wait for the pause to end: %v", status)
	}
	if out := readFile(t, s.place("out")); !strings.Contains(out, "no backend") {
		t.Errorf("while the application waits, it says:\n%s", out)
	}
	// In the outage, the next read fails once, and the current token is used.
	waitFor(t, 40*time.Second, "the application reads the next token", func() bool { return calls() == 3 })
	failed := time.Now()
	m.ok(t, "POST", "cable/roles/reports", map[string]any{"lease": false})
	used := func() int { return strings.Count(readFile(t, s.place("out")), "have a token") }
	lines := used()
	waitFor(t, 8*time.Second, "the application works during the outage", func() bool { return used() > lines+1 })
	m.sim.SetFault(cabletest.Fault{Grant: &cabletest.Grant{Lifetime: ptr(16 * time.Second)}, Times: 1})
	waitFor(t, time.Minute, "the application recovers", func() bool { return calls() == 4 })
	if wait := time.Since(failed); wait < 4*time.Second {
		t.Errorf("the read after the failure came %s later", wait)
	}
	waitFor(t, time.Minute, "the application reads again without a lease", func() bool { return calls() == 5 })
	all = m.sim.Calls()[before+3:]
	unleased := slices.DeleteFunc(m.reads(t)["reports"], func(r readOf) bool { return r.ttl == 0 })
	if wait := all[1].Time.Sub(all[0].Time); wait < unleased[0].ttl-time.Second { // it counts from its request
		t.Errorf("the read after a ttl of %s came %s later", unleased[0].ttl, wait)
	}
	if suspends {
		s.write("suspended", "")
		waitFor(t, time.Minute, "the application reads again after a suspension", func() bool { return calls() == 6 })
	}
	if out := readFile(t, s.place("out")); strings.Contains(out, cabletest.TokenMarker) {
		t.Error("the application printed the token")
	}
}

// must is run for a program that must succeed.
func must(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := run(name, args...)
	noError(t, err)
	return out
}
