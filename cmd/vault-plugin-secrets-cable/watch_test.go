// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	goplugin "github.com/hashicorp/go-plugin"
	"google.golang.org/grpc/stats"
)

// TestWatch pins when the plugin ends, by a clock that is not the real one.
func TestWatch(t *testing.T) {
	t.Parallel()
	// session is a plugin for which wait runs.
	type session struct {
		*watch
		gone atomic.Bool // whether the system says that the parent is gone
	}
	// open opens a connection and returns a function that closes it.
	open := func(s *session) (end func()) {
		s.HandleConn(t.Context(), &stats.ConnBegin{})
		return func() { s.HandleConn(t.Context(), &stats.ConnEnd{}) }
	}
	signal := func(s *session) {
		s.signals <- syscall.SIGTERM
		synctest.Wait()
	}
	const day, halfLook = 24 * time.Hour, lookEvery / 2
	tests := map[string]struct {
		gone  bool // from the start
		do    func(*session)
		ended time.Duration // since the start, or 0 if not within two days
	}{
		"never connected, parent there": {do: func(*session) {}},
		"never connected, parent gone": {
			do:    func(s *session) { time.Sleep(time.Hour + halfLook); s.gone.Store(true) },
			ended: time.Hour + connectWithin,
		},
		"never connected, signal": {
			do:    func(s *session) { time.Sleep(time.Hour + halfLook); signal(s) },
			ended: time.Hour + halfLook + countWithin,
		},
		"signal during the handshake": {do: func(s *session) { signal(s); open(s) }},
		"connected":                   {do: func(s *session) { open(s) }},
		"connected, parent gone":      {do: func(s *session) { open(s); s.gone.Store(true) }},
		"connected, signals":          {do: func(s *session) { open(s); s.gone.Store(true); signal(s); signal(s) }},
		"one connection of two ended": {do: func(s *session) { open(s); open(s)(); s.gone.Store(true); signal(s) }},
		"connection and parent gone": {
			do:    func(s *session) { end := open(s); time.Sleep(day); s.gone.Store(true); end() },
			ended: day,
		},
		"first connection, then parent": {
			do: func(s *session) {
				end := open(s)
				time.Sleep(day)
				end()
				time.Sleep(1500 * time.Millisecond)
				s.gone.Store(true)
			},
			ended: day + 2*time.Second,
		},
		"connection gone, no other sign": {
			do:    func(s *session) { end := open(s); time.Sleep(day); end() },
			ended: day + alone,
		},
		"connection gone, signal": {
			do:    func(s *session) { end := open(s); time.Sleep(day); end(); time.Sleep(halfLook); signal(s) },
			ended: day + halfLook + countWithin,
		},
		"signal, then connection gone": {
			do:    func(s *session) { end := open(s); time.Sleep(day); signal(s); end() },
			ended: day + alone,
		},
		"short connection": {do: func(s *session) { open(s)() }, ended: alone},
		"connected again": {
			do: func(s *session) {
				end := open(s)
				time.Sleep(day)
				end()
				time.Sleep(alone - halfLook)
				open(s)
				s.gone.Store(true)
			},
		},
		"connected again, at once": {
			do: func(s *session) {
				for range 100 {
					open(s)()
				}
				open(s)
				s.gone.Store(true)
			},
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s := &session{}
				s.gone.Store(tt.gone)
				s.watch = newWatch(s.gone.Load)
				start := time.Now()
				ended := make(chan time.Duration, 1)
				go func() {
					s.wait()
					ended <- time.Since(start)
				}()
				tt.do(s)
				var got time.Duration
				select {
				case got = <-ended:
				case <-time.After(2*day - time.Since(start)):
				}
				if got != tt.ended {
					t.Errorf("ended after %s, want %s (0s: not at all)", got, tt.ended)
				}
				if got == 0 { // wait has to end with the test
					s.open.Store(0)
					s.signals <- syscall.SIGTERM
					<-ended
				}
			})
		})
	}
}

// hostArg makes this test program the server that host is.
const hostArg = "host-of-a-plugin"

