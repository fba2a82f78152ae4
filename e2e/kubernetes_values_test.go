// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"

	"gopkg.in/yaml.v3"

	"github.com/hashicorp/hcl/hcl/ast"
)

// values has the keys of the server's Helm charts that docs/kubernetes.md sets, as far
// as Vault's chart 0.34.1 and OpenBao's 0.29.2 both have them, with the fields of the
// Kubernetes objects in them.
type values struct {
	Server struct {
		NodeSelector        map[string]string `yaml:"nodeSelector"`
		ExtraInitContainers []struct {
			Name, Image     string
			Args            []string
			SecurityContext struct {
				AllowPrivilegeEscalation bool `yaml:"allowPrivilegeEscalation"`
				ReadOnlyRootFilesystem   bool `yaml:"readOnlyRootFilesystem"`
				Capabilities             struct{ Drop []string }
			} `yaml:"securityContext"`
			VolumeMounts []volumeMount `yaml:"volumeMounts"`
		} `yaml:"extraInitContainers"`
		ExtraSecretEnvironmentVars []struct {
			EnvName    string `yaml:"envName"`
			SecretName string `yaml:"secretName"`
			SecretKey  string `yaml:"secretKey"`
		} `yaml:"extraSecretEnvironmentVars"`
		Volumes []struct {
			Name     string
			EmptyDir *struct{} `yaml:"emptyDir"`
			Image    struct{ Reference string }
		}
		VolumeMounts []volumeMount `yaml:"volumeMounts"`
		HA           struct {
			Enabled bool
			Raft    struct {
				Enabled bool
				Config  string
			}
		}
	}
}

// volumeMount is Kubernetes' object of that name.
type volumeMount struct {
	Name      string
	MountPath string `yaml:"mountPath"`
	SubPath   string `yaml:"subPath"`
	ReadOnly  bool   `yaml:"readOnly"`
}

// otherKeys are the charts' keys that the page names outside of its values.
const otherKeys = "global.imagePullSecrets server.standalone.config server.extraEnvironmentVars " +
	"server.statefulSet.securityContext.container"

// chartValues decodes a block of docs/kubernetes.md, strictly.
func chartValues(t *testing.T, name string) (v values) {
	t.Helper()
	d := yaml.NewDecoder(strings.NewReader(named(t, "docs/kubernetes.md")[name]))
	d.KnownFields(true)
	if err := d.Decode(&v); err != nil {
		t.Fatalf("docs/kubernetes.md#%s: %v", name, err)
	}
	return v
}

// TestKubernetesValues checks that the values of docs/kubernetes.md have no key that the
// charts lack, and fit together, the plugin and the configurations of docs/openbao.md.
func TestKubernetesValues(t *testing.T) {
	t.Parallel()
	needVault(t)
	const page = "docs/kubernetes.md"
	checkSteps(t, page, nil)
	for _, m := range regexp.MustCompile("`((?:server|global)\\.[\\w.]+)`").FindAllStringSubmatch(
		readFile(t, "../"+page), -1) {
		if !slices.Contains(strings.Fields(otherKeys), m[1]) {
			t.Errorf("the charts have no key %s", m[1])
		}
	}
	equal := func(name, got, want string) {
		t.Helper()
		if got != want || got == "" {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	pluginDirectory := map[string]string{}
	for _, chart := range []string{"vault", "openbao"} {
		server := chartValues(t, chart).Server
		if !server.HA.Enabled || !server.HA.Raft.Enabled {
			t.Errorf("%s: the chart does not use the configuration", chart)
		}
		equal("architecture for "+chart, server.NodeSelector["kubernetes.io/arch"], "amd64")
		fields := checkConfiguration(t, page+"#"+chart, server.HA.Raft.Config)
		dir := fields.Filter("plugin_directory").Items[0].Val.(*ast.LiteralType)
		pluginDirectory[chart], _ = dir.Token.Value().(string)
	}

	// Vault: the init container installs into the volume that is the server's plugin folder.
	vault := chartValues(t, "vault").Server
	install, volume, mount := vault.ExtraInitContainers[0], vault.Volumes[0], vault.VolumeMounts[0]
	if len(install.Args) != 2 || volume.EmptyDir == nil || !mount.ReadOnly || mount.SubPath != "" {
		t.Errorf("the init container and its volume: %+v", vault)
	}
	equal("folder of the init container", install.VolumeMounts[0].MountPath, install.Args[1])
	equal("volume of the init container", install.VolumeMounts[0].Name, volume.Name)
	equal("volume of the server", mount.Name, volume.Name)
	equal("folder of the server", mount.MountPath, pluginDirectory["vault"])
	into := t.TempDir()
	out, err := run(suite.plugin.File, install.Args[0], into)
	noError(t, err)
	installed := path.Join(into, pluginName+"-"+pluginVersion)
	equal("installed file", strings.TrimSpace(out), suite.sha256+"  "+installed)

	// The same file from an image volume, under the same name.
	image := chartValues(t, "image-volume").Server
	mounted := image.VolumeMounts[0]
	equal("volume with the image", mounted.Name, image.Volumes[0].Name)
	equal("image", image.Volumes[0].Image.Reference, install.Image)
	equal("file in the image", mounted.SubPath, pluginName)
	version := regexp.MustCompile(`:(v[\d.]+)@sha256:`).FindStringSubmatch(install.Image)[1]
	equal("mounted file", mounted.MountPath, path.Join(pluginDirectory["vault"], pluginName+"-"+version))

	// OpenBao: the stanzas of docs/openbao.md.
	bao := named(t, "docs/openbao.md")
	_, stanza, _ := strings.Cut(bao["declare"], "\n\n")
	contains(t, chartValues(t, "openbao").Server.HA.Raft.Config, stanza)
	if !strings.HasPrefix(pluginDirectory["openbao"], "/openbao/data/") { // the chart's data volume
		t.Errorf("OpenBao's plugins are in %s", pluginDirectory["openbao"])
	}
	key := chartValues(t, "openbao-key").Server.ExtraSecretEnvironmentVars[0]
	contains(t, bao["initialize"], `"`+key.EnvName+`"`)
}
