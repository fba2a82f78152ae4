// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// writeVEX writes the OpenVEX document of the release in dist/, which says of each known
// vulnerability in a linked module why it does not affect the plugin. govulncheck finds
// that out from the source. A vulnerability that code of the plugin reaches is an error.
//
// The document is no part of the sums, because the database grows after the release.
func writeVEX(ctx context.Context, database string) error {
	sums, err := filepath.Glob("dist/" + project + "_*_PLUGIN_SHA256SUMS")
	if err != nil {
		return err
	}
	if len(sums) != 1 {
		return fmt.Errorf("dist/ has %d releases: build one first", len(sums))
	}
	stem := strings.TrimSuffix(sums[0], "_PLUGIN_SHA256SUMS")
	version := "v" + strings.TrimPrefix(filepath.Base(stem), project+"_")
	args := []string{"-format=openvex", "-db=" + database, command}
	cmd := exec.CommandContext(ctx, "govulncheck", args...) //nolint:gosec // the database that the user names
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("govulncheck: %w", err)
	}
	if out, err = completeVEX(out, version, filepath.Base(stem)+".openvex.json"); err != nil {
		return err
	}
	return os.WriteFile(stem+".openvex.json", out, 0o644)
}

// completeVEX fills in what govulncheck leaves open, namely who says this, of which product,
// and where the document is. The product is the main component of the release's SBOMs, and
// the same without a version, because a scanner finds none in the binary itself.
func completeVEX(document []byte, version, file string) ([]byte, error) {
	var vex map[string]any
	if err := json.Unmarshal(document, &vex); err != nil {
		return nil, fmt.Errorf("govulncheck's document: %w", err)
	}
	vex["@id"] = "https://" + module + "/releases/download/" + version + "/" + file
	vex["author"] = "The " + project + " authors"
	statements, _ := vex["statements"].([]any) // absent if there are none
	vex["statements"] = append([]any{}, statements...)
	for _, s := range statements {
		statement := s.(map[string]any)
		vulnerability := statement["vulnerability"].(map[string]any)["name"]
		if status := statement["status"]; status != "not_affected" {
			return nil, fmt.Errorf("%v is %v: govulncheck %s shows the calls", vulnerability, status, command)
		}
		var parts []any
		for _, product := range statement["products"].([]any) {
			for _, part := range product.(map[string]any)["subcomponents"].([]any) {
				purl := strings.ReplaceAll(part.(map[string]any)["@id"].(string), "%2F", "/") // as scanners write it
				parts = append(parts, map[string]any{"@id": purl})
				if name, std, ok := strings.Cut(purl, "/stdlib@v"); ok { // its name in the SBOM
					parts = append(parts, map[string]any{"@id": name + "/std@go" + std})
				}
			}
		}
		product := "pkg:golang/" + module
		statement["products"] = []any{
			map[string]any{"@id": product + "@" + version, "subcomponents": parts},
			map[string]any{"@id": product, "subcomponents": parts},
		}
	}
	return json.MarshalIndent(vex, "", "  ")
}
