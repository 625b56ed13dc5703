# Every target makes .venv first, if it is missing or older than what it is made from.
PYTHON ?= python3
DEVICES ?= 2
# What depends on the dependencies: noise, arithmetic, codec, sockets, command line.
OLDEST := tests/unit/test_sampling_options.py tests/unit/test_protocol.py tests/e2e/test_cli.py::test_sample_draws_a_picture \
          tests/integration/test_leader.py::test_workers_equal_the_reference_whatever_is_asked
BIN := .venv/bin
READY := .venv/ready

.PHONY: help demo test test-fast test-cpp test-diffusers test-gpu test-host-cuda test-ray test-faults test-oldest test-quantized test-reports package docs soak fuzz check bench \
        bench-gpu gpu-session study bench-pipelines quality micro clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "drp needs Python 3.10 or newer; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## Draw digits with two worker processes, into digits.png
	$(BIN)/drp sample digits --labels 0-9 --rows 4 --steps 48 --devices 2 --mode aggressive --out digits.png

test: $(READY) ## Run the tests, in three processes: on two cores, since tests wait for workers a fifth of the time
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-fast: $(READY) ## Run what needs no worker processes, under a minute: while editing
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/unit

test-cpp: $(READY) ## Build the client and the examples in C++, and run them
	$(BIN)/python -m pytest -n 2 --dist loadfile -m cpp tests/e2e/test_cpp_client.py tests/e2e/test_embed.py

test-diffusers: $(READY) ## Run every diffusers pipeline with two, three and four workers
	$(BIN)/python -m pytest -m diffusers

test-gpu: $(READY) ## Run what needs a GPU; skipped where there is none, with the reason
	$(BIN)/python -m pytest -m gpu -s tests/gpu

test-host-cuda: $(READY) ## Run the tests of pipelines on GPUs on CUDA devices that are the host (tests/host_cuda)
	$(BIN)/python -m tests.host_cuda.build
	$(BIN)/python -m pytest -p tests.host_cuda.plugin -m gpu tests/gpu/test_pipelines.py tests/gpu/test_several_gpus.py \
	    -k "not compile and not memory and not context"

test-ray: $(READY) ## Run workers on a local Ray cluster of a head and two nodes
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]'
	$(BIN)/python -m pytest -m ray -s tests/e2e/test_ray.py

test-faults: $(READY) ## Kill, stop, starve and flood everything, for ten minutes
	$(BIN)/python -m pytest -m faults -s tests/faults

test-oldest: $(READY) ## Run tests with the oldest versions of the dependencies, tests/oldest.txt; torch is the pinned one
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/oldest -r tests/oldest.txt
	PYTHONPATH=build/oldest $(BIN)/python -m pytest $(OLDEST)

test-reports: $(READY) ## Run whole comparisons, drp tune and benches, and look at their reports in a browser
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m reports tests/e2e

test-quantized: $(READY) ## Run a pipeline that torchao has quantized; the package is kept apart, since diffusers imports it in every worker
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/torchao torchao==0.18.0
	PYTHONPATH=build/torchao $(BIN)/python -m pytest tests/e2e/test_diffusers_weights.py -k torchao

package: $(READY) ## Build the wheel, check it, install it in a fresh environment and use it there
	$(BIN)/python -m pytest -m package tests/package

docs: $(READY) ## Build the site into build/site, with the tutorial executed; no warning, no broken link, all messages found
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/python -m pytest -n 2 --dist worksteal -m docs tests/docs

soak: $(READY) ## Kill a worker every second for ten minutes
	DRP_SOAK_SECONDS=600 $(BIN)/python -m pytest -m faults -s tests/faults/test_soak.py --timeout 900

fuzz: $(READY) ## Fuzz the decoder for five minutes, guided by coverage
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -m tests.faults.fuzz -max_total_time=300 -rss_limit_mb=2048 -timeout=5 -max_len=4096

check: $(READY) ## Lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(find drp examples tests -name '*.[ch]' -o -name '*.[ch]pp')
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: $(READY) ## Measure, on emulated devices and real cores; DEVICES=8 says how many are emulated
	$(BIN)/python -m bench --devices $(DEVICES)

bench-pipelines: $(READY) ## Measure pipelines of diffusers: a small SDXL, and ParaDiGMS beside ours
	$(BIN)/python -m bench.pipelines

micro: $(READY) ## Measure the parts: codec, transport, arithmetic
	$(BIN)/python -m pytest bench/micro --benchmark-enable --benchmark-columns=min,median,mean,rounds --benchmark-sort=name

bench-gpu: $(READY) ## Measure on one GPU: batched drafts, one worker against the plain loop, a round with four workers
	$(BIN)/python -m bench.gpu

gpu-session: $(READY) ## Run the tests and the benches for one GPU in eight minutes, into bench/results
	$(BIN)/python -m bench.gpu_session

study: $(READY) ## Compare policies on emulated and simulated devices, as in docs/study.md
	$(BIN)/python -m bench.study

quality: $(READY) ## Measure the quality of drafted samples, and for 5 minutes the default against the paper; FULL=1: 200 samples, SPREADS=1: several spreads of noise levels
	$(BIN)/python -m bench.quality $(if $(FULL),--full) $(if $(SPREADS),--spreads)
	$(BIN)/python -m bench.drafting report --group default --only digits --samples 32 --cells

clean: ## Remove .venv, caches and what was built
	rm -rf .venv build .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks *.egg-info
