# Each target sets up what it needs. Begin with `make demo` or `make test`.
PYTHON ?= python3
BIN := .venv/bin
DEMO := results/demo
CLUSTER := results/cluster
DEMO_TRAIN := $(BIN)/python jobs/train.py --data $(DEMO)/data --storage $(DEMO)/runs

# uv does not read pip's settings: an index that is configured for pip is passed on to uv
INDEX = index=$${PIP_INDEX_URL:-$$($(BIN)/python -m pip config get global.index-url 2>/dev/null)}; \
	[ -z "$$index" ] || export UV_DEFAULT_INDEX=$${UV_DEFAULT_INDEX:-$${UV_INDEX_URL:-$$index}}

# without cached bytecode every Ray process compiles all packages again
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test slow long cluster lint google models benchmark reference lock clean

help:
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: .venv/ready ## .venv with the exact versions of requirements-dev.lock

.venv/ready: requirements-dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	@echo "setting up .venv: about 3 GB to download, 6 GB on the disk"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$$(sed -n 's/^uv==\([^ ]*\).*/\1/p' requirements-dev.lock)
	@$(INDEX); $(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements-dev.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

demo: .venv/ready ## all steps on synthetic faces: prepare, train two models, predict, compare
	rm -rf $(DEMO)
	$(BIN)/python jobs/prepare.py --source synthetic --output $(DEMO)/data
	$(DEMO_TRAIN) --model custom_cnn --width 16 --epochs 8 --optimizer adamw --learning-rate 0.004 --global-batch-size 64
	$(DEMO_TRAIN) --model efficientnet_b2 --epochs 2 --optimizer adamw --learning-rate 0.0004 --global-batch-size 64
	$(BIN)/python jobs/predict.py --checkpoint $(DEMO)/runs/custom_cnn --data $(DEMO)/data --split validation test --output $(DEMO)/predictions
	$(BIN)/python jobs/predict.py --checkpoint $(DEMO)/runs/efficientnet_b2 --data $(DEMO)/data --split validation test --output $(DEMO)/predictions
	$(BIN)/python jobs/evaluate.py --predictions $(DEMO)/predictions --runs $(DEMO)/runs --data $(DEMO)/data --output $(DEMO)/evaluation

test: .venv/ready ## the fast tests
	$(BIN)/pytest -m "not slow"

slow: .venv/ready ## slow tests: real training runs, killed processes, submitted jobs, a browser
	$(BIN)/pytest -m "slow and not long"

long: .venv/ready ## the slowest tests, which .ci/run leaves out
	$(BIN)/pytest -m long

cluster: .venv/ready ## submit every job to two hosts on this machine and check the results (needs root)
	rm -rf $(CLUSTER)
	$(BIN)/python cluster/hosts.py -- $(BIN)/python cluster/check.py --output $(CLUSTER)

lint: .venv/ready ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

google: .venv/ready ## install Google's client, for `ray up cluster/gcp.yaml` and a test of that file
	@$(INDEX); $(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r cluster/gcp.lock

models: .venv/ready ## parameters and multiply-adds of every model and setting
	$(BIN)/python jobs/train.py --list-models

benchmark: .venv/ready ## measure this machine beside plain loops: about 40 minutes
	mkdir -p results/benchmarks
	for model in custom_cnn efficientnet_b2; do \
		$(BIN)/python jobs/benchmark.py --model $$model --output results/benchmarks/$$model.json || exit $$?; \
	done
	$(BIN)/python jobs/benchmark.py --output results/benchmarks/preparation.json \
		--only prepare_over_pillow prepare_speed_kept prepare_memory_growth
	$(BIN)/python jobs/benchmark.py --output results/benchmarks/sweeps.json \
		--only sweep_overhead_s asha_saving asha_loss

reference: .venv/ready ## copy results to results/reference and update the README's tables
	$(BIN)/python -m fer_ray.benchmarks.reference collect

# cluster nodes install requirements.lock; requirements-dev.lock adds what tests and checks need
lock: ## lock the newest versions in requirements.lock, requirements-dev.lock and cluster/gcp.lock
	$(BIN)/uv pip compile --quiet pyproject.toml --universal --python-version 3.11 \
		--generate-hashes --no-header --upgrade --output-file requirements.lock
	$(BIN)/uv pip compile --quiet pyproject.toml --extra dev --constraints requirements.lock \
		--universal --python-version 3.11 --generate-hashes --no-header --upgrade \
		--output-file requirements-dev.lock
	echo google-api-python-client | $(BIN)/uv pip compile --quiet - --constraints requirements.lock \
		--universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		--output-file cluster/gcp.lock

clean: ## remove .venv and the demo's results
	rm -rf .venv $(DEMO)
