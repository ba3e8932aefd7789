# Every task has its entry here; each only calls cargo and scripts.
.DEFAULT_GOAL := help
SHELL := /bin/bash
# Where cargo puts what it builds.
TARGET := $(or $(CARGO_TARGET_DIR),target)
# What tests note that this machine could not show.
SKIPPED := $(abspath $(TARGET))/skipped.txt

.NOTPARALLEL:

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## Install QEMU and build the Kubernetes tools that demo and test need (12 minutes the first time, then a second)
	@e2e/setup/setup.sh >/dev/null

.PHONY: build
build: ## Build everything
	cargo build --workspace --locked

.PHONY: demo
demo: setup build ## Show the main job: a real API server, real guests, forecasts beside outcomes
	@exec $(TARGET)/debug/demo

.PHONY: test
test: kvm setup check build ## Run all checks and all tests (without /dev/kvm: ALLOW_NO_KVM=1 make test)
	@rm -f $(SKIPPED)
	MIGVISOR_SKIPPED=$(SKIPPED) cargo test --workspace --locked --no-fail-fast; ended=$$?; \
	  if [ -s $(SKIPPED) ]; then echo; echo "Skipped on this machine:"; sort -u $(SKIPPED) | sed 's/^/  /'; fi; exit $$ended

.PHONY: e2e
e2e: kvm setup build ## Run the scenarios of the whole product in a whole cluster, each with its wall time
	cargo test --workspace --locked --test scenarios

.PHONY: e2e-cluster
e2e-cluster: ## Run the same scenarios in the cluster of KUBECONFIG, with the real KubeVirt (see e2e/scenario/given.rs)
	E2E_CLUSTER=given cargo test --workspace --locked --test scenarios

.PHONY: soak
soak: kvm setup build ## Prove in full that a dry run never stops its guest: 200 runs, 10 kills (15 to 25 minutes)
	@exec $(TARGET)/debug/soak

.PHONY: check
check: ## Formatting, lints, documentation
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	cargo clippy --lib --bins --no-default-features --locked -- -D warnings
	RUSTDOCFLAGS=-Dwarnings cargo doc --no-deps --workspace --locked

.PHONY: bench
bench: ## Measure: replays, the least convergent bandwidth, admission
	cargo bench --workspace --locked --bench '*'

.PHONY: bench-cluster
bench-cluster: setup build ## Measure the controller beside 10 000 VMs on 1 000 nodes: memory, time, API writes (10 minutes)
	@exec $(TARGET)/debug/bench-cluster

.PHONY: generate
generate: ## Write what is generated and checked in anew: crds/, docs/cli.md
	MIGVISOR_GENERATE=1 cargo test --locked --test api crds_are_current
	MIGVISOR_GENERATE=1 cargo test --locked --test docs the_command_line_is_current

# The tests compare forecasts with real migrations: under emulation they would fail, or prove nothing.
.PHONY: kvm
kvm:
	@e2e/setup/setup.sh --kvm || [ "$(ALLOW_NO_KVM)" = 1 ] || { \
	  echo "make test: the tests compare forecasts with migrations of real guests, which need KVM." >&2; \
	  echo "Way out: run them where /dev/kvm is, or, to see what can be seen under emulation: ALLOW_NO_KVM=1 make test" >&2; \
	  exit 1; }
