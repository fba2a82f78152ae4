// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Command injector serves the handler of Vault's injector, with the defaults of
// its command. That command runs in a pod only: it takes the address of the API
// server from there.
package main

import (
	"flag"
	"log"
	"net/http"
	"strconv"

	"github.com/hashicorp/go-hclog"
	injector "github.com/hashicorp/vault-k8s/agent-inject"
	"github.com/hashicorp/vault-k8s/agent-inject/agent"
)

func main() {
	listen := flag.String("listen", "127.0.0.1:0", "address")
	cert, key := flag.String("cert", "", "PEM file"), flag.String("key", "", "PEM file")
	vault := flag.String("vault-address", "", "Vault's address, for the pods")
	flag.Parse()
	h := injector.Handler{
		RequireAnnotation:          true,
		VaultAddress:               *vault,
		VaultAuthType:              agent.DefaultVaultAuthType,
		VaultAuthPath:              agent.DefaultVaultAuthPath,
		ImageVault:                 agent.DefaultVaultImage,
		Log:                        hclog.Default(),
		UserID:                     strconv.Itoa(agent.DefaultAgentRunAsUser),
		GroupID:                    strconv.Itoa(agent.DefaultAgentRunAsGroup),
		SetSecurityContext:         agent.DefaultAgentSetSecurityContext,
		DefaultTemplate:            agent.DefaultTemplateType,
		ResourceRequestCPU:         agent.DefaultResourceRequestCPU,
		ResourceRequestMem:         agent.DefaultResourceRequestMem,
		ResourceLimitCPU:           agent.DefaultResourceLimitCPU,
		ResourceLimitMem:           agent.DefaultResourceLimitMem,
		ExitOnRetryFailure:         agent.DefaultTemplateConfigExitOnRetryFailure,
		StaticSecretRenderInterval: "",
	}
	http.HandleFunc("/mutate", h.Handle)
	log.Fatal(http.ListenAndServeTLS(*listen, *cert, *key, nil))
}
