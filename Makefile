# Everything that CI does can be run from here. Targets that begin with lab- and
# those that use the laboratory need root on a Debian 12.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
GO ?= go
LAB_URL ?= qemu:///system

# exists returns those of the given directories that are there, as packages below.
exists = $(foreach d,$(1),$(if $(wildcard $(d)/.),./$(d)/...))
RACE_PKGS = $(call exists,hypervisor repository fakes nbd internal backup restore)
LAB_PKGS = $(call exists,drivers/kvm lab cmd)

.PHONY: help test race lint ci lab-up lab-down lab-test tools kopia mutants planted faults bench nightly reliability \
	sbom reproducible vulncheck

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

test: ## tests that need nothing but Go
	$(GO) test ./...

race: ## tests under the race detector, where goroutines are many
	$(GO) test -race -timeout 15m $(RACE_PKGS)

lint: tools ## golangci-lint, and go vet for each set of build tags
	tools/bin/golangci-lint run --allow-parallel-runners ./...
	$(GO) vet ./...

ci: ## what CI runs
	bash .ci/run

lab-up: ## start the KVM laboratory (installs Debian packages)
	lab/kvm/up

lab-down: ## stop the KVM laboratory
	lab/kvm/down

lab-test: lab-up ## tests against the laboratory
	HOLDFAST_REQUIRE=tools,kvm HOLDFAST_LAB_KVM=$(LAB_URL) $(GO) test -count=1 -p 1 -timeout 20m $(LAB_PKGS)

tools: tools/bin/golangci-lint tools/bin/gofumpt ## build the pinned linters into tools/bin

kopia: tools/bin/kopia ## build the stock kopia program into tools/bin

tools/bin/golangci-lint: tools/lint.mod tools/lint.sum
	cd tools && $(GO) build -modfile=lint.mod -o bin/golangci-lint github.com/golangci/golangci-lint/v2/cmd/golangci-lint

tools/bin/gofumpt: tools/lint.mod tools/lint.sum
	cd tools && $(GO) build -modfile=lint.mod -o bin/gofumpt mvdan.cc/gofumpt

tools/bin/kopia: tools/go.mod tools/go.sum
	cd tools && $(GO) build -o bin/kopia github.com/kopia/kopia

# Each of these runs the script of its name, which comes with the campaign that
# needs it. A target without a script fails: it must not look as if it had run.
mutants: ## kill the planted mutants; prints the table
	@$(call script,mutants)

planted: ## plant bugs of the past; each must be found; writes docs/planted.md
	@$(call script,planted)

faults: ## fail every call once
	@$(call script,faults)

bench: ## compare with peers on one running disk
	@$(call script,bench)

nightly: ## the long campaigns; SHARD=i/n does one part, ONLY="a b" some of them
	@$(if $(SHARD),export HOLDFAST_SHARD=$(SHARD);) bash .ci/nightly $(ONLY)

reliability: ## write docs/reliability.md from what the campaigns recorded
	$(GO) run ./internal/tally/page

sbom: ## write the software bill of materials, holdfast.cdx.json
	GO="$(GO)" bash .ci/sbom.sh

reproducible: ## build twice in different places and compare
	GO="$(GO)" bash .ci/reproducible

vulncheck: ## look for known vulnerabilities; fails if that cannot be checked
	GO="$(GO)" bash .ci/vulncheck

script = if [ -f .ci/$(1) ]; then exec bash .ci/$(1); else echo "make $(1): not there yet (no .ci/$(1))" >&2; exit 1; fi
