# The first command is `make demo`, the second `make test`. Each does its own set-up, once; `make` lists them all.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
COMMANDS := scripts/capcon scripts/rcon
DEMO := examples/tenants/demo.py
CUSTOMERS := examples/customers/show.py
JOBS := examples/jobs/photos.py
SOURCES := rcon_plugins integrations tests examples

# What the tests need beyond Python: a kernel and an emulator for pure cgroup v2, and what boots them; brokers; systemd to ask.
DEBIAN := linux-image-amd64 qemu-system-x86 busybox-static kmod e2fsprogs file redis-server rabbitmq-server postgresql systemd dbus curl

# The tests start thousands of interpreters: without byte code each would compile every module that it imports.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo demo-customers demo-jobs redis serve test lint docs bench bench-compare bench-vm clean root debian \
	check test-long fuzz soak coverage test-unit test-contract test-integrations test-kernel test-vm test-systemd

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.run ## four tenants on one gunicorn, without and with confinement, and a table (root; under a minute)
	@$(BIN)/python $(DEMO)

demo-customers: $(VENV)/.run ## three customers on one gunicorn, each under its own user, and a table (root; seconds)
	@$(BIN)/python $(CUSTOMERS)

demo-jobs: $(VENV)/.jobs redis ## two hundred jobs on one Celery worker, one in five of them harmful, and a table (root; a minute)
	@$(BIN)/python $(JOBS)

serve: $(VENV)/.run ## leave the demo's confined server running, until Ctrl-C
	@$(BIN)/python $(DEMO) --serve

check: root $(VENV)/.test $(VENV)/.docs ## for every commit: lint, docs, unit, contract, and a smoke test of each file of the kernel tier (root)
	@$(BIN)/python -m tests.run check $(TIERS)

test: root $(VENV)/.test $(VENV)/.docs debian ## all that CI runs, on this machine and in emulated ones (root); TIERS= names some of its tiers
	@$(BIN)/python -m tests.run test $(TIERS)

test-long: root $(VENV)/.test debian ## long CPU windows, failing kernel calls, 10,000 requests, 20,000 hosts, Celery's own integration suite (root)
	@$(BIN)/python -m tests.run long $(TIERS)

fuzz: $(VENV)/.test ## a million wrong policy files, wire messages, hosts; prints figures (minutes); ARGS= names targets
	@$(BIN)/python -m tests.fuzz $(ARGS)

soak: root $(VENV)/.test ## thirty minutes of mixed load on gunicorn and Celery while processes are killed and stopped at random; prints growth (root); ARGS=--minutes N
	@$(BIN)/python -m tests.soak $(ARGS)

# Every uid of the tests has to reach the folder and write there.
coverage: root $(VENV)/.test debian ## line and branch coverage of the tests on this machine, in build/coverage.txt (root)
	@RCON_COVERAGE=$$(mktemp -d /var/tmp/rcon-coverage.XXXXXX) && export RCON_COVERAGE && chmod 1777 "$$RCON_COVERAGE" && mkdir -p build && \
	{ $(BIN)/python -m tests.run coverage || status=$$?; } && \
	$(BIN)/coverage combine --quiet --rcfile=tests/coverage.ini "$$RCON_COVERAGE" && \
	$(BIN)/coverage report --rcfile=tests/coverage.ini > build/coverage.txt && grep TOTAL build/coverage.txt && \
	cp "$$RCON_COVERAGE/data" build/coverage.data && rm -rf "$$RCON_COVERAGE" && exit $${status:-0}

lint: $(VENV)/.test ## ruff and mypy
	@echo "== lint"
	@status=0; \
	$(BIN)/ruff check . || status=1; \
	$(BIN)/ruff format --check . || status=1; \
	$(BIN)/mypy $(wildcard $(SOURCES)) || status=1; \
	exit $$status

test-unit test-contract test-integrations test-kernel: test-%: $(VENV)/.test
	@$(BIN)/python -m pytest tests/$* $(ARGS)

