# Two commands: `make demo` and `make test`.  Both set up .venv first; nothing else is needed but
# Python 3.11+.  A directory of wheels may be named in PIP_FIND_LINKS; otherwise uv picks the
# CPU build of PyTorch from PyTorch's own index.
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS := $(PIP_FIND_LINKS)
else
export UV_TORCH_BACKEND := cpu
endif

# Compiled modules are kept, whatever the environment says: without them each process that imports
# vLLM compiles five thousand files anew, which takes as long again as the import.
export PYTHONDONTWRITEBYTECODE :=

PYTHON ?= python3
BIN := .venv/bin
UV := $(BIN)/uv

.PHONY: demo test fast lint types wheel docs check clean

demo: .venv/.ready
	@$(BIN)/lora-cache demo $(ARGS)

test: .venv/.ready-dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

fast: .venv/.ready-dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not vllm and not gpu and not hub and not long" --hypothesis-profile=fast $(ARGS)

lint: .venv/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.ready-dev
	$(BIN)/mypy

wheel: .venv/.ready-dev
	$(BIN)/python -m build --no-isolation --wheel --outdir dist .

docs: .venv/.ready-dev
	$(BIN)/python -m mkdocs build --strict --config-file docs/site/mkdocs.yml

check: lint types wheel docs test

# overrides.txt leaves out what vLLM asks for but text generation does not use.
.venv/.ready: pyproject.toml overrides.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@test -x $(UV) || $(BIN)/python -m pip install --quiet uv
	$(UV) pip install --quiet --python $(BIN)/python --override overrides.txt --editable '.[demo]'
	@touch $@

.venv/.ready-dev: .venv/.ready .venv/hub/.ready
	$(UV) pip install --quiet --python $(BIN)/python --override overrides.txt --group dev
	@touch $@

# The Hub server of the tests needs another FastAPI than vLLM does.
.venv/hub/.ready: .venv/.ready tests/hub/olah.txt
	$(UV) venv --quiet --clear --python $(BIN)/python .venv/hub
	$(UV) pip install --quiet --python .venv/hub/bin/python --requirements tests/hub/olah.txt
	@touch $@

clean:
	rm -rf .venv dist build .mypy_cache .ruff_cache .pytest_cache
