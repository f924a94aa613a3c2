# Every target sets itself up: Python 3.11 or newer and make are all it takes.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
RESULTS ?= $(CURDIR)/results/demo
ARGS ?=

# A job runs in a copy without .git, so it is told which commit it is.
COMMIT := $(shell git describe --always --dirty --abbrev=40 2>/dev/null)
BIN := $(abspath $(VENV))/bin
INSTALLED := $(VENV)/.installed

.PHONY: help venv demo ablation serve load slices test check format report constraints clean

help: ## List the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(INSTALLED) ## Create .venv with the tested set of packages (once; about three minutes)

$(INSTALLED): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: PYTHON must be Python 3.11 or newer, got '$(PYTHON)'; try: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	"$(PYTHON)" -m venv "$(VENV)"
	"$(BIN)/python" -m pip install --progress-bar off -c constraints.txt -e '.[all]'
	@touch "$(INSTALLED)"

demo: $(INSTALLED) ## dense, spts, random and recency on the bundled model, as a Ray job; ends in a table and a report
	@mkdir -p "$(RESULTS)"
	"$(BIN)/python" -m cluster.local -- ray job submit --working-dir . -- \
		python -m jobs.sweep --config jobs/configs/demo.yaml --out "$(RESULTS)" \
		$(if $(COMMIT),--commit $(COMMIT)) $(ARGS)

# The proxies of jobs/configs/ablation.yaml, over the texts of the model's own: build/proxies/cCHANNELS-rRANK.
ABLATED := $(patsubst %,build/proxies/%/proxies.json,c64-r24 c64-r24-mean c16-r8 c16-r16 c64-r8 c64-r48 c256-r24 c256-r96)
TEXTS = $(shell "$(BIN)/python" -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')
build/proxies/%/proxies.json: $(INSTALLED)
	"$(BIN)/python" -m jobs.calibrate --model jobs/demo_model --schedule demo-12l --first-layer 2 \
		--texts $(addprefix $(TEXTS)/,argparse.py typing.py pydoc_data/topics.py subprocess.py inspect.py tarfile.py) \
		$(patsubst c%,--channels %,$(word 1,$(subst -, ,$*))) $(patsubst r%,--rank %,$(word 2,$(subst -, ,$*))) \
		$(if $(findstring mean,$*),--top-share 1) --tokens 2048 --windows 2 --live-tokens 8 --out $(@D)

ablation: $(ABLATED) ## The paper's ablations on the bundled model, half an hour on two cores; docs/ablation.md has its report
	"$(BIN)/python" -m cluster.local -- "$(BIN)/python" -m jobs.sweep --config jobs/configs/ablation.yaml \
		$(if $(COMMIT),--commit $(COMMIT)) $(ARGS)

serve: $(INSTALLED) ## The OpenAI-compatible endpoint of ray_config.yaml, until Ctrl-C
	"$(BIN)/python" -m cluster.config ray_config.yaml
	"$(BIN)/python" -m cluster.local -- serve run ray_config.yaml $(ARGS)

load: $(INSTALLED) ## 64 streams of mixed lengths for two minutes on the endpoint of ray_config.yaml, with a report
	"$(BIN)/python" -m jobs.load --serve ray_config.yaml --streams 64 --seconds 120 --ignore-eos \
		--out results/load $(ARGS)

# Short prompts that decode for long beside 8K prompts whose prefills are sliced, then not.
SLICES := --serve ray_config.yaml --streams 6 --seconds 90 --lengths 256:0.75,8192:0.25 --max-tokens 64 --ignore-eos
slices: $(INSTALLED) ## What slicing prefills by layer does for short prompts: two loads, compared
	"$(BIN)/python" -m jobs.load $(SLICES) --set engines.default.slice_tokens=512 --out results/slices/on $(ARGS)
	"$(BIN)/python" -m jobs.load $(SLICES) --set engines.default.slice_tokens=null --out results/slices/off $(ARGS)
	"$(BIN)/python" -m jobs.load --compare results/slices/on results/slices/off

test: $(INSTALLED) ## All tests; make test ARGS="-m 'not slow' tests/spts" runs fewer
	"$(BIN)/python" -m pytest $(ARGS)

check: $(INSTALLED) ## Lint, format and types
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/mypy"

format: $(INSTALLED) ## Rewrite the sources in the house format
	"$(BIN)/ruff" check --fix .
	"$(BIN)/ruff" format .

report: $(INSTALLED) ## The tables and the HTML file again, from the results on disk
	"$(BIN)/python" -m jobs.report "$(RESULTS)" $(ARGS)

constraints: ## Pin the newest set the ranges allow, from a fresh environment
	rm -rf build/constraints && "$(PYTHON)" -m venv build/constraints
	build/constraints/bin/python -m pip install --progress-bar off -e '.[all]'
	{ grep '^#' constraints.txt; build/constraints/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//'; } > build/constraints.txt
	mv build/constraints.txt constraints.txt && rm -rf build/constraints

clean: ## Remove the environment and the caches; results stay
	rm -rf "$(VENV)" build .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
