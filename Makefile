# Copyright (c) The vault-plugin-secrets-cable authors
# SPDX-License-Identifier: MPL-2.0

# Needs go, git and make. Everything else is built from source, once, into the
# ignored folders .cache and bin.
.DEFAULT_GOAL := help
SHELL := bash

# Go gives a build its version, from the tag or commit, but not in a linked work tree
# of git, where .git is a file: there it is written into the build.
PKG     := github.com/cablesecrets/vault-plugin-secrets-cable
LINKED  := $(shell test -f .git && TZ=UTC git show -s --abbrev=12 --date=format-local:%Y%m%d%H%M%S \
	--format='v0.0.0-%cd-%h %h' && git status --porcelain | head -n 1 | tr -c '\n' d)
LDFLAGS := -s -w $(if $(LINKED),-X $(PKG)/internal/version.commit=$(word 2,$(LINKED)) \
	-X $(PKG)/internal/version.stamped=$(firstword $(LINKED))$(if $(word 3,$(LINKED)),.dirty))
FUZZTIME ?= 30s

# The programs that tools/NAME pins, for the command that follows: $(call with,NAME...).
with = set -e; $(foreach t,$(1),dir=$$(scripts/tool $t); PATH=$$dir:$$PATH;)

.PHONY: help
help: ## Print the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

.PHONY: build
build: ## Build the plugin into bin/, which Vault takes as -dev-plugin-dir
	@rm -rf bin
	CGO_ENABLED=0 go build -buildvcs=auto -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/vault-plugin-secrets-cable

.PHONY: fips
fips: export GOFIPS140 = v1.0.0
fips: build ## Build the plugin with Go's FIPS 140-3 module v1.0.0

.PHONY: fips-test
fips-test: export GOFIPS140 = v1.0.0
fips-test: export GODEBUG = fips140=only
fips-test: ## Test the process and Cable's client with that module alone, and mint in a real server
	go test -count=1 ./cmd/vault-plugin-secrets-cable ./internal/cable
	GOFIPS140=off GODEBUG= E2E=require go test -count=1 -run '^TestFIPS$$' ./e2e

.PHONY: demo
demo: ## Show the engine at work on a real Vault, then clean up
	@scripts/demo

.PHONY: ha-demo
ha-demo: ## Kill the leader of a cluster of three under load, and count the tokens
	@scripts/ha-demo

.PHONY: dev
dev: ## Leave Vault, the plugin and a simulated Cable running until Ctrl-C
	@scripts/dev

# A test that needs more than Vault is skipped if that is not there. With E2E=require it fails.
.PHONY: test
test: ## Run the unit tests and the end-to-end tests on a real Vault
	@scripts/vault --path >/dev/null
	go test -shuffle=on -p 1 $(TESTFLAGS) ./...

.PHONY: check
check: export E2E ?= require
check: tidy lint shellcheck cross actionlint release-test servers ## Run what must be green before a change lands
	@$(MAKE) -s test TESTFLAGS=-race

.PHONY: compat
compat: ## Run the end-to-end tests on the SERVERS of docs/compatibility.md
	@scripts/prometheus --path >/dev/null
	@scripts/compat $(SERVERS)

.PHONY: examples
examples: ## Run the examples, with the consumers whose build takes minutes
	@$(MAKE) -s servers
	@for t in consumers kubernetes; do scripts/tool $$t >/dev/null || exit; done
	EXAMPLES=all go test -count=1 -timeout 60m -run '^TestExample' ./e2e

# The servers and tools of all end-to-end tests, built before go test's clock runs.
.PHONY: servers
servers:
	@scripts/vault --path >/dev/null
	@scripts/prometheus --path >/dev/null
	@for t in ci consumers/consul-template jq; do scripts/tool $$t >/dev/null || exit; done

.PHONY: lint
lint: ## Run the linters that .golangci.yml names
	$(call with,lint) golangci-lint run ./...; cd examples/clients/go; golangci-lint run ./...

