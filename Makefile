# The only entry point. `make serve` and `make test` work on a fresh machine with git, make and Python 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup serve test test-all test-kernels test-loaded simulate check audit sbom bench bench-quality demo wheel openapi clients migration

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[service,dev]'
	touch $(STAMP)

setup: $(STAMP)

serve: $(STAMP)  ## run the service on SQLite, with its worker
	$(BIN)/evenodds serve --with-worker

# One thread in each matrix product: test processes side by side are faster than threads that wait for each other.
# Compiled tests are kept: rewriting all assertions anew takes each test process ten seconds.
test test-all test-kernels: export PYTHONDONTWRITEBYTECODE =
test test-all: export OPENBLAS_NUM_THREADS = 1
test test-all: export OMP_NUM_THREADS = 1

test: $(STAMP)
	$(BIN)/pytest -n 3 --dist loadfile -m "not slow"

test-all: $(STAMP)
	$(BIN)/pytest -n 3 --dist loadfile

test-kernels: $(STAMP)  ## the tests of numbers, and one log, under every BLAS kernel that this machine can run
	$(BIN)/python -m tests.kernels
	$(BIN)/pytest -q -m slow tests/test_kernels.py

test-loaded: $(STAMP)  ## make test beside two busy loops and a disk writer; TIMES=3 repeats it, NICE=10 is kinder
	tests/loaded.sh $(TIMES)

simulate: export OPENBLAS_NUM_THREADS = 1
simulate: export OMP_NUM_THREADS = 1
simulate: $(STAMP)  ## services, workers and trainers under every fault; SEEDS=123 replays one, SEEDS=0:10000 OPTIONS=--nightly
	$(BIN)/python -m tests.simulation $(or $(SEEDS),0:200) --processes 2 $(OPTIONS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/pip check
	$(BIN)/python .ci/pins.py
	$(BIN)/python .ci/words.py

audit:  ## known vulnerabilities of what constraints.txt pins; asks the internet, and fails where it knows nothing of a package
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/pip install --quiet pip-audit
	$(VENV)-audit/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip $(OPTIONS)

sbom: $(STAMP)  ## the installed packages as CycloneDX, sbom.cdx.json; asks the internet for the tool
	$(PYTHON) -m venv $(VENV)-sbom
	$(VENV)-sbom/bin/pip install --quiet cyclonedx-bom
	$(VENV)-sbom/bin/cyclonedx-py environment --output-reproducible --pyproject pyproject.toml --output-file sbom.cdx.json $(BIN)/python

bench: $(STAMP)
	$(BIN)/python benchmarks/latency.py

bench-quality: $(STAMP)  ## EVENODDS_DATA names the folder of recorded success rates
	$(BIN)/python -m benchmarks.quality

demo: export OMP_NUM_THREADS = 1
demo: $(STAMP)  ## train a small model by GRPO, its batches chosen by each predictor; SEEDS="0 1" names the seeds
	$(BIN)/python -m examples.grpo_from_scratch.run $(if $(SEEDS),--seeds $(SEEDS))

wheel: $(STAMP)  ## build wheel and sdist into dist/, and try both in fresh environments of Python 3.10 and 3.11; asks the internet
	PYTHON=$(BIN)/python .ci/wheel

openapi: $(STAMP)  ## write openapi.json anew; read its diff as the review of the interface
	$(BIN)/python -m evenodds_service openapi > openapi.json

clients: $(STAMP)  ## generate a Python and a TypeScript client from openapi.json, compile and use both; asks the internet, needs node
	PYTHON=$(abspath $(BIN))/python .ci/generated_clients/check

migration: $(STAMP)  ## make migration NAME=add_something
	$(BIN)/python -m evenodds_service migration $(NAME)
