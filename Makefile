# Two commands are all that a newcomer needs: `make demo` and `make test`.
PYTHON ?= python3
BACKEND ?= transformers
WHEELS ?= build/gpu/wheels
DEVICE ?= cuda
SEEDS ?= 10000
INPUTS ?= 5000000
MESSAGES ?= 100000
# Processes that run tests; one runs all tests of a file.
JOBS ?= 2
VENV_PYTHON := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: gpu-wheels test-gpu help demo test bench bench-full docs lint lock clean faults fuzz ray simulate sweep protocol test-clients test-vllm-previous venv

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

demo:  ## controller, two workers, several chats at once (BACKEND=echo needs no torch)
	@$(PYTHON) tools/bootstrap.py $(if $(filter echo,$(BACKEND)),core,demo)
	@$(VENV_PYTHON) examples/demo.py --backend $(BACKEND)

test:  ## install what the tests need and run all of them, in JOBS=2 processes
	@$(PYTHON) tools/bootstrap.py test
	@# The type checker has one of two processors while the tests with vLLM's former release have the other.
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target lint test-vllm-previous
	@$(VENV_PYTHON) -m pytest --numprocesses=$(JOBS)

test-vllm-previous:  ## the tests of the vLLM worker again, with the release before the latest; ALL=1 for real models too
	@$(PYTHON) tools/bootstrap.py previous
	@# Images: the transformers that it wants needs torchvision for them, of which the index has no build for CPUs. The others
	@# are tests of hf-api that use vLLM's server, and not of the worker, or of what the front does for all backends. Real models
	@# and settings start an engine each, two minutes in all, and what they show of a release the tiny one shows as well.
	@.venv-previous/bin/python -m pytest tests/backends/vllm_engine $(foreach name,images openai_server openai_embeddings api_failover compatibility conformance tool_calls bounds operations $(if $(ALL),,models settings), \
		--ignore tests/backends/vllm_engine/test_$(name).py)

test-clients:  ## clients, load tools and chat programs of others against the gateway, on a real model and two engines
	@$(PYTHON) tools/bootstrap.py test
	@$(PYTHON) tools/bootstrap.py clients
	@# Warnings are those of the clients.
	@.venv-clients/bin/python -m pytest tests/clients -W ignore

ray:  ## a fleet on a local Ray cluster whose nodes die and whose file changes, and vLLM over two of its nodes
	@$(PYTHON) tools/bootstrap.py test
	@$(VENV_PYTHON) -m pytest tests/ray tests/ray/whole_fleets.py

gpu-wheels:  ## WHEELS=build/gpu/wheels, on a host with a network: what a host with a GPU lacks (GPU_PYTHON=3.12 for another Python)
	@$(PYTHON) tools/gpu.py wheels --to $(WHEELS) $(if $(GPU_PYTHON),--python $(GPU_PYTHON))

test-gpu:  ## WHEELS=build/gpu/wheels, on a host with CUDA, torch and transformers: tests and figures that need a GPU, as JSON
	@$(PYTHON) tools/gpu.py run --wheels $(WHEELS) --device $(DEVICE) $(if $(QUICK),--quick --models tiny)

simulate:  ## SEEDS=10000 simulated clusters under faults, on all cores, and a tenth as many of 2, 3 and 5 controllers each
	@$(PYTHON) tools/bootstrap.py core
	@$(VENV_PYTHON) -m zfabric.testing --seeds $(SEEDS)
	@for controllers in 2 3 5; do \
		$(VENV_PYTHON) -m zfabric.testing --seeds $$(($(SEEDS) / 10)) --controllers $$controllers || exit 1; \
	done

faults:  ## kill, freeze, partition and exhaust real processes, and print what it did to their requests
	@$(PYTHON) tools/bootstrap.py test
	@$(VENV_PYTHON) -m pytest tests/faults -q

fuzz:  ## INPUTS=5000000 at every door, guided by the code that they reach; MESSAGES=100000 to a running fabric
	@$(PYTHON) tools/bootstrap.py test
	@$(VENV_PYTHON) -m tests.fuzz --inputs $(INPUTS)
	@$(VENV_PYTHON) -m tests.fuzz.live --messages $(MESSAGES) $(if $(SEED),--seed $(SEED))
	@$(VENV_PYTHON) -m tests.fuzz.impostor $(if $(SEED),--seed $(SEED))

sweep:  ## a tiny random model of every architecture of transformers, through the worker and by itself (docs/architectures.md)
	@$(PYTHON) tools/bootstrap.py test
	@HF_HUB_OFFLINE=1 $(VENV_PYTHON) -m tests.sweep --table docs/architectures.md

protocol:  ## write the generated parts of docs/protocol.md and docs/protocol/ anew
	@$(PYTHON) tools/bootstrap.py test
	@$(VENV_PYTHON) -m tests.document

bench:  ## measure beside what else there is, in five minutes (peers are installed on first use)
	@$(PYTHON) tools/bootstrap.py bench
	@$(VENV_PYTHON) -m bench

bench-full:  ## the same with longer rounds and real engines
	@$(PYTHON) tools/bootstrap.py test
	@$(VENV_PYTHON) -m bench --full

docs:  ## build the site of docs/ into build/docs; a warning is an error
	@$(PYTHON) tools/bootstrap.py docs
	@.venv-docs/bin/python -m sphinx --builder html --fail-on-warning --keep-going --quiet docs build/docs
	@echo build/docs/index.html

lint:  ## ruff and the strict type checker
	@$(PYTHON) tools/bootstrap.py test
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check --quiet .
	@.venv/bin/mypy

venv:  ## library and command line only, in .venv
	@$(PYTHON) tools/bootstrap.py core

lock:  ## write requirements/*.txt anew
	@tools/lock.sh

clean:  ## remove what was installed and cached here
	rm -rf .bench .fuzz .venv .venv-clients .venv-docs .venv-previous build .mypy_cache .ruff_cache .pytest_cache .hypothesis
