# Katapod. `make run` and `make test` do everything on a fresh Debian 12 or 13, as root.

PYTHON ?= /usr/bin/python3
PREFIX ?= /usr/local
DESTDIR ?=
OTHER_RELEASE ?=
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
SHELL := /bin/sh
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help run setup image bytecode test unit integration e2e check format messages configuration manifests install clean
.PHONY: test-debian node-image operator-image kubernetes e2e-operator e2e-node e2e-kubernetes bench bench-compare bench-baseline deb rpm

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: setup ## Set up, then run a container in a VM, its kernel beside the host's
	@printf 'host kernel:  '; uname -r
	@printf 'guest kernel: '; $(BIN)/kata-runtime run --rm --net none busybox uname -r

setup: $(BIN)/.installed image bytecode ## Set up: packages, Python environment, guest images

build/.packages: packaging/debian-packages.txt tools/install-packages
	@mkdir -p build
	@tools/install-packages $<
	@touch $@

build/.packages-test: packaging/debian-packages-test.txt tools/install-packages
	@mkdir -p build
	@tools/install-packages $<
	@touch $@

$(BIN)/.installed: pyproject.toml constraints.txt | build/.packages
	@echo "setting up the Python environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

image: $(BIN)/.installed
	@$(BIN)/kata-runtime image build

# As packages do when they are installed: with PYTHONDONTWRITEBYTECODE each start would compile every module, 0.1 s.
bytecode: $(BIN)/.installed
	@$(BIN)/python -m compileall -q src

test: setup build/.packages-test ## Set up, then all checks and tests, with a summary at the end
	@MAKE='$(MAKE)' OTHER_RELEASE='$(OTHER_RELEASE)' tools/run-tests

test-debian: build/.packages-test ## All checks and tests in a root of another release: RELEASE=bookworm or trixie
	@tools/release-root $(or $(RELEASE),other) all

unit: $(BIN)/.installed ## The unit tests: seconds, no root, no VM
	$(PYTEST) tests/unit -q

integration: setup build/.packages-test
	$(PYTEST) tests/integration -v

e2e: setup build/.packages-test
	$(PYTEST) tests/e2e -v

check: $(BIN)/.installed ## Format, lint, types, import contracts, generated files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/generate_messages.py --check
	$(BIN)/python tools/generate_configuration.py --check
	$(BIN)/python tools/generate_operator_manifests.py --check
	$(BIN)/python tools/generate_from_docker.py --check

format: $(BIN)/.installed ## Format the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

messages: $(BIN)/.installed ## Rebuild what is generated from the .proto files
	$(BIN)/python tools/generate_messages.py

manifests: $(BIN)/.installed ## Rebuild the Helm chart and the OLM bundle from the operator's plain manifests
	$(BIN)/python tools/generate_operator_manifests.py

configuration: $(BIN)/.installed ## Rebuild what is generated from declarations: configuration keys, options of run
	$(BIN)/python tools/generate_configuration.py
	$(BIN)/python tools/generate_from_docker.py

node-image: build/.packages-test ## Build the image by which kata-node puts Katapod on nodes into build/
	tools/build-node-image

operator-image: build/.packages-test ## Build the image of the cluster's operator into build/
	tools/build-operator-image

kubernetes: ## Build the programs of a Kubernetes, for tests (minutes); KUBERNETES_BIN=DIR: take those there
	@if [ -z "$$KUBERNETES_BIN" ]; then tools/build-kubernetes; fi

e2e-operator: setup kubernetes ## The tests of the operator on a control plane of their own
	$(PYTEST) tests/integration/test_operator_cluster.py tests/integration/test_operator_machine_config.py -v

e2e-kubernetes: setup build/.packages-test kubernetes operator-image node-image ## The tests of pods and of the operator on a real Kubernetes
	$(PYTEST) tests/e2e/test_kubernetes*.py -v

e2e-node: setup node-image ## The tests of kata-node on a node of their own
	$(PYTEST) tests/integration/test_operator_node.py -v

bench: setup build/.packages-test ## Measure beside raw QEMU, crun, runc, runsc; BENCH='--rounds N --only PATTERN --full'
	$(BIN)/python -m bench.run $(BENCH)

bench-compare: $(BIN)/.installed ## Compare build/bench.json with bench/baseline.json
	$(BIN)/python -m bench.compare

bench-baseline: setup build/.packages-test ## Measure, and keep the results as the baseline
	$(BIN)/python -m bench.run $(BENCH) --baseline bench/baseline.json

deb: $(BIN)/.installed build/.packages-test ## Build the Debian package into dist/
	tools/build-deb

rpm: $(BIN)/.installed build/.packages-test ## Build the RPM into dist/
	tools/build-rpm

install: build/.packages ## Install below PREFIX (default /usr/local); DESTDIR for packagers
	PYTHON=$(PYTHON) tools/install "$(DESTDIR)" "$(PREFIX)"

clean: ## Remove what was built in this directory
	rm -rf build dist $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
