// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"cmp"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"github.com/hashicorp/vault/sdk/helper/pluginutil"
)

const setcap = "setcap cap_ipc_lock=+ep" // gives a file the capability to lock memory

// checkStart tries, ahead of go-plugin's server, the steps that can fail and that the
// server would report without a remedy, or not at all.
func checkStart() (remedy string, err error) {
	// Vault requests locked memory unless disable_mlock is set. The limit applies to
	// the address space, of which Go reserves more than a GiB.
	if err := pluginutil.OptionallyEnableMlock(); err != nil {
		file, _ := os.Executable()
		return fmt.Sprintf("run \"%s %s\", again after each upgrade of this file, "+
			"or set disable_mlock = true in Vault's configuration", setcap, file), fmt.Errorf("locking memory: %w", err)
	}
	// The server makes two pipes and a socket. If it gets no pipe, it ends the process
	// with a message on os.Stderr, which is the null device by now.
	for range 3 {
		r, w, err := os.Pipe()
		if err != nil {
			return "raise the limit of open files of Vault's process, such as LimitNOFILE in its systemd unit",
				fmt.Errorf("opening a pipe: %w", err)
		}
		defer func() { _, _ = r.Close(), w.Close() }()
	}
	// Without a certificate, by which the plugin knows its Vault, the server would serve
	// every client, without TLS. With one that cannot be read it would start, and then
	// refuse each connection. If Vault does not speak this protocol, it reports that.
	cert := os.Getenv("PLUGIN_CLIENT_CERT")
	switch versions := strings.Split(os.Getenv("PLUGIN_PROTOCOL_VERSIONS"), ","); {
	case !slices.Contains(versions, fmt.Sprint(protocolVersion)):
		return "", nil
	case cert == "":
		err = errors.New("PLUGIN_CLIENT_CERT is not set")
	case !x509.NewCertPool().AppendCertsFromPEM([]byte(cert)):
		err = errors.New("PLUGIN_CLIENT_CERT contains no certificate")
	}
	return "Vault sets PLUGIN_CLIENT_CERT for each plugin that it starts: " +
		"a wrapper script must leave the environment as it is", err
}

// startLogger is the logger of go-plugin's server, which logs an error only if it cannot start or continue.
type startLogger struct {
	hclog.Logger
	failed bool // whether an error was logged
}

// Error logs an error of go-plugin's server with its remedy.
func (l *startLogger) Error(msg string, args ...any) {
	var err error
	for _, arg := range args {
		if e, ok := arg.(error); ok {
			err = e
		}
	}
	remedy := "look at the error; if it does not help, report it with this line"
	if errors.As(err, new(*fs.PathError)) || errors.As(err, new(*net.OpError)) {
		folder := cmp.Or(os.Getenv(goplugin.EnvUnixSocketDir), os.TempDir())
		remedy = fmt.Sprintf("the plugin needs a socket in %s: let Vault's user create files there, or register the "+
			"plugin with -env=TMPDIR=FOLDER, the path of another folder, of at most 80 characters", folder)
	}
	l.fail(remedy, fmt.Errorf("%s: %w", msg, err))
}

// end logs a panic with its value, unless the server has logged the reason, and sets the exit status. Only go-plugin
// panics in serve, before a server has connected and sent a secret.
func (l *startLogger) end(status *int) {
	if p := recover(); p != nil && !l.failed {
		const remedy = "this is a defect of the plugin: report it with this line"
		l.fail(remedy, fmt.Errorf("panic: %v", p), "stack", string(debug.Stack()))
	}
	if l.failed {
		*status = 1
	}
}

// fail logs why the plugin cannot run, in one line with its remedy. Vault itself only guesses at a wrong architecture.
func (l *startLogger) fail(remedy string, err error, more ...any) {
	l.failed = true
	l.Logger.Error("plugin cannot run", append([]any{"error", err, "remedy", remedy}, more...)...)
}
