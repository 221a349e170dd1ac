# Needs Python >= 3.11 and a package registry, nothing else. Everything lands in .venv and out/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two threads that spin while they wait are many times slower than one where cores are shared.
export OMP_WAIT_POLICY ?= PASSIVE
export PREFECT_SERVER_ANALYTICS_ENABLED ?= false
export DO_NOT_TRACK ?= 1

.PHONY: install demo up down deploy undeploy test soak lint format clean

install: $(VENV)/.installed

# Bytecode is compiled here, once: some machines switch it off at run time, and diffusers then starts 10 s later.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit('Python 3.11 or newer is needed, this is ' + sys.version.split()[0] + '; try: make PYTHON=python3.12' if sys.version_info < (3, 11) else 0)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
	touch $@

demo: install
	$(BIN)/resmaster run deployments/datasets/picturebook.yaml

# A Prefect server, an S3 store and workers on this machine, without containers. State is in out/stack.
up: install
	infra/stack.sh up

down:
	infra/stack.sh down

# Work pools, queues, deployments and automations on the server that PREFECT_API_URL names, e.g. make deploy POOL=kubernetes
POOL ?= process
deploy: install
	$(BIN)/python -m resmaster_flows.deploy --pool $(POOL) $(if $(GPUS),--gpus $(GPUS))

undeploy: install
	$(BIN)/python -m resmaster_flows.deploy --pool $(POOL) --remove

# In two processes, for much of the time is spent waiting for servers and other programs.
test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Builds that are killed, stopped, failed and damaged at random, for MINUTES or until there were so many KILLS; each must
# end as if undisturbed. A SEED plays the same rounds again.
MINUTES ?= 10
soak: install
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.soak --minutes $(MINUTES) $(if $(KILLS),--kills $(KILLS)) $(if $(SEED),--seed $(SEED))

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) out
