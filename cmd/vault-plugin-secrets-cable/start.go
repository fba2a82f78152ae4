// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"
	"strings"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"github.com/hashicorp/vault/sdk/helper/pluginutil"
)

// Whatever keeps the plugin from starting is one line at error level in Vault's
// log, with its remedy: all that Vault itself says of a plugin that ended is that
// it may be compiled for another architecture.

// setcap gives a file the capability to lock memory.
const setcap = "setcap cap_ipc_lock=+ep"

// startError keeps the plugin from starting.
type startError struct {
	err    error
	remedy string
	stack  string // of a panic
}

// checkStart does, before go-plugin's server, what can keep the plugin from
// starting and what that server would report without a remedy, or not at all.
func checkStart() *startError {
	// Vault asks for it unless disable_mlock is set. The limit that counts is that
	// of the address space, of which Go reserves more than a GiB.
	if err := pluginutil.OptionallyEnableMlock(); err != nil {
		file, _ := os.Executable()
		return &startError{fmt.Errorf("locking memory: %w", err), fmt.Sprintf(
			"run \""+setcap+" %s\", again after each upgrade of this file, or set disable_mlock = true in Vault's configuration", file), ""}
	}
	// The server makes two pipes and a socket. If it gets no pipe, it ends the
	// process with a word on os.Stderr, which nobody reads.
	for range 3 {
		r, w, err := os.Pipe()
		if err != nil {
			return &startError{fmt.Errorf("opening a pipe: %w", err), "raise the limit of open files of Vault's process, such as LimitNOFILE in its systemd unit", ""}
		}
		defer func() { _, _ = r.Close(), w.Close() }()
	}
	return checkClientCert(os.Getenv("PLUGIN_PROTOCOL_VERSIONS"), os.Getenv("PLUGIN_CLIENT_CERT"))
}

// checkClientCert checks the certificate by which the plugin knows its Vault.
// Without one the server would serve anybody, without TLS; with one that cannot
// be read it would start, and then refuse each connection.
func checkClientCert(versions, cert string) *startError {
	var err error
	switch {
	case !slices.Contains(strings.Split(versions, ","), fmt.Sprint(protocolVersion)):
		return nil // Vault is about to report that the protocol versions differ
	case cert == "":
		err = errors.New("PLUGIN_CLIENT_CERT is not set")
	case !x509.NewCertPool().AppendCertsFromPEM([]byte(cert)):
		err = errors.New("PLUGIN_CLIENT_CERT contains no certificate")
	default:
		return nil
	}
	return &startError{err, "Vault sets PLUGIN_CLIENT_CERT for each plugin that it starts: a wrapper script must leave the environment as it is", ""}
}

// startLogger is the logger of go-plugin's server, which logs an error only if
// it cannot start or go on.
type startLogger struct {
	hclog.Logger
	failed bool // something was logged
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
		folder := os.Getenv(goplugin.EnvUnixSocketDir)
		if folder == "" {
			folder = os.TempDir()
		}
		remedy = fmt.Sprintf("the plugin needs a socket in %s: let Vault's user create files there, or register the plugin with -env=TMPDIR=FOLDER, the path of another folder, of at most 80 characters", folder)
	}
	l.fail(&startError{fmt.Errorf("%s: %w", msg, err), remedy, ""})
}

// panicked logs a panic, unless the server has logged its reason.
func (l *startLogger) panicked(value any, stack []byte) {
	if !l.failed {
		l.fail(&startError{fmt.Errorf("panic: %v", value), "this is a defect of the plugin: report it with this line", string(stack)})
	}
}

func (l *startLogger) fail(e *startError) {
	l.failed = true
	args := []any{"error", e.err, "remedy", e.remedy}
	if e.stack != "" {
		args = append(args, "stack", e.stack)
	}
	l.Logger.Error("plugin cannot run", args...)
}