CROSS ?= darwin/amd64 darwin/arm64 freebsd/amd64 windows/amd64 linux/386
.PHONY: cross
cross: ## Check that all compiles for the other systems, tests included
	cd tools/cross && GOFLAGS=-mod=readonly go run . ../.. $(CROSS)

.PHONY: tidy
tidy: ## Check that go.mod and go.sum are tidy
	go mod tidy -diff

.PHONY: shellcheck
shellcheck: ## Check the scripts, where shellcheck is installed
	@if command -v shellcheck >/dev/null; then shellcheck scripts/* .ci/run; else echo 'shellcheck is not installed: skipped'; fi

.PHONY: fuzz
fuzz: ## Run each fuzz target for FUZZTIME (30s)
	@scripts/fuzz $(FUZZTIME)

.PHONY: histories
histories: DURATION ?= 10m
histories: ## Check random histories for DURATION (10m), then a minute of a real cluster
	@scripts/vault --path >/dev/null
	go test -count=1 -timeout 0 -run '^TestHistories$$' . -histories $(DURATION)
	E2E=require go test -count=1 -timeout 10m -run '^TestClusterHistory$$' ./e2e -histories 1m

.PHONY: soak
soak: DURATION ?= 30m
soak: ## Read for DURATION (30m) on a cluster that changes, and see memory stay flat
	@scripts/vault --path >/dev/null
	E2E=require go test -count=1 -v -timeout 0 -run '^TestSoak$$' ./e2e -soak $(DURATION)

.PHONY: cost
cost: ## Compare memory and allocations of a read with BASE, the last tag
	@scripts/cost $(BASE)

.PHONY: mutants
mutants: ## Make faults and see tests fail; SINCE=commit for lines changed since
	go run ./internal/mutants $(if $(SINCE),-since $(SINCE))

.PHONY: bench
bench: ## Measure a read side by side with the floor; BENCH='-slice 1s …' for options
	@go build -o .cache/ ./internal/bench
	@.cache/bench $(BENCH)

# Releases: docs/releasing.md. A tag is compiled by the Go that is pinned, which Go
# fetches if another one is installed; a snapshot by the Go that is there.
TAG = $(shell git describe --tags --exact-match --match 'v*' 2>/dev/null)
RELEASE_GO ?= $(if $(TAG),$(shell sed -n 's/^toolchain //p' tools/release/go.mod),$(shell go env GOTOOLCHAIN))

.PHONY: release
release: export GOTOOLCHAIN = $(RELEASE_GO)
release: ## Build the release of HEAD's tag, or a snapshot, into dist/
	$(call with,release) go -C tools/release run . build $(if $(PLATFORMS),-platforms $(PLATFORMS))

.PHONY: vex
vex: export GOTOOLCHAIN = $(RELEASE_GO)
vex: ## Write the OpenVEX document of the release in dist/, from govulncheck
	$(call with,ci release) go -C tools/release run . vex

.PHONY: release-verify
release-verify: ## Build VERSION again and compare with the files in FROM
	@scripts/release-verify '$(VERSION)' '$(FROM)'

.PHONY: release-test
release-test: ## Test the release tools; RELEASE_TEST=all for all platforms
	$(call with,lint) cd tools/release; golangci-lint run ./...
	$(call with,ci release cosign) go -C tools/release test -count=1 -timeout 60m ./...

.PHONY: actionlint
actionlint: ## Check the workflows
	$(call with,ci) actionlint

.PHONY: cable-schema
cable-schema: ## Compare the OpenAPI document that Cable publishes with what the engine assumes
	curl -fsSL https://docs.cable.tech/openapi.json | go run ./internal/cabletest/schema

.PHONY: vulncheck
vulncheck: ## Look for known vulnerabilities in what is linked
	$(call with,ci) govulncheck ./cmd/vault-plugin-secrets-cable
