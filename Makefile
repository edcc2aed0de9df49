# Every target installs what it needs and this machine lacks, by scripts/deps. `make` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help build run demo test check bench deps

CARGO ?= cargo
# Debian keeps ip and iptables where only root looks.
export PATH := $(PATH):/usr/sbin:/sbin

# Systems that have neither apt-get nor a /usr/bin, as NixOS, run demo, test, check and bench in a Debian directory.
HERE := $(if $(shell command -v apt-get; ls /usr/bin/nsenter 2>/dev/null),yes)

# Where cargo puts things.
TARGET := $(abspath $(or $(CARGO_TARGET_DIR),target))

# The test network needs root. Without it, a user namespace in which one is root will do.
ROOTLESS := $(if $(filter 0,$(shell id -u)),,unshare --map-root-user --net --mount)

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | while IFS=$$'\t' read -r name what; do printf '  make %-7s %s\n' "$$name" "$$what"; done

build: ## the release program, target/release/peerix
	@scripts/deps build
	$(CARGO) build --release --locked

run: build ## runs it on this machine's own store, until Ctrl-C; FLAGS="--verbose" gives it flags
	@scripts/deps store
	$(CARGO) run --quiet --release --locked -- $(FLAGS)

ifeq ($(HERE),yes)
demo: ## three machines in namespaces; real Nix on one fetches from the others
	@scripts/deps build test
	$(CARGO) build --release --locked --bin peerix --example demo
	@PEERIX_BIN=$(TARGET)/release/peerix PEERIX_TEST_DIR=$(TARGET)/demo $(ROOTLESS) $(TARGET)/release/examples/demo

test: ## every test
	@scripts/deps build test
	$(CARGO) test --locked --no-run
	$(ROOTLESS) $(CARGO) test --locked --offline

check: ## what has to pass before a change is taken: format, lints, documentation, every test
	@scripts/deps build lint
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps --document-private-items
	@$(MAKE) test

bench: ## measures peerix side by side with nginx, and prints a table
	@scripts/deps build test bench
	$(CARGO) bench --locked --no-run
	$(ROOTLESS) $(CARGO) bench --locked --offline --bench peers
else
demo test check bench:
	@scripts/in-debian $@
endif

deps: ## installs what all of these but bench need, and nothing else
	@scripts/deps build lint test
