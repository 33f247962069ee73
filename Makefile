# Every command that a contributor needs. Each target installs what it uses: Debian packages with apt, Python packages
# into .venv, with the versions and hashes of requirements-dev.lock.

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
help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/ready $(STAMPS)/apt-mesh  ## start three nodes in network namespaces, break their mesh and watch plexd repair it (root)
	$(VENV)/bin/plexd lab up --nodes 3

test: $(VENV)/ready $(STAMPS)/apt-mesh $(STAMPS)/apt-stun $(STAMPS)/apt-journal $(STAMPS)/apt-usual  ## run the unit, contract, integration and namespace tests (root for the last kind)
	$(VENV)/bin/python -m tests.lanes

test-kernel: $(VENV)/ready $(STAMPS)/apt-mesh $(STAMPS)/apt-guest  ## run the tests that need a kernel of their own: the Debian kernel in QEMU (root)
	$(VENV)/bin/python -m tests.kernel.run

check: $(VENV)/ready  ## check format, lint, types, import contracts, references to the contract
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/python -m tests.documentation.contract_references

format: $(VENV)/ready  ## format the code and fix what the linter can fix
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: $(VENV)/ready $(STAMPS)/apt-mesh $(STAMPS)/apt-guest $(STAMPS)/apt-journal $(STAMPS)/apt-shipper $(STAMPS)/apt-throughput  ## measure speed, memory and processor time; asserts nothing (root)
	$(VENV)/bin/python -m tests.bench

FUZZ_SECONDS := 30
FUZZ_TARGETS :=
fuzz: $(VENV)/fuzz  ## search for inputs that break a parser; FUZZ_SECONDS=600 for each, FUZZ_TARGETS="config_file ..."
	$(VENV)/bin/python -m tests.fuzz --seconds $(FUZZ_SECONDS) $(FUZZ_TARGETS)

CHAOS_AT_ONCE := 1
chaos: $(VENV)/ready $(STAMPS)/apt-journal  ## deliver log lines through kills and a faulty control plane, 200 seeds; CHAOS_AT_ONCE=2 runs two at a time (root)
	$(VENV)/bin/python -m tests.chaos 200 --at-once $(CHAOS_AT_ONCE)

LOCK := pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-header --no-annotate \
  --no-emit-index-url --no-emit-trusted-host --no-emit-find-links
lock: $(VENV)/ready  ## write the lock files from pyproject.toml and requirements-fuzz.in; pins that still fit stay
	$(VENV)/bin/$(LOCK) --output-file requirements.lock pyproject.toml
	$(VENV)/bin/$(LOCK) --all-extras --constraint requirements.lock --output-file requirements-dev.lock pyproject.toml
	$(VENV)/bin/$(LOCK) --output-file requirements-fuzz.lock requirements-fuzz.in

clean:  ## remove everything that make created in this directory
	rm -rf $(VENV) $(STAMPS) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/ready: requirements-dev.lock | $(STAMPS)/apt-base
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --require-hashes -r requirements-dev.lock
	$(VENV)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/fuzz: requirements-fuzz.lock $(VENV)/ready
	$(VENV)/bin/pip install --quiet --require-hashes -r requirements-fuzz.lock
	touch $@

# $(call apt,packages) installs the packages that are missing. Without root it only names them, and the tests that need
# them are skipped.
define apt
	@mkdir -p $(STAMPS)
	@missing=$$(for p in $(1); do dpkg-query -W -f='$${db:Status-Status}\n' $$p 2>/dev/null | grep -qx installed || echo $$p; done); \
	if [ -n "$$missing" ]; then \
	  if [ $$(id -u) -ne 0 ]; then \
	    echo "missing, and only root can install them:" $$missing "(tests that need them are skipped)" >&2; exit 0; \
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
