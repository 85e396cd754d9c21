# Every target does its own set-up into $(VENV); nothing but Python >= 3.11 has to be there.
VENV ?= .venv
FLAVOR ?= cpu
QUICKSTART_FLAGS ?=
# Files in their order: xdist would begin with those of many tests, and end with the slow ones of few on one process.
PYTEST_FLAGS ?= -n 2 --dist loadfile --no-loadscope-reorder
BENCH_FLAGS ?= --suite cpu
EXPERIMENTS_FLAGS ?=
FAULTS ?=
KERNEL ?= default
# Torch takes its own kernels if it does not know the name: the tests would pass without having tested anything.
ifeq ($(filter default avx2 avx512,$(KERNEL)),)
$(error KERNEL=$(KERNEL) is none of default, avx2, avx512)
endif

# Quoted below, and not by abspath, which would cut it at a space.
BIN := $(if $(filter /%,$(VENV)),$(VENV),$(CURDIR)/$(VENV))/bin
# torchrun and the linters are looked up on PATH by the programs they are called from.
export PATH := $(BIN):$(PATH)
SHELL_SCRIPTS := .ci/run $(wildcard .ci/*.sh launch/*.sh benchmarks/*.sh launch/slurm/*.sbatch)

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev quickstart test test-all test-kernels faults experiments laws check docs format doctor bench lock audit clean

help: ## list the targets
	@echo "make TARGET [VENV=$(VENV)] [FLAVOR=cpu|cuda] [PYTHON=python3.11]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{printf "%-15s %s\n", $$1, $$2}'

setup: ## install what a run needs, pinned, into $(VENV); nothing to do if it is there
	@.ci/setup_venv.sh "$(VENV)" "$(FLAVOR)"

setup-dev: ## the same, and what tests and checks need
	@.ci/setup_venv.sh "$(VENV)" "$(FLAVOR)" dev

quickstart: setup ## synthetic data, pretraining, three strategies, one table (QUICKSTART_FLAGS)
	"$(BIN)/python" -m gpsd_dist.quickstart $(QUICKSTART_FLAGS)

test: setup-dev ## the default test suite (PYTEST_FLAGS)
	OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest $(PYTEST_FLAGS)

test-all: setup-dev ## the default suite and what is marked slow
	OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest $(PYTEST_FLAGS) -m "not gpu and not multi_gpu"

test-kernels: setup-dev ## numerics and equivalences with other CPU kernels (KERNEL=default, avx2, avx512)
	OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=$(KERNEL) "$(BIN)/python" -m pytest $(PYTEST_FLAGS) tests/numerics tests/integration \
		-m "equivalence and not slow and not gpu and not multi_gpu"

faults: setup-dev ## break real training jobs in every way we know and count the survivors (FAULTS="name ...")
	OMP_NUM_THREADS=1 "$(BIN)/python" -W ignore -m tests.faults.run $(FAULTS)

experiments: setup ## rerun reported results and compare with what is expected (EXPERIMENTS_FLAGS)
	"$(BIN)/python" -m benchmarks.experiments $(EXPERIMENTS_FLAGS)

laws: setup ## which planted laws each model learns at the default options (LAWS_FLAGS)
	"$(BIN)/python" -m benchmarks.laws $(LAWS_FLAGS)

check: setup-dev ## lint, format, spelling, types, shell scripts, Dockerfile
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/codespell"
	"$(BIN)/mypy"
	"$(BIN)/shellcheck" -x $(SHELL_SCRIPTS)
	"$(BIN)/hadolint" Dockerfile

docs: setup-dev ## the pages as a site in site/, with API and options from the code; any warning is an error
	NO_MKDOCS_2_WARNING=1 "$(BIN)/python" -m mkdocs build

format: setup-dev ## rewrite the Python files in the project's format
	"$(BIN)/ruff" check --fix .
	"$(BIN)/ruff" format .

doctor: setup ## check this machine and the installation
	"$(BIN)/python" -m gpsd_dist.doctor

bench: setup ## the CPU benchmarks (BENCH_FLAGS)
	OMP_NUM_THREADS=1 "$(BIN)/python" -m benchmarks.run $(BENCH_FLAGS)

lock: ## regenerate requirements*.txt from requirements-*.in (needs uv; UV=path)
	.ci/lock.sh

audit: setup ## ask PyPI for known vulnerabilities of all pins
	.ci/audit.sh "$(VENV)"

clean: ## remove caches and build leftovers; keeps $(VENV), data/ and runs/
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist site *.egg-info
	find . -path "./$(VENV)" -prune -o -name __pycache__ -type d -exec rm -rf {} +
