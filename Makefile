# Two commands for everyone: `make demo` and `make test`. The rest is for those who change the code.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1
export RAY_USAGE_STATS_ENABLED := 0
export HF_HUB_DISABLE_TELEMETRY := 1
export NO_MKDOCS_2_WARNING := 1
# Tests start many processes, and each would compile all modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test tests soak lint format types bench docs package sbom gpu-check clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml milan/version.py milan/images/resize.c
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq --editable '.[dvc,test,docs,dev]'
	touch $@

demo: install
	dvc repro
	@cat report/report.txt

test: install lint # types take one core for half a minute, in which tests wait for others
	$(MAKE) --no-print-directory --jobs 2 types tests

tests: install
	python -m pytest -m 'not soak' --numprocesses 3 --dist loadfile --no-loadscope-reorder

soak: install
	python -m pytest -m soak --numprocesses 2 --dist loadfile

lint: install
	ruff check . && ruff format --check .

format: install
	ruff check --fix . ; ruff format .

types: install
	mypy

docs: install
	mkdocs build --strict --quiet
	@echo 'site/index.html; with its search: python -m http.server --directory site'

package: # PYTHON=python3.13 TORCH=2.6.0: those versions
	PYTHON=$(PYTHON) TORCH=$(TORCH) .ci/package

sbom: install # its tools have an environment of their own, or they would be in the list
	mkdir -p sbom
	$(PYTHON) -m venv sbom/.venv
	sbom/.venv/bin/python -m pip install -qq 'cyclonedx-bom>=6' 'pip-licenses>=5'
	sbom/.venv/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o sbom/sbom.cdx.json $(BIN)/python
	sbom/.venv/bin/pip-licenses --python $(BIN)/python --order license --with-urls --format markdown --output-file sbom/licences.md

gpu-check: install
	python -m benchmarks.gpu_check

bench: install
	python -m benchmarks

clean:
	rm -rf demo/targets.zarr runs report site sbom