// host starts a plugin by a command as Vault does, connects unless the first word
// is "unconnected", says so, and then waits to be killed.
func host(command ...string) {
	connect := command[0] != "unconnected"
	if !connect {
		command = command[1:]
	}
	client := client(io.Discard, exec.Command(command[0], command[1:]...))
	var err error
	if connect {
		_, err = client.Client()
	} else {
		_, err = client.Start()
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("ready")
	select {}
}

// wrappers are ways to start a plugin that Vault cannot know of: $0 is the plugin.
const (
	script      = `"$0" "$@"; exit $?`             // the shell stays the parent
	scriptQuiet = `"$0" "$@" 2>/dev/null; exit $?` // only standard output is a pipe
	namespace   = `exec unshare --pid --fork --mount-proc "$0" "$@"`
)

// TestServerKilled checks that a plugin ends if its server was killed, however the
// plugin was started.
func TestServerKilled(t *testing.T) {
	t.Parallel()
	plugin := build(t)
	tests := map[string][]string{
		"child":                  {plugin},
		"child, not connected":   {"unconnected", plugin},
		"script":                 {"/bin/sh", "-c", script, plugin},
		"script, not connected":  {"unconnected", "/bin/sh", "-c", script, plugin},
		"script, log redirected": {"/bin/sh", "-c", scriptQuiet, plugin},
		"script in a script":     {"/bin/sh", "-c", `sh -c '"$0"; exit $?' "$0"; exit $?`, plugin},
		"in the background":      {"/bin/sh", "-c", `exec 3<&0; "$0" <&3 3<&- & exec 3<&-; wait`, plugin},
		"PID namespace":          {"/bin/sh", "-c", namespace, plugin},
		"script in a PID namespace": {
			"/bin/sh", "-c", `exec unshare --pid --fork --mount-proc sh -c '"$0"; exit $?' "$0"`, plugin,
		},
		"PID namespace, log to file": {"/bin/sh", "-c", namespace + ` 2>/dev/null`, plugin},
	}
	for name, command := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if runtime.GOOS == "windows" && len(command) > 2 {
				t.Skip("Windows has no shell scripts")
			}
			if strings.Contains(name, "namespace") {
				needNamespace(t)
			}
			// The plugin inherits the reading end of standard input. Once all of its
			// processes have ended, writing fails.
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer w.Close()
			sockets := t.TempDir()
			server := exec.Command(os.Args[0], append([]string{hostArg}, command...)...)
			server.Env = append(os.Environ(), "TMPDIR="+sockets)
			server.Stdin = r
			stdout, err := server.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := server.Start(); err != nil {
				t.Fatal(err)
			}
			_ = r.Close()
			ready := make([]byte, len("ready"))
			if _, err := io.ReadFull(stdout, ready); err != nil || string(ready) != "ready" {
				more, _ := io.ReadAll(stdout)
				t.Fatalf("the server does not start: %v: %s%s", err, ready, more)
			}
			_ = server.Process.Kill()
			_ = server.Wait()
			killed := time.Now()
			for {
				if _, err := w.WriteString("x"); err != nil {
					break
				}
				if time.Since(killed) > 10*time.Second {
					t.Fatal("the plugin runs 10s after its server was killed")
				}
				time.Sleep(20 * time.Millisecond)
			}
			t.Logf("ended after %s", time.Since(killed).Round(10*time.Millisecond))
			if left, _ := filepath.Glob(filepath.Join(sockets, "plugin*")); len(left) > 0 {
				t.Errorf("left behind: %q", left)
			}
		})
	}
}

// needNamespace skips a test that needs a PID namespace, for which one must be
// root on Linux.
func needNamespace(t *testing.T) {
	t.Helper()
	if runtime.GOOS != "linux" {
		t.Skip("PID namespaces are Linux's")
	}
	needProgram(t, "unshare")
	if out, err := exec.Command("unshare", "--pid", "--fork", "--mount-proc", "true").CombinedOutput(); err != nil {
		skipUnlessRequired(t, fmt.Sprintf("no PID namespace: %v: %s", err, out))
	}
}

