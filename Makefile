# make demo · make stack · make test · make check · make bench
PYTHON ?= python3
BIN := .venv/bin
UI ?= 1

.PHONY: demo stack test check bench bench-peers compose-files docs clean

demo: .venv/.installed
	$(BIN)/gradwatch demo $(if $(filter 0,$(UI)),--no-ui)

# Prometheus, Alertmanager, monitor, dashboard and a job, without Docker; Ctrl-C ends them.
stack: .venv/.installed
	$(BIN)/python -m gradwatch_dashboards.stack artefacts/stack

test: .venv/.installed
	$(BIN)/pytest --numprocesses 2 --dist worksteal

check: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy agent monitor dashboards
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check
	$(BIN)/python -m gradwatch_dashboards.grafana.build --check

bench: .venv/.installed
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/cost.py
	$(BIN)/python benchmarks/recovery.py
	$(BIN)/python benchmarks/jobs.py
	$(BIN)/python benchmarks/store.py
	$(BIN)/python benchmarks/long_run.py
	$(BIN)/python benchmarks/faults.py
	$(BIN)/python benchmarks/fast_loop.py

# The peers bring many packages along: they get an environment of their own.
bench-peers: .venv-peers/.installed
	.venv-peers/bin/python benchmarks/peers.py

.venv-peers/.installed: pyproject.toml benchmarks/peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --constraint constraints.txt torch numpy
	.venv-peers/bin/python -m pip install --quiet --editable . --requirement benchmarks/peers.txt
	touch $@

docs: .venv/.installed
	$(BIN)/python docs/generate.py
	$(BIN)/python -m gradwatch_dashboards.grafana.build

# What docker-compose.yml mounts: passwords (unless they are there), and where jobs leave targets.
compose-files:
	install -d -m 700 artefacts/compose/secrets
	install -d -m 1777 artefacts/compose/targets
	for name in postgres_password grafana_admin_password; do \
		file=artefacts/compose/secrets/$$name; \
		test -s $$file || head -c 24 /dev/urandom | base64 | tr -d '\n' >$$file; \
		chmod 644 $$file; \
	done

# The development environment: every version is pinned in constraints.txt.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-peers