test-vm: $(VENV)/.test debian ## what tests/vm.py names, on pure cgroup v2; ARGS= are pytest's (so for test-unit and the other tiers)
	@$(BIN)/python -m tests.vm $(ARGS)

test-systemd: $(VENV)/.test debian ## what needs systemd as PID 1, in an emulated machine that it boots; ARGS= are pytest's
	@$(BIN)/python -m tests.vm_systemd $(ARGS)

bench: $(VENV)/.run $(VENV)/.jobs redis ## throughput and latency with and without confinement; prints, asserts nothing
	@$(BIN)/python tests/benchmarks $(ARGS)

bench-compare: $(VENV)/.run $(VENV)/.jobs redis ## CPU time of a request and a task beside that of the commit COMMIT=; asserts nothing
	@PYTHONPATH=$(CURDIR) $(BIN)/python tests/benchmarks/compare.py $(COMMIT) $(ARGS)

bench-vm: $(VENV)/.test debian ## how soon events are told, on pure cgroup v2 in an emulated machine; prints, asserts nothing
	@$(BIN)/python -m tests.vm tests/benchmarks --only events

docs: $(VENV)/.docs ## build the site in build/site; a warning is an error
	@$(BIN)/sphinx-build -q -W --keep-going -d build/doctrees -c docs . build/site
	@echo "The site: build/site/index.html"

clean: ## remove the venv, caches and build results
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage *.egg-info
	find . -path ./.git -prune -o -name __pycache__ -type d -exec rm -rf {} +

# --- set-up ---------------------------------------------------------------------------------------------------

# The interpreter comes with venv and pip on most systems; Debian splits them off.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(call apt,python3-venv)
	@echo "Making $(VENV) ..."
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'   # the first with --group

# One stamp for each set of packages, made again when pyproject.toml or the scripts of the commands change.
$(VENV)/.run: pyproject.toml $(COMMANDS) | $(BIN)/python
	@echo "Installing rcon-plugins and gunicorn ..."
	@$(BIN)/python -m pip install --quiet --editable '.[gunicorn]'
	@touch $@

$(VENV)/.test: pyproject.toml $(COMMANDS) | $(BIN)/python
	@echo "Installing what the tests need ..."
	@$(BIN)/python -m pip install --quiet --editable . --group test --group lint --group vm
	@touch $@ $(VENV)/.run $(VENV)/.jobs

$(VENV)/.jobs: pyproject.toml $(COMMANDS) | $(BIN)/python
	@echo "Installing rcon-plugins, Celery and Pillow ..."
	@$(BIN)/python -m pip install --quiet --editable . --group jobs
	@touch $@

$(VENV)/.docs: pyproject.toml $(COMMANDS) | $(BIN)/python
	@echo "Installing what the site is built with ..."
	@$(BIN)/python -m pip install --quiet --editable . --group docs
	@touch $@

redis:
	@command -v redis-server >/dev/null || $(call apt,redis-server)

root:
	@[ "$$(id -u)" = 0 ] || { echo "The kernel tier needs root, for cgroups: sudo make test" >&2; \
		echo "Without root: make lint test-unit test-contract; and, where cgroups are delegated, test-integrations" >&2; exit 1; }

debian:
	@missing=; for package in $(DEBIAN); do \
		dpkg-query -W -f '$${db:Status-Abbrev}' $$package 2>/dev/null | grep -q '^ii' || missing="$$missing $$package"; \
	done; [ -z "$$missing" ] || $(call apt,$$missing)

# Install Debian packages when root; else say what to do. What they bring is not started as a service (policy-rc.d).
define apt
{ if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	echo "Installing Debian packages:" $(1) "..."; \
	policy=/usr/sbin/policy-rc.d; \
	[ -e $$policy ] || { trap "rm -f $$policy" EXIT; printf '#!/bin/sh\nexit 101\n' >$$policy; chmod +x $$policy; }; \
	apt-get update -qq && \
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=300 $(1) >/dev/null; \
else \
	echo "Debian packages are missing. As root:  apt-get install --no-install-recommends" $(1) >&2; exit 1; \
fi; }
endef
