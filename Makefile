# `make quickstart` sets everything up and compresses the reference model; `make test` sets everything up
# and runs all checks. Both are quick the second time.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv

# Threads that spin while they wait slow everything down on a machine with few cores.
export OMP_WAIT_POLICY ?= PASSIVE
export GPTQMODEL_CPU_WORKERS ?= 2

.PHONY: quickstart test models clean

quickstart: models
	$(VENV)/bin/se-compress recipes/quickstart.yaml

test: models
	VENV=$(VENV) tools/check

models: $(VENV)/.ready
	$(VENV)/bin/python tools/reference_models.py

# torch is asked for by its exact version first: a range would bring the newest build, with gigabytes of CUDA.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[autoround,compressed-tensors,gptq,bnb,eval,dev]'
	touch $@

clean:
	rm -rf $(VENV) models out
