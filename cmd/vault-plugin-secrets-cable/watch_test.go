// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"bufio"
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
	type session struct {
		*watch
		parentGone atomic.Bool
	}
	begin := func(s *session) { s.HandleConn(t.Context(), &stats.ConnBegin{}) }
	end := func(s *session) { s.HandleConn(t.Context(), &stats.ConnEnd{}) }
	gone := func(s *session) { s.parentGone.Store(true) }
	signal := func(s *session) { s.signals <- syscall.SIGTERM; synctest.Wait() }
	pass := func(d time.Duration) func(*session) { return func(*session) { time.Sleep(d) } }
	const half, hour = lookEvery / 2, time.Hour + lookEvery/2 // no step is at the time of a look
	tests := map[string]struct {
		steps []func(*session)
		ended time.Duration // since the start, or 0 if not within two hours
	}{
		"never connected, parent there": {},
		"never connected, parent gone":  {[]func(*session){pass(hour), gone}, hour - half + connectWithin},
		"never connected, signal":       {[]func(*session){pass(hour), signal}, hour + countWithin},
		"signal during the handshake":   {[]func(*session){signal, begin}, 0},
		"connected":                     {[]func(*session){begin}, 0},
		"connected, parent gone":        {[]func(*session){begin, gone}, 0},
		"connected, signals":            {[]func(*session){begin, gone, signal, signal}, 0},
		"one connection of two ended":   {[]func(*session){begin, begin, end, gone, signal}, 0},
		"connection and parent gone":    {[]func(*session){begin, pass(hour), gone, end}, hour + half},
		"first connection, then parent": {
			[]func(*session){begin, pass(hour), end, pass(2 * lookEvery), gone}, hour + half + 2*lookEvery,
		},
		"connection gone, no other sign": {[]func(*session){begin, pass(hour), end}, hour - half + alone},
		"connection gone, signal":        {[]func(*session){begin, pass(hour), end, signal}, hour + countWithin},
		"signal, then connection gone": {
			[]func(*session){begin, pass(hour), signal, pass(half), end}, hour + countWithin + alone,
		},
		"short connection":              {[]func(*session){begin, end}, alone},
		"short connection, parent gone": {[]func(*session){begin, end, gone}, lookEvery},
		"connected again": {
			[]func(*session){begin, pass(hour), end, pass(alone - lookEvery), begin, gone}, 0,
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s := &session{}
				s.watch = &watch{gone: s.parentGone.Load, signals: make(chan os.Signal, 1)}
				start := time.Now()
				ended := make(chan time.Duration, 1)
				go func() {
					s.wait()
					ended <- time.Since(start)
				}()
				for _, step := range tt.steps {
					step(s)
				}
				var got time.Duration
				select {
				case got = <-ended:
				case <-time.After(2*hour - time.Since(start)):
					s.open.Store(0) // wait has to end with the test
					s.signals <- syscall.SIGTERM
					<-ended
				}
				if got != tt.ended {
					t.Errorf("ended after %s, want %s (0s: not at all)", got, tt.ended)
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
	start := func(c *goplugin.Client) (err error) { _, err = c.Client(); return err }
	if command[0] == "unconnected" {
		command = command[1:]
		start = func(c *goplugin.Client) (err error) { _, err = c.Start(); return err }
	}
	if err := start(client(io.Discard, exec.Command(command[0], command[1:]...))); err != nil {
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

// TestServerKilled checks that a plugin ends if its server was killed, however the plugin was started.
func TestServerKilled(t *testing.T) {
	t.Parallel()
	plugin := build(t)
	inShell := func(script string) []string { return []string{"/bin/sh", "-c", script, plugin} }
	tests := map[string][]string{
		"child":                      {plugin},
		"child, not connected":       {"unconnected", plugin},
		"script":                     inShell(script),
		"script, not connected":      append([]string{"unconnected"}, inShell(script)...),
		"script, log redirected":     inShell(scriptQuiet),
		"script in a script":         inShell(`sh -c '"$0"; exit $?' "$0"; exit $?`),
		"in the background":          inShell(`exec 3<&0; "$0" <&3 3<&- & exec 3<&-; wait`),
		"PID namespace":              inShell(namespace),
		"script in a PID namespace":  inShell(`exec unshare --pid --fork --mount-proc sh -c '"$0"; exit $?' "$0"`),
		"PID namespace, log to file": inShell(namespace + ` 2>/dev/null`),
	}
	for name, command := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if runtime.GOOS == "windows" && len(command) > 2 {
				t.Skip("Windows has no shell scripts")
			}
			if strings.Contains(name, "namespace") {
				needProgram(t, "unshare", "--pid", "--fork", "--mount-proc", "true") // takes root, on Linux
			}
			// The plugin inherits the reading end of standard input. Once all of its
			// processes have ended, writing fails.
			r, w, err := os.Pipe()
			check(t, err)
			defer w.Close()
			sockets := t.TempDir()
			server := exec.Command(os.Args[0], append([]string{hostArg}, command...)...)
			server.Env = append(os.Environ(), "TMPDIR="+sockets)
			server.Stdin = r
			stdout := bufio.NewReader(must(server.StdoutPipe())(t))
			check(t, server.Start())
			_ = r.Close()
			if line, err := stdout.ReadString('\n'); line != "ready\n" {
				t.Fatalf("the server does not start: %q, %v", line, err)
			}
			_ = server.Process.Kill()
			_ = server.Wait()
			killed := time.Now()
			waitFor(t, "the plugin to end after its server was killed", func() bool {
				_, err := w.WriteString("x")
				return err != nil
			})
			t.Logf("ended after %s", time.Since(killed).Round(10*time.Millisecond))
			noSocket(t, sockets)
		})
	}
}

// waitFor waits for at most 20 seconds until a condition is met.
func waitFor(t *testing.T, condition string, met func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !met(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited 20s for %s", condition)
		}
	}
}

