# Everything a contributor types. Each target installs what it needs: Debian packages with apt, Python packages with
# pinned versions and hashes into .venv.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
STAMPS := .cache
PYTHON ?= python3
export PIP_DISABLE_PIP_VERSION_CHECK := 1

APT_BASE := python3-venv ca-certificates
APT_MESH := iproute2 iputils-ping nftables wireguard-go wireguard-tools
APT_STUN := coturn
APT_USUAL := curl procps
APT_JOURNAL := systemd
APT_SHIPPER := syslog-ng-core syslog-ng-mod-http
APT_THROUGHPUT := iperf3
APT_GUEST := qemu-system-x86 busybox-static cpio kmod nftables
APT := apt-get install -y -qq --no-install-recommends

.PHONY: help demo test test-kernel check format bench fuzz chaos lock clean
help:  ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/ready $(STAMPS)/apt-mesh  ## three nodes, a mesh, sabotage and healing, in network namespaces (root)
	$(VENV)/bin/plexd lab up --nodes 3

test: $(VENV)/ready $(STAMPS)/apt-mesh $(STAMPS)/apt-stun $(STAMPS)/apt-journal $(STAMPS)/apt-usual  ## unit, contract, integration and namespace tests (root for the last)
	$(VENV)/bin/python -m tests.lanes

test-kernel: $(VENV)/ready $(STAMPS)/apt-mesh $(STAMPS)/apt-guest  ## the agent against the Debian kernel in QEMU (root)
	$(VENV)/bin/python -m tests.kernel.run

check: $(VENV)/ready  ## format, lint, types, import contract
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: $(VENV)/ready  ## put the code in order
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: $(VENV)/ready $(STAMPS)/apt-mesh $(STAMPS)/apt-guest $(STAMPS)/apt-journal $(STAMPS)/apt-shipper $(STAMPS)/apt-throughput  ## figures and ratios; nothing is asserted (root)
	$(VENV)/bin/python -m tests.bench

FUZZ_SECONDS := 30
FUZZ_TARGETS :=
fuzz: $(VENV)/fuzz  ## inputs that break a parser; FUZZ_SECONDS=600 each, FUZZ_TARGETS="config_file ..."
	$(VENV)/bin/python -m tests.fuzz --seconds $(FUZZ_SECONDS) $(FUZZ_TARGETS)

CHAOS_AT_ONCE := 1
chaos: $(VENV)/ready $(STAMPS)/apt-journal  ## 200 seeds of log lines, kills and a control plane that misbehaves, CHAOS_AT_ONCE=2 side by side (root)
	$(VENV)/bin/python -m tests.chaos 200 --at-once $(CHAOS_AT_ONCE)

LOCK := pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-header --no-annotate \
  --no-emit-index-url --no-emit-trusted-host --no-emit-find-links
lock: $(VENV)/ready  ## renew the lock files from pyproject.toml and requirements-fuzz.in
	$(VENV)/bin/$(LOCK) --all-extras --output-file requirements.lock pyproject.toml
	$(VENV)/bin/$(LOCK) --output-file requirements-fuzz.lock requirements-fuzz.in

clean:  ## remove what make made here
	rm -rf $(VENV) $(STAMPS) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/ready: requirements.lock | $(STAMPS)/apt-base
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --require-hashes -r requirements.lock
	$(VENV)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/fuzz: requirements-fuzz.lock $(VENV)/ready
	$(VENV)/bin/pip install --quiet --require-hashes -r requirements-fuzz.lock
	touch $@

# $(call apt,packages): installs the missing ones; without root it says which, and leaves the stamp for root to make
define apt
	@mkdir -p $(STAMPS)
	@missing=$$(for p in $(1); do dpkg-query -W -f='$${db:Status-Status}\n' $$p 2>/dev/null | grep -qx installed || echo $$p; done); \
	if [ -n "$$missing" ]; then \
	  if [ $$(id -u) -ne 0 ]; then \
	    echo "not installed, and only root can:" $$missing "(what needs them is skipped)" >&2; exit 0; \
	  fi; \
	  echo "installing" $$missing; export DEBIAN_FRONTEND=noninteractive; \
	  apt-get update -qq && $(APT) $$missing >/dev/null; \
	fi; touch $@
endef

$(STAMPS)/apt-base:
	$(call apt,$(APT_BASE))
$(STAMPS)/apt-mesh:
	$(call apt,$(APT_MESH))
$(STAMPS)/apt-stun:
	$(call apt,$(APT_STUN))
$(STAMPS)/apt-usual:
	$(call apt,$(APT_USUAL))
$(STAMPS)/apt-journal:
	$(call apt,$(APT_JOURNAL))
$(STAMPS)/apt-shipper:
	$(call apt,$(APT_SHIPPER))
$(STAMPS)/apt-throughput:
	$(call apt,$(APT_THROUGHPUT))
$(STAMPS)/apt-guest:
	$(call apt,$(APT_GUEST))
