# Every job of this repository, one word each. `make` alone lists them.
#
# Variables: PYTHON       the Python that makes .venv (3.11 or newer)
#            TORCH_INDEX  where to take PyTorch from, for example https://download.pytorch.org/whl/cpu
#            NOTEBOOKS    what `make execute` runs (default: all chapters)

PYTHON ?= python3
TORCH_INDEX ?=
NOTEBOOKS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

# One thread each: the models are small, and two processes side by side beat one with two threads.
# Nothing here needs a model hub.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_PROGRESS_BARS ?= 1

# Two jobs, of two processes each, where make can keep their outputs apart (GNU make 4 and later).
SIDE_BY_SIDE := $(if $(filter output-sync,$(.FEATURES)),--jobs=2 --output-sync=target)
# A file of tests stays in one process, as it shares what it has trained; so does a chapter, whose cells follow each other.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile
# nbval reads what a cell prints when the cell has ended, and past a thousand messages or so some are lost: hence slow bars.
NBVAL := TQDM_MININTERVAL=10 $(PYTEST) --nbval-lax --nbval-current-env --nbval-cell-timeout 600 -p no:cacheprovider book

.PHONY: help book pdf test site-tests chapters chapters-tiny chapters-smoke reproduce lab execute trl clean

help:  ## list these commands
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  make %-10s %s\n", $$1, $$2}'

book: $(READY)  ## build the site into _build/html
	@$(BIN)/jupyter-book build --all -W -n --keep-going --quiet .

pdf: book  ## print the site as one PDF, _build/opdlab.pdf: needs Chromium or Chrome
	@$(BIN)/python scripts/make_pdf.py

test: $(READY)  ## check the code, run the tests, look at the site, and run every chapter twice
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo --no-cache
	@$(PYTEST)
	@$(MAKE) --no-print-directory site-tests
	@$(MAKE) --no-print-directory chapters

site-tests: book  ## look at every page of the site in Chromium or Chrome; without one, they are left out
	@$(PYTEST) --tb=short tests/site

chapters: $(READY)  ## run every chapter twice: from the records, and from records made on the spot
	@rm -rf runs/smoke data/records/smoke
	@$(MAKE) --no-print-directory $(SIDE_BY_SIDE) chapters-tiny chapters-smoke

# Strict on the cells tagged nbval-check-output, which state facts.
chapters-tiny: $(READY)
	@echo "Chapters at tiny, from the records:"
	@OPDLAB_SCALE=tiny $(NBVAL) --nbval-sanitize-with nbval_sanitize.cfg

# Six steps a run tell nothing of the facts, so only errors count. Alone, this job goes on where it was stopped.
chapters-smoke: $(READY)
	@echo "Chapters at smoke, from records made on the spot:"
	@$(BIN)/opdlab record --scale smoke
	@OPDLAB_SCALE=smoke $(NBVAL) --nbval-sanitize-with nbval_smoke.cfg

reproduce: $(READY)  ## retrain one seed of every recorded arm from nothing and compare it with its record
	@$(BIN)/opdlab reproduce --scale tiny

lab: $(VENV)/.lab  ## open the chapters in JupyterLab
	@$(BIN)/jupyter lab book

execute: $(READY)  ## run the chapters and store their outputs: what the site shows
	@$(BIN)/ruff format --quiet book
	@$(BIN)/python scripts/execute_book.py $(NOTEBOOKS)

trl: $(VENV)/.trl  ## install TRL, which the losses are compared with, and which trains on many GPUs

clean:  ## remove what was built; .venv and runs stay
	@rm -rf _build .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find . -name .venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "opdlab needs Python 3.11 or newer; say which with PYTHON=...")'
	@echo "Setting up $(VENV): about two minutes, once."
	@$(PYTHON) -m venv $(VENV)
	@# torch first and alone, so that its index serves nothing else.
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep -E '^torch==' requirements.txt)"
	@$(PIP) --requirement requirements.txt
	@$(PIP) --no-deps --editable .
	@touch $@

# Extras must not move what requirements.txt pins.
$(VENV)/.lab $(VENV)/.trl: $(VENV)/.%: $(READY)
	@$(PIP) --constraint requirements.txt --editable '.[$*]'
	@touch $@
