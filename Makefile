# Two commands matter: `make demo` and `make test`. Each works alone in a fresh clone.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo try-everything test test-all test-e2e test-faults lint install bench bench-data record report docs clean

install: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python >= 3.11 is needed, found $$($(PYTHON) --version); set PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "Installing into $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[train,eval,ui,docs,dev]'
	@touch $@

DATA := data/stdlib
DEMO := out/demo

# Threads that wait spin for some microseconds, then sleep: as fast as spinning on idle cores, and fair to other programs.
demo: export GOMP_SPINCOUNT = 20000
demo: $(INSTALLED)
	$(BIN)/python prepare_data.py --dataset_name stdlib --train_tokenizer 4096 --block_size 256 --output_dir $(DATA)
	$(BIN)/accelerate launch --config_file accelerate_configs/one_device.yaml train_accelerate.py \
		--config recipes/demo.yaml --data_dir $(DATA) --output_dir $(DEMO)
	$(BIN)/python -m eval.perplexity --model $(DEMO) --data $(DATA)
	$(BIN)/python -m eval.generate --model $(DEMO) --prompt "def __init__(self" "class Test" "import os" --max_new_tokens 80
	@echo
	@echo "The model, its card and its records: $(DEMO)   (training_curves.png shows how it learned)"
	@echo "In other programs:    make try-everything   ($(DEMO)/stock is the same model as a stock class of transformers)"
	@echo "More text from it:    $(BIN)/python -m eval.generate --model $(DEMO) --prompt 'for i in range('"
	@echo "Train on your files:  $(BIN)/python prepare_data.py --train_file YOUR.txt --train_tokenizer 8192 --block_size 256 --output_dir data/mine"
	@echo "A real run:           README.md, section 'Train'"

# The demo's folder, or make try-everything MODEL=out/mine, in other programs: serve, llama.cpp, ONNX, lm-eval, TRL, ...
MODEL := $(DEMO)

try-everything: $(INSTALLED)
	$(BIN)/python -m tests.support.clients --model $(MODEL)

test: $(INSTALLED)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --durations=10 -m "not (fault and slow) and not exhaustive"

test-all: $(INSTALLED)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --durations=10

# The page of eval.playground in a browser; skipped where gradio, playwright or Chromium is missing.
test-e2e: $(INSTALLED)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m e2e -rs --durations=5

# Every fault, the slow ones too, and a table of how often each was tried and what was lost.
test-faults: $(INSTALLED)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 -m fault --durations=10

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/structure.py

# Ratios to other implementations and their targets: about an hour on two cores. Some of it: make bench FLAGS="--parts memory"
BENCH_DATA := data/bench

bench: $(INSTALLED)
	$(BIN)/python prepare_data.py --dataset_name stdlib --train_tokenizer 50257 --block_size 512 --output_dir $(BENCH_DATA)
	$(BIN)/python -m benchmarks.targets --data $(BENCH_DATA) $(FLAGS)

# The tokenizer is fetched from the Hub unless a folder is named: make bench-data TOKENIZER=gpt2-tokenizer TEXT_DIR=texts
TOKENIZER := openai-community/gpt2
TEXT_DIR :=

bench-data: $(INSTALLED)
	$(BIN)/python -m benchmarks.data --tokenizer_name $(TOKENIZER) $(if $(TEXT_DIR),--text_dir $(TEXT_DIR))

# A report of the demo: train it first, in a checkout without changes.
record: $(INSTALLED)
	$(BIN)/python -m eval.record --run $(DEMO) --data $(DATA)

# Fill the tables of README.md and docs/ from the JSON files in eval/reports.
report: $(INSTALLED)
	$(BIN)/python -m eval.evidence

# README.md and docs/ as a site: out/site/index.html
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "Open out/site/index.html, or with the search: $(BIN)/python -m http.server --directory out/site"

clean:
	rm -rf $(VENV) data out build *.egg-info
