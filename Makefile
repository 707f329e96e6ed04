# The commands of this repository. What each tool reads: prefect.toml, prefect.yaml, .dvc/config, params.yaml, dvc.yaml.

PYTHON  ?= python3          # the Python that .venv is made with, 3.11 or newer
TARGET  ?= dinov2-fashion   # what `make demo` builds: a target of params.yaml
QUICK   ?=                  # 1: the target with -quick behind its name, fewer images and steps, to see that all runs
FULL    ?=                  # 1: the target with -full behind its name, which takes more steps
PORT    ?= 4200             # Prefect's server
UI_PORT ?= 5000             # MLflow's pages

RUN   := .venv/bin/python
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test oldest lint docs up down ui

help:  ## this list
	@echo "make WHAT, where WHAT is"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-8s %s\n", $$1, $$2 }'
	@echo "settings, as in make demo TARGET=deit-tiny:"
	@sed -n 's/^\([A-Z_]*\) *?= \([^ ]*\) *# \(.*\)/  \1|\2|\3/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-10s %s (default: %s)\n", $$1, $$3, $$2 }'

demo: $(READY)  ## from real weights to a measured linear model and its report; a second run redoes only what changed
	@$(RUN) -m flows.t5 $(strip $(TARGET))$(if $(strip $(QUICK)),-quick)$(if $(strip $(FULL)),-full)

test: $(READY)  ## every test that this machine can run
	@$(RUN) -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

oldest: $(READY)  ## tests of compiled models with the oldest torch that pyproject.toml allows, installed into .venv-oldest
	@echo "installing the oldest torch into .venv-oldest; then a few minutes of tests"
	@.venv/bin/uv venv --quiet --clear --python $(RUN) .venv-oldest
	@grep -vE '^(torch|torchvision|triton|setuptools|nvidia-.*|cuda-.*)==' constraints.txt > .venv-oldest/constraints.txt
	@.venv/bin/uv pip install --quiet --python .venv-oldest -c .venv-oldest/constraints.txt -e '.[diffusion,dev]' \
	  $$(sed -n 's/^    "\(torch\|torchvision\)>=\([0-9.]*\)",.*/\1==\2.*/p' pyproject.toml)
	@PYTHONPATH=. .venv-oldest/bin/python -m pytest -n 2 -k "compiles or compiled or compilation" \
	  tests/t5lib/families tests/t5lib/layers tests/t5lib/test_token_grid.py tests/t5lib/test_pipelines.py

lint: $(READY)  ## style, formatting and types of the Python code
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

docs: $(READY)  ## the documentation site, in site/, without a network; a broken link is an error
	@$(RUN) -m zensical build --clean --strict

up: $(READY)  ## Prefect's server, worker and deployments in the background; running it again does no harm
	@$(RUN) -m flows.services up --port $(PORT)

down: $(READY)  ## stop what `make up` started
	@$(RUN) -m flows.services down

ui: $(READY)  ## MLflow's pages: runs, curves, comparison
	@$(RUN) -m flows.services ui --port $(UI_PORT)

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { echo "there is no '$(strip $(PYTHON))'; name a Python 3.11 or newer: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"Python 3.11 or newer is needed, $(strip $(PYTHON)) is {v[0]}.{v[1]}; name another: make PYTHON=python3.12")'
	@echo "installing into .venv: torch (gigabytes where it comes with CUDA), diffusers, Prefect, DVC, MLflow and what they need"
	@begun=$$(date +%s); set -e; \
	$(PYTHON) -m venv .venv; \
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt uv; \
	$(RUN) -c "import os, sysconfig; open(sysconfig.get_path('purelib') + '/t5-repository.pth', 'w').write(os.getcwd())"; \
	.venv/bin/uv pip install --quiet --compile-bytecode --python $(RUN) -c constraints.txt -e '.[diffusion,onnx,pipeline,dev,docs]'; \
	echo "installed in $$(( $$(date +%s) - $$begun )) s"
	@touch $@
