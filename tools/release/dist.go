// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	cdx "github.com/CycloneDX/cyclonedx-go"
)

// A release is a commit, and the files that GoReleaser has left in dist/ for it.
type release struct {
	commit   string
	date     time.Time // of the commit
	version  string    // without the v
	snapshot string    // the version, with the v, if the commit has no tag
	binaries []binary
}

// A binary is the plugin for one platform.
type binary struct {
	goos, goarch, path, sha256 string
}

// file returns the name of a file of the release, with ".zip" for the platform's
// archive and ".cdx.json" for its SBOM.
func (b binary) file(version, suffix string) string {
	return fmt.Sprintf("%s_%s_%s_%s%s", project, version, b.goos, b.goarch, suffix)
}

// readDist reads the names of the binaries that GoReleaser has built.
func (r *release) readDist() error {
	var metadata struct{ Version string }
	var artifacts []struct{ Type, Path, Goos, Goarch string }
	for path, v := range map[string]any{"dist/metadata.json": &metadata, "dist/artifacts.json": &artifacts} {
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if err := json.Unmarshal(data, v); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	r.version = metadata.Version
	for _, a := range artifacts {
		if a.Type != "Binary" {
			continue
		}
		sum, err := sha256File(a.Path)
		if err != nil {
			return err
		}
		r.binaries = append(r.binaries, binary{a.Goos, a.Goarch, a.Path, sum})
	}
	slices.SortFunc(r.binaries, func(a, b binary) int {
		return strings.Compare(a.goos+"_"+a.goarch, b.goos+"_"+b.goarch)
	})
	return nil
}

// completeSBOMs adds the licenses that cyclonedx-gomod cannot know, of this module, of
// the standard library, and of the few modules whose license it does not recognize. It
// removes the sum of cyclonedx-gomod's own binary, which differs from host to host.
func (r *release) completeSBOMs(licenses collection) error {
	for _, b := range r.binaries {
		path := filepath.Join("dist", b.file(r.version, ".cdx.json"))
		if err := completeSBOM(path, b.sha256, licenses); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	return nil
}

func completeSBOM(path, sha256 string, licenses collection) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var bom cdx.BOM
	if err := cdx.NewBOMDecoder(bytes.NewReader(data), cdx.BOMFileFormatJSON).Decode(&bom); err != nil {
		return err
	}
	choice := func(ids ...string) *cdx.Licenses {
		var l cdx.Licenses
		for _, id := range ids {
			l = append(l, cdx.LicenseChoice{License: &cdx.License{ID: id}})
		}
		return &l
	}
	for i := range *bom.Metadata.Tools.Tools {
		(*bom.Metadata.Tools.Tools)[i].Hashes = nil
	}
	main := bom.Metadata.Component
	main.Licenses = choice("MPL-2.0")
	main.Hashes = &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA256, Value: sha256}}
	for i := range *bom.Components {
		c := &(*bom.Components)[i]
		ids := licenses.of(c.Name, c.Version)
		if c.Name == "std" {
			ids = licenses[0].ids
		}
		if len(ids) == 0 {
			return fmt.Errorf("%s %s is linked, but its license was not collected", c.Name, c.Version)
		}
		c.Licenses = choice(ids...)
	}
	var out bytes.Buffer
	if err := cdx.NewBOMEncoder(&out, cdx.BOMFileFormatJSON).SetPretty(true).Encode(&bom); err != nil {
		return err
	}
	return os.WriteFile(path, out.Bytes(), 0o644)
}

// writeSums writes the sums of the binaries, one for each platform, which `vault plugin
// register -sha256` takes, and then those of all files. A line's name is the path of the
// file after `unzip -d ARCHIVE ARCHIVE.zip`.
func (r *release) writeSums() error {
	base := fmt.Sprintf("dist/%s_%s_", project, r.version)
	var b strings.Builder
	for _, binary := range r.binaries {
		fmt.Fprintf(&b, "%s  %s\n", binary.sha256, binary.file(r.version, "/"+filepath.Base(binary.path)))
	}
	if err := os.WriteFile(base+"PLUGIN_SHA256SUMS", []byte(b.String()), 0o644); err != nil {
		return err
	}
	files, err := filepath.Glob(base + "*")
	if err != nil {
		return err
	}
	b.Reset()
	for _, file := range files {
		if info, err := os.Stat(file); err != nil {
			return err
		} else if info.IsDir() {
			continue // the image's layout, which is also there as a file
		}
		sum, err := sha256File(file)
		if err != nil {
			return err
		}
		fmt.Fprintf(&b, "%s  %s\n", sum, filepath.Base(file))
	}
	return os.WriteFile(base+"SHA256SUMS", []byte(b.String()), 0o644)
}

// removeOthers removes GoReleaser's own files from dist/, which differ each time.
func (r *release) removeOthers() error {
	files, err := os.ReadDir("dist")
	if err != nil {
		return err
	}
	for _, file := range files {
		if strings.HasPrefix(file.Name(), project+"_"+r.version+"_") {
			continue
		}
		if err := os.RemoveAll(filepath.Join("dist", file.Name())); err != nil {
			return err
		}
	}
	return nil
}

func sha256File(path string) (string, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:]), nil
}
