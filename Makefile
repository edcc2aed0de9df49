# Every target installs what it needs itself and this machine lacks, by scripts/deps, and says so in
# one line. `make` lists the targets.
.DEFAULT_GOAL := help
.PHONY: help build run demo demo-wan test test-under-load simulate vm-test check bench deps

CARGO ?= cargo
# Debian keeps ip and iptables where only root looks.
export PATH := $(PATH):/usr/sbin:/sbin

# Systems that have neither apt-get nor a /usr/bin, as NixOS, run the demos, test, check and bench in a Debian directory.
HERE := $(if $(shell command -v apt-get; ls /usr/bin/nsenter 2>/dev/null),yes)

# Where cargo puts things.
TARGET := $(abspath $(or $(CARGO_TARGET_DIR),target))

# Hosts are namespaces, which need root, or a user namespace in which one is root. That is enough for the demonstration;
# one test needs a second user too. Cargo stays who it is: only the programs it runs get this in front.
UNSHARE := unshare --map-root-user --net --mount
SUDO := $(if $(shell command -v sudo),sudo -E,$(UNSHARE))
ifneq ($(shell id -u),0)
DEMO_ROOT := $(if $(shell $(UNSHARE) echo works 2>/dev/null),$(UNSHARE),$(SUDO))
RUNNER := --config 'target."cfg(unix)".runner = "$(SUDO)"'
endif

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1\t/p' Makefile | expand -t 24

build: ## the release program, target/release/peerix
	@scripts/deps build
	$(CARGO) build --release --locked

run: build ## runs it on this machine's own store, until Ctrl-C; FLAGS="--verbose" gives it flags
	@scripts/deps store
	$(CARGO) run --quiet --release --locked -- $(FLAGS)

ifeq ($(HERE),yes)
demo: ## three machines in namespaces; real Nix on one fetches from the others
	@scripts/deps build demo
	$(CARGO) build --release --locked --bin peerix --example demo
	@PEERIX_BIN=$(TARGET)/release/peerix PEERIX_TEST_DIR=$(TARGET)/demo $(DEMO_ROOT) $(TARGET)/release/examples/demo

demo-wan: ## machines on three networks and a tracker; one of them behind a router, as at home
	@scripts/deps build demo-wan
	$(CARGO) build --release --locked --bin peerix --bin peerix-tracker --example demo_wan
	@PEERIX_BIN=$(TARGET)/release/peerix PEERIX_TRACKER_BIN=$(TARGET)/release/peerix-tracker PEERIX_TEST_DIR=$(TARGET)/demo \
		$(DEMO_ROOT) $(TARGET)/release/examples/demo_wan

# Most end-to-end tests mostly wait, so more of them run at once than there are processors.
TEST_THREADS ?= 10
# A failing test says what it expected and shows its daemons' logs; backtraces would hide that.
TEST := RUST_BACKTRACE=0 $(CARGO) test --locked --no-fail-fast $(RUNNER) --lib --bins --test integration
test: ## every test; ONLY=bounds runs those with "bounds" in their names, as bounds::oversized_heads_are_refused
	@scripts/deps build test
	$(TEST) -- --test-threads $(TEST_THREADS) $(ONLY)

# The busy processes end with the shell that started them, also when that is killed.
test-under-load: ## every test, beside four processes that are always busy
	@scripts/deps build test
	$(TEST) --no-run
	@busy=; trap 'kill $$busy' EXIT; trap 'exit 130' INT TERM HUP; \
		for number in 1 2 3 4; do (while kill -0 $$$$; do :; done) & busy="$$busy $$!"; done; \
		$(MAKE) --no-print-directory test

check: ## what has to pass before a change is taken: format, lints, documentation, every test
	@scripts/deps build lint
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps --document-private-items
	@$(MAKE) test

bench: ## measures peerix side by side with nginx, and prints a table
	@scripts/deps build bench
	$(CARGO) bench --locked $(RUNNER) --bench serve
	$(CARGO) bench --locked $(RUNNER) --bench peers
	$(CARGO) bench --locked $(RUNNER) --bench wan
	$(CARGO) bench --locked $(RUNNER) --bench tracker
	$(CARGO) bench --locked $(RUNNER) --bench record
else
demo demo-wan check bench:
	@scripts/in-debian $@

test test-under-load:
	@scripts/in-debian $@ $(if $(ONLY),"ONLY=$(ONLY)")
endif

simulate: ## LAN lookups of simulated networks, many seeds; SEEDS=100000 is the default
	@scripts/deps build
	PEERIX_SIMULATION_SEEDS=$(or $(SEEDS),100000) RUST_BACKTRACE=0 \
		$(CARGO) test --release --locked --lib lan::simulation -- --nocapture

vm-test: ## boots virtual machines and goes through it all in them: systemd, firewall, nix-daemon
	@CARGO="$(CARGO)" scripts/vm-test $(TESTS)

deps: ## installs what build, demo, test and check need, and nothing else
	@scripts/deps build lint demo-wan test
