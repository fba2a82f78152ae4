// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// sumLabel states the sum of the binary inside an image, which is the sha256sum of
// OpenBao's plugin stanza. The image's config, its manifest and its entry in the
// index have it.
const sumLabel = "io.github.cablesecrets.plugin.sha256"

// writeImage writes one image for each of Linux's architectures, and an index
// of them, as an OCI layout, which is a folder, and as one file.
//
// OpenBao extracts the binary from the root of an image by its name; Vault's
// plugin runtime runs the entry point. Nothing else is in it but licenses.
func (r *release) writeImage() error {
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	annotations := map[string]string{
		"org.opencontainers.image.title":    project,
		"org.opencontainers.image.version":  "v" + r.version,
		"org.opencontainers.image.revision": r.commit,
		"org.opencontainers.image.created":  r.date.Format(time.RFC3339),
		"org.opencontainers.image.source":   "https://" + module,
		"org.opencontainers.image.licenses": "MPL-2.0",
	}
	linux := 0
	for _, b := range r.binaries {
		if b.goos != "linux" {
			continue
		}
		linux++
		own := maps.Clone(annotations)
		own[sumLabel] = b.sha256
		platform := v1.Platform{OS: b.goos, Architecture: b.goarch}
		if b.goarch == "arm" {
			platform.Variant = "v6"
		}
		image, err := r.image(b, platform, own)
		if err != nil {
			return fmt.Errorf("image for %s: %w", platform, err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add:        plainImage{image},
			Descriptor: v1.Descriptor{Platform: &platform, Annotations: map[string]string{sumLabel: b.sha256}},
		})
	}
	if linux == 0 {
		return nil
	}
	index = mutate.Annotations(index, annotations).(v1.ImageIndex)
	folder := fmt.Sprintf("dist/%s_%s_oci", project, r.version)
	path, err := layout.Write(folder, empty.Index)
	if err != nil {
		return err
	}
	name := map[string]string{"org.opencontainers.image.ref.name": "v" + r.version}
	if err := path.AppendIndex(index, layout.WithAnnotations(name)); err != nil {
		return err
	}
	return r.tarFolder(folder, folder+".tar")
}

// image returns the image for one platform.
func (r *release) image(b binary, platform v1.Platform, annotations map[string]string) (v1.Image, error) {
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	for _, file := range []struct {
		name, path string
		mode       int64
	}{
		{project, b.path, 0o755},
		{"LICENSE", "LICENSE", 0o644},
		{licensesFile, filepath.Join(".cache/release", licensesFile), 0o644},
	} {
		data, err := os.ReadFile(file.path)
		if err != nil {
			return nil, err
		}
		if err := r.tarFile(w, file.name, file.mode, data); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer.Bytes())), nil }
	l, err := tarball.LayerFromOpener(open, tarball.WithMediaType(types.OCILayer), tarball.WithCompressedCaching)
	if err != nil {
		return nil, err
	}
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	if image, err = mutate.ConfigFile(image, &v1.ConfigFile{
		OS: platform.OS, Architecture: platform.Architecture, Variant: platform.Variant,
		Created: v1.Time{Time: r.date},
		Config:  v1.Config{User: "65532:65532", Entrypoint: []string{"/" + project}, Labels: annotations},
		RootFS:  v1.RootFS{Type: "layers"},
	}); err != nil {
		return nil, err
	}
	if image, err = mutate.Append(image, mutate.Addendum{Layer: l, History: v1.History{
		Created: v1.Time{Time: r.date}, CreatedBy: "tools/release", Comment: "v" + r.version,
	}}); err != nil {
		return nil, err
	}
	return mutate.Annotations(image, annotations).(v1.Image), nil
}

// A plainImage is listed in an index without the artifact type of something that
// is no image.
type plainImage struct{ v1.Image }

func (plainImage) ArtifactType() (string, error) { return "", nil }

// tarFolder writes the files of a folder, in the order of their names.
func (r *release) tarFolder(folder, path string) error {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	files := os.DirFS(folder)
	if err := fs.WalkDir(files, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := fs.ReadFile(files, name)
		if err != nil {
			return err
		}
		return r.tarFile(w, name, 0o644, data)
	}); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	return os.WriteFile(path, out.Bytes(), 0o644)
}

func (r *release) tarFile(w *tar.Writer, name string, mode int64, data []byte) error {
	header := &tar.Header{Name: name, Mode: mode, Size: int64(len(data)), ModTime: r.date, Format: tar.FormatUSTAR}
	if err := w.WriteHeader(header); err != nil {
		return err
	}
	_, err := w.Write(data)
	return err
}
