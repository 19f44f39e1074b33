# `make demo` trains, `make compare` asks whether it pays, `make leaderboard` which rule learns best, `make test` checks,
# `make docs` builds the documentation site.
# All make the environment on first use.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.up-to-date
# One thread per process: the stages are the parallelism.
RUN    := OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1

.PHONY: demo compare leaderboard test chaos lint docs notebooks clean

demo: $(STAMP)
	$(RUN) $(BIN)/python -m unlocked train --stages 2 \
	    --dataset digits --model SmallConv --training-mode LLS --num-epochs 12 \
	    --lr-scheduler CosineAnnealingLR

compare: $(STAMP)
	$(BIN)/python launch/compare.py

# Cells are kept below runs/leaderboard: the same command goes on where it was stopped.
leaderboard: $(STAMP)
	$(RUN) $(BIN)/python -m unlocked leaderboard --jobs 2 --num-epochs 5 --repeats 1

# First what may share the cores; then, one after the other, the tests that have a time limit or start many processes.
test: $(STAMP) lint
	$(RUN) $(BIN)/python -m pytest -m "not alone" --numprocesses auto --maxprocesses 8 --dist worksteal
	$(RUN) $(BIN)/python -m pytest -m alone

# Workers killed at many random moments of set-up and run, and before every action of a short schedule, of which `make
# test` tries a few; and 20,000 messages of strangers at a run's ports.
chaos: $(STAMP)
	UNLOCKED_KILLS=20 $(RUN) $(BIN)/python -m pytest -s -k killed tests/launch/test_set_up.py tests/launch/test_failures.py \
	    tests/launch/test_stage_recovery.py
	UNLOCKED_STRANGERS=20000 $(RUN) $(BIN)/python -m pytest tests/launch/test_strangers_of_runs.py
	UNLOCKED_KILLS=20 $(RUN) $(BIN)/python -m pytest tests/launch/test_supervisors.py tests/launch/test_set_up_of_workers.py \
	    tests/launch/test_two_nodes.py
	UNLOCKED_RULES=all $(RUN) $(BIN)/python -m pytest tests/launch/test_every_rule_of_processes.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation site, into site/: every warning is an error. (Material's own word about another version of mkdocs is none.)
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Executes the notebooks anew, with their outputs kept in the files.
notebooks: $(STAMP)
	$(RUN) $(BIN)/python scripts/notebooks.py

# Remade whenever a file that says what to install has changed.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs,triton]'
	touch $@

clean:
	rm -rf $(VENV) build dist site src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