// noSocket checks that a plugin left none behind.
func noSocket(t *testing.T, dir string) {
	t.Helper()
	if left, err := filepath.Glob(filepath.Join(dir, "plugin*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %q, %v", left, err)
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
	const withPID = `echo $$ >"$1"; exec "$0"`
	tests := map[string]struct {
		script string    // $0 is the plugin, $1 a file for a process id
		signal os.Signal // sent to that process again and again, as an operator does
	}{
		"nothing happens":                  {`exec "$0"`, nil},
		"SIGHUP":                           {withPID, syscall.SIGHUP},
		"SIGINT":                           {withPID, syscall.SIGINT},
		"SIGTERM":                          {withPID, syscall.SIGTERM},
		"the script is killed":             {`echo $$ >"$1"; ` + script, syscall.SIGKILL},
		"the script ends":                  {`"$0" &`, nil},
		"the log goes to /dev/null":        {scriptQuiet, nil},
		"the log goes to a file":           {`"$0" 2>"$1"; exit $?`, nil},
		"the log is closed":                {`exec "$0" 2>&-`, nil},
		"no process reads the log":         {`{ "$0" 2>&1 >&3 | :; } 3>&1; exit $?`, nil},
		"no process reads standard output": {`"$0" | head -n 1; exit $?`, nil},
		"no process reads either":          {`"$0" 2>&1 | head -n 1; exit $?`, nil},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			file := filepath.Join(t.TempDir(), "pid")
			var stderr bytes.Buffer
			_, protocol := connect(t, &stderr, exec.Command("/bin/sh", "-c", tt.script, plugin, file))
			if tt.signal != nil {
				process := readProcess(t, file)
				for range 5 {
					_ = process.Signal(tt.signal)
					time.Sleep(10 * time.Millisecond)
				}
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

// TestSignal checks that a plugin without a connection ends at once on a signal, and leaves no socket behind.
func TestSignal(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("Windows has no signals that one process sends to another")
	}
	for _, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		for _, connected := range []bool{false, true} {
			t.Run(fmt.Sprintf("%v, was connected %t", signal, connected), func(t *testing.T) {
				t.Parallel()
				sockets := t.TempDir()
				cmd := exec.Command(build(t))
				cmd.Env = []string{"TMPDIR=" + sockets}
				client := client(io.Discard, cmd)
				t.Cleanup(client.Kill)
				addr := must(client.Start())(t)
				// A process without the server's certificate is not the server.
				stranger := must(net.Dial(addr.Network(), addr.String()))(t)
				defer stranger.Close()
				if connected {
					protocol := must(client.Client())(t)
					check(t, protocol.Ping())
					check(t, protocol.(*goplugin.GRPCClient).Conn.Close())
				}
				waitFor(t, "the plugin to end after a signal", func() bool {
					_ = cmd.Process.Signal(signal) // the plugin may not yet know that its connection is closed
					return client.Exited()
				})
				noSocket(t, sockets)
			})
		}
	}
}

// TestParent checks that a broken pipe is a sign, and that a file, an error or nothing is none.
func TestParent(t *testing.T) {
	t.Parallel()
	r, w, err := os.Pipe()
	check(t, err)
	defer w.Close()
	file := must(os.Create(filepath.Join(t.TempDir(), "log")))(t)
	defer file.Close()
	gone := newParent(w, file)
	if gone() {
		t.Error("there is a reader, and a parent")
	}
	_ = r.Close()
	if runtime.GOOS != "windows" {
		// Another test may be about to start a process, which has the read end as well until it runs.
		waitFor(t, "the pipe to be broken", gone)
	}
	if newParent(file)() || newParent()() || newParent(r)() {
		t.Error("a file, nothing, or a closed pipe is a sign")
	}
}
