# Every target first makes .venv here and installs what it needs: Python 3.11+ and make are all a machine must have.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
BIN    := .venv/bin
READY  := .venv/.ready

.PHONY: demo test test-weights test-clients test-lmms-eval test-transformers check format bench docs install clean

demo: install            ## the main job: real weights, both stages, report, about ten minutes on two cores
	$(BIN)/chiasm demo -o demo

test: install            ## every test that needs no weights
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not weights"

test-weights: install    ## the tests on real weights, after fetching them
	$(BIN)/chiasm pull smollm2-135m-instruct efficientnet-lite0 efficientnet-lite1 efficientnet-lite2 twemoji
	$(BIN)/python -m pip install --quiet --no-deps efficientnet-lite-pytorch==0.1.0  # a reference to compare with
	$(BIN)/python -m pytest -m weights

test-clients: install    ## the server with OpenAI's Node client and, where it is installed, Chromium
	npm install --silent --no-audit --no-fund --no-save --prefix .venv/node openai
	CHIASM_NODE_MODULES=$(CURDIR)/.venv/node/node_modules $(BIN)/python -m pytest tests/serving/test_clients.py tests/serving/test_page.py

test-lmms-eval: install  ## lmms-eval's own evaluator on a local task, after installing it
	$(BIN)/python -m pip install --quiet -e '.[lmms-eval]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_lmms_eval.py

test-transformers: install  ## transformers' own common tests on our model classes, after fetching them
	set -e; version=$$($(BIN)/python -c 'import transformers; print(transformers.__version__)'); \
	folder=build/transformers-$$version; \
	test -e $$folder.tar.gz || \
		$(BIN)/python -m pip download --quiet --no-deps --no-binary transformers -d build transformers==$$version; \
	tar -xzf $$folder.tar.gz -C build transformers-$$version/tests; \
	OMP_NUM_THREADS=1 CHIASM_TRANSFORMERS_TESTS=$(CURDIR)/$$folder/tests \
		$(BIN)/python -m pytest -n auto tests/transformers_common

check: install           ## style, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install           ## every benchmark, one after the other; rows for benchmarks/README.md
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

docs: install            ## the documentation as a site in build/site
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	$(BIN)/mkdocs build --strict

install: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Chiasm needs Python 3.11 or newer; run: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

clean:
	rm -rf .venv demo runs
