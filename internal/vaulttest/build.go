// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package vaulttest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
)

// module is the path of this Go module.
const module = "github.com/cablesecrets/vault-plugin-secrets-cable"

// Find returns the server that scripts/vault finds or, once, builds: VAULT_BIN,
// the vault on PATH, or the version that tools/vault pins.
func Find(ctx context.Context) (binary string, err error) {
	root, err := output(ctx, "go", "list", "-m", "-f", "{{.Dir}}", module)
	if err != nil {
		return "", err
	}
	if binary, err = output(ctx, filepath.Join(root, "scripts", "vault"), "--path"); err != nil {
		return "", fmt.Errorf("finding or building Vault: %w", err)
	}
	return binary, nil
}

// Plugin is a plugin's binary.
type Plugin struct {
	Name    string // in the server's catalog
	Version string // "": the plugin's own
	File    string // in the server's plugin folder
}

// Build builds a program of this module into the folder dir. The program is that
// version if it is the plugin; "" leaves it as it is.
func Build(ctx context.Context, dir, program, version string) (Plugin, error) {
	p := Plugin{Name: path.Base(program), Version: version, File: filepath.Join(dir, path.Base(program))}
	stamp := "-X " + module + "/internal/version.stamped=" + version
	_, err := output(ctx, "go", "build", "-o", p.File, "-ldflags", stamp, module+"/"+program)
	return p, err
}

// Sum is the binary's SHA-256, in hexadecimal.
func (p Plugin) Sum() (string, error) {
	data, err := os.ReadFile(p.File)
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:]), err
}

// output returns the standard output of a program.
func output(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = fmt.Errorf("%w\n%s", err, exit.Stderr)
	}
	if err != nil {
		return "", fmt.Errorf("%s %s: %w", name, strings.Join(args, " "), err)
	}
	return strings.TrimSpace(string(out)), nil
}
