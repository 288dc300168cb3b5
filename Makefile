# `make bench` and `make test` set up everything they need, in .venv.
PYTHON ?= python3
VENV ?= .venv
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.cpp csrc/*/* csrc/*/*/*)

.PHONY: bench test lint format clean
.DELETE_ON_ERROR:

bench: $(VENV)/.ready
	$(VENV)/bin/fastdl bench --quick

# As many processes as cores: threads that wait must not keep the others from running.
test: $(VENV)/.ready lint
	OMP_WAIT_POLICY=passive $(VENV)/bin/python -m pytest -n auto --dist loadfile

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	git ls-files 'csrc/*' 'tests/emulator/*' | grep -E '\.(h|cpp|cu|cuh|inc)$$' | xargs $(VENV)/bin/clang-format --dry-run -Werror

format: $(VENV)/.ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	git ls-files 'csrc/*' 'tests/emulator/*' | grep -E '\.(h|cpp|cu|cuh|inc)$$' | xargs $(VENV)/bin/clang-format -i

# An unpinned torch would bring gigabytes of CUDA packages: constraints.txt pins all that development needs.
$(VENV)/.ready: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf build dist *.egg-info fastdl/_C*.so
