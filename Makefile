# Every chore of the project. `make` alone prints them.
# PYTHON makes the virtual environment; PIP_ARGS goes to pip (an index, say); ARGS goes to the command that a target runs.

PYTHON   ?= python3
ENGINE   ?= docker
PIP_ARGS ?=
ARGS     ?=

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help install protos format check test test-gpu test-workers test-container chaos demo serve train bench bench-gpu image system-deps

help:
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- set-up: each target below that needs it does it by itself, again only when pyproject.toml or the pins change ---

INSTALLED := $(VENV)/.installed
# Folders with the oldest and the newest protobuf and grpcio that clients may have; a test imports the stubs with each.
OLDEST := $(VENV)/oldest-protobuf
NEWEST := $(VENV)/newest-protobuf

install: $(INSTALLED) $(OLDEST) $(NEWEST)  ## create .venv with the project and its tools

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Setting up $(VENV): some minutes, most of them for torch."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# First and exactly: any other spelling takes the index's newest build instead, gigabytes of CUDA included.
	@$(PIP) install $(PIP_ARGS) -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	@$(PIP) install $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

$(OLDEST): requirements = protobuf==6.31.1 grpcio==1.76.0 googleapis-common-protos==1.70.0
$(NEWEST): requirements = protobuf==7.36.2 grpcio==1.85.1 googleapis-common-protos==1.76.0
$(OLDEST) $(NEWEST): pyproject.toml | $(INSTALLED)
	@echo "Setting up $@."
	@rm -rf $@ $@.part
	@$(PIP) install $(PIP_ARGS) --no-warn-conflicts --target $@.part $(requirements)
	@mv $@.part $@
	@touch $@

# --- chores ---

STUBS  := client
PROTOC := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -Iprotos

protos: $(INSTALLED)  ## generate the stubs in client/cellserve/v1 from protos/
	rm -f $(STUBS)/cellserve/v1/*_pb2*.py*
	$(PROTOC) --python_out=$(STUBS) --mypy_out=quiet:$(STUBS) protos/cellserve/v1/*.proto
	$(PROTOC) --grpc_python_out=$(STUBS) --mypy_grpc_out=quiet:$(STUBS) protos/cellserve/v1/*_service.proto

format: $(INSTALLED)  ## rewrite the code in the project's format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

check: $(INSTALLED)  ## lint, format and types, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: install  ## run all tests, e.g. make test ARGS='-k stubs'
	$(BIN)/python -m pytest $(ARGS)

# Without a virtual environment or the network: only torch, triton, numpy, safetensors and pytest need be there. So neither the
# project's pytest settings and plugins are used, nor is any test module imported that has no such test.
GPU_TESTS = $(shell grep -rl 'pytest.mark.gpu' tests/model --include='test_*.py')

test-gpu:  ## run the tests that need a CUDA device, with PYTHON's own packages
	PYTHONPATH=.:model:service:client $(PYTHON) -m pytest -c /dev/null --rootdir=. --import-mode=importlib \
		-p no:cacheprovider -W ignore::pytest.PytestUnknownMarkWarning -ra -m gpu \
		$(or $(GPU_TESTS),$(error no test in tests/model is marked gpu)) $(ARGS)

# Tests over the wire that say nothing of workers themselves.
test-workers: install  ## run the tests over the wire before a server with two front-end processes (some minutes)
	CELLSERVE_TEST_WORKERS=2 $(BIN)/python -m pytest tests/e2e $(ARGS)

test-container: install  ## build the image and run it in a container engine of the tests' own (root, some minutes)
	CELLSERVE_TEST_CONTAINER=true $(BIN)/python -m pytest -m container $(ARGS)

chaos: install  ## kill servers and break connections at full length (some minutes)
	CELLSERVE_TEST_CHAOS=long $(BIN)/python -m pytest tests/chaos $(ARGS)

demo: $(INSTALLED)  ## follow 64 source files at once with the bundled model
	$(BIN)/python -m demo $(ARGS)

serve: $(INSTALLED)  ## run the server until it is interrupted
	$(BIN)/cellserve-server $(ARGS)

train: $(INSTALLED)  ## train the bundled model again
	$(BIN)/cellserve-model train $(ARGS)

bench: $(INSTALLED)  ## measure throughput and latency beside their limits
	$(BIN)/python -m bench $(ARGS)

bench-gpu:  ## check and time the cells on a GPU, with PYTHON's own torch and triton
	PYTHONPATH=.:model $(PYTHON) -m bench.gpu $(ARGS)

image:  ## build the container image cellserve (ENGINE=podman, PIP_ARGS='--extra-index-url ...')
	$(ENGINE) build --build-arg PIP_ARGS="$(PIP_ARGS)" --tag cellserve .

system-deps:  ## install the programs that some tests use: Redis, HAProxy, Prometheus, Node, buf, a container engine
	.ci/system-deps
