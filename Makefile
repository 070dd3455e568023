# make demo   the main job on the demo model        make test   the tests
PYTHON ?= python3
VENV := .venv
SHELL := bash
MAKEFLAGS += --no-print-directory

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# On a busy machine torch's waiting threads otherwise take the processor from those that work
export OMP_WAIT_POLICY := passive
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PIP_INSTALL := $(VENV)/bin/python -m pip install -qq --no-input -c constraints.txt
STYLE := demo/concepts/high-contrast-style

.PHONY: help demo test lint types docs clean

help:
	@echo "make demo    install into $(VENV); harden the demo model, then attack it"
	@echo "make test    install what the tests need; run them"
	@echo "make lint    ruff          make types   mypy"
	@echo "make docs    build the documentation into site/"
	@echo "make clean   remove everything that make made"
	@echo "PYTHON=... chooses the Python (3.11 to 3.13) that $(VENV) is made with"

demo: demo/verified.txt
	@cat demo/verified.txt
	@echo
	@echo "These are ordinary commands: type '. $(VENV)/bin/activate', and imma is there. 'make clean' starts over."

demo/model.safetensors: | $(VENV)/installed
	imma demo demo --force

demo/model-immunized.safetensors: demo/model.safetensors
	imma harden demo/model.safetensors --concept "high contrast style" \
	  --images $(STYLE)/defend --output $@ --force$(if $(wildcard $@.imma-state), --resume)

demo/verified.txt: demo/model-immunized.safetensors
	@rm -rf demo/report
	@# 1 means "not resistant" or "broken": a verdict too
	imma verify demo/model-immunized.safetensors --against demo/model.safetensors \
	  --concept "high contrast style" --images $(STYLE)/attack --judge $(STYLE)/judge \
	  --attack lora --preset quick --seeds 3 --report demo/report > $@.part || [ $$? -eq 1 ]
	@mv $@.part $@

# logical: what psutil calls physical is one core on many virtual machines with two. Every worker and every process that a test
# starts computes on one thread.
test: $(VENV)/installed-dev
	python -m pytest -n logical --maxprocesses 8 --dist loadgroup

lint: $(VENV)/installed-dev
	ruff check .
	ruff format --check .

types: $(VENV)/installed-dev
	mypy

docs: $(VENV)/installed-dev
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

clean:
	rm -rf $(VENV) site demo .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "There is no '$(PYTHON)'. Install Python 3.11, 3.12 or 3.13, or name yours: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "imma needs Python 3.11, 3.12 or 3.13; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "'$(PYTHON)' cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Stamps: made again only when the requirements change. The installation is editable, so the source may change freely.
$(VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing imma into $(VENV); the first time takes some minutes."
	@$(PIP_INSTALL) -e '.[metrics]'
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "Installing what tests, checks and documentation need into $(VENV)."
	@$(PIP_INSTALL) -e '.[test,docs,metrics,postgres]'
	@touch $@