// TestServerRuns checks that a plugin runs while its server does, whatever happens to
// the plugin's parent, its pipes and itself.
func TestServerRuns(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("Windows has no shell scripts")
	}
	plugin := build(t)
	// signal sends s again and again, as an operator does.
	signal := func(s os.Signal) func(*testing.T, *os.Process) {
		return func(t *testing.T, p *os.Process) {
			t.Helper()
			for range 5 {
				if err := p.Signal(s); err != nil {
					t.Error(err)
				}
				time.Sleep(10 * time.Millisecond)
			}
		}
	}
	const withPID = `echo $$ >"$1"; exec "$0"`
	tests := map[string]struct {
		script string // $0 is the plugin, $1 a file for a process id
		do     func(t *testing.T, p *os.Process)
	}{
		"nothing happens": {script: `exec "$0"`},
		"SIGHUP":          {withPID, signal(syscall.SIGHUP)},
		"SIGINT":          {withPID, signal(os.Interrupt)},
		"SIGTERM":         {withPID, signal(syscall.SIGTERM)},
		"the script is killed": {`echo $$ >"$1"; ` + script, func(_ *testing.T, p *os.Process) {
			_ = p.Kill()
		}},
		"the script ends":              {script: `"$0" &`},
		"the log goes to /dev/null":    {script: scriptQuiet},
		"the log goes to a file":       {script: `"$0" 2>"$1"; exit $?`},
		"the log is closed":            {script: `exec "$0" 2>&-`},
		"nobody reads the log":         {script: `{ "$0" 2>&1 >&3 | :; } 3>&1; exit $?`},
		"nobody reads standard output": {script: `"$0" | head -n 1; exit $?`},
		"nobody reads either":          {script: `"$0" 2>&1 | head -n 1; exit $?`},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			file := filepath.Join(t.TempDir(), "pid")
			var stderr bytes.Buffer
			client := client(&stderr, exec.Command("/bin/sh", "-c", tt.script, plugin, file))
			t.Cleanup(client.Kill)
			protocol, err := client.Client()
			if err != nil {
				t.Fatal(err)
			}
			if tt.do != nil {
				tt.do(t, readProcess(t, file))
			}
			// Longer than a watch takes that knows of no stream. A call would be a sign.
			time.Sleep(connectWithin + 3*lookEvery/2)
			if err := protocol.Ping(); err != nil {
				t.Fatalf("the plugin has ended: %v; standard error: %s", err, &stderr)
			}
			// The one call that ends it.
			if err := protocol.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestSignal checks that a plugin without a connection ends at once on a signal, and
// leaves no socket behind.
func TestSignal(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("Windows has no signals that one process sends to another")
	}
	for _, connected := range []bool{false, true} {
		for _, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
			t.Run(fmt.Sprintf("%v, was connected %t", signal, connected), func(t *testing.T) {
				t.Parallel()
				cmd := exec.Command(build(t))
				cmd.Env = []string{"TMPDIR=" + t.TempDir()}
				client := client(io.Discard, cmd)
				t.Cleanup(client.Kill)
				addr, err := client.Start()
				if err != nil {
					t.Fatal(err)
				}
				// A process without the server's certificate is not the server.
				stranger, err := net.Dial(addr.Network(), addr.String())
				if err != nil {
					t.Fatal(err)
				}
				defer stranger.Close()
				if connected {
					protocol, err := client.Client()
					if err == nil {
						err = protocol.Ping()
					}
					if err == nil {
						err = protocol.(*goplugin.GRPCClient).Conn.Close()
					}
					if err != nil {
						t.Fatal(err)
					}
				}
				for end := time.Now().Add(20 * time.Second); !client.Exited(); time.Sleep(20 * time.Millisecond) {
					_ = cmd.Process.Signal(signal) // the plugin may not yet know that its connection is closed
					if time.Now().After(end) {
						t.Fatal("the plugin runs 20s after the signal")
					}
				}
				if left, _ := filepath.Glob(filepath.Join(cmd.Env[0][len("TMPDIR="):], "plugin*")); len(left) > 0 {
					t.Errorf("left behind: %q", left)
				}
			})
		}
	}
}

// TestBroken checks that an error is no sign of a missing reader.
func TestBroken(t *testing.T) {
	t.Parallel()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	gone := newParent(w)
	if gone() {
		t.Error("there is a reader, and a parent")
	}
	_ = r.Close()
	// Another test may be about to start a process, which has the read end as well
	// until it runs.
	end := time.Now().Add(10 * time.Second)
	for ; runtime.GOOS != "windows" && !gone(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("there is no reader")
		}
	}
	_ = w.Close()
	if gone() {
		t.Error("a closed pipe is a sign")
	}
	file, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if newParent(file)() || newParent()() || newParent(file, w)() {
		t.Error("a file, or nothing, is a sign")
	}
}
