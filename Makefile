# Everything a developer or a CI machine runs. Needs python3.11 or later, a C compiler and git; the rest comes by pip
# into .venv.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do command -v $$p && break; done)
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
export PATH := $(BIN):$(PATH)
CMAKE := $(BIN)/cmake
CTEST := $(BIN)/ctest
WERROR := $(if $(CI),ON,OFF)
TESTS := tests
PYTEST_ARGS :=

.PHONY: help setup native ctest ctest-plain ctest-address ctest-thread programs test test-address test-thread extension-address extension-thread demo soak bench docs lint format clean

help:
	@echo "make setup   create .venv and install EDM into it, editable"
	@echo "make native  rebuild the C parts"
	@echo "make test    C tests (plain, with ASan+UBSan, with TSan), then pytest"
	@echo "make test-address, test-thread  deaths and memory management with a sanitized DM-Handler and memory server"
	@echo "make programs  install the programs that the end-to-end tests run, where apt can"
	@echo "make demo    a real program in a quarter of the memory it needs"
	@echo "make soak    the long tests, random deaths and a budget of two pages for half an hour each; EDM_SOAK_S=3600 changes how long"
	@echo "make bench   the benchmarks"
	@echo "make docs    write the generated parts of the documentation"
	@echo "make lint    ruff, mypy --strict, clang-format"
	@echo "make format  let ruff and clang-format rewrite the sources"
	@echo "make clean   remove what was built, .venv included"

setup: $(VENV)/.installed

$(VENV)/.tools: pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: no python3.11 or later found: install it, or say make PYTHON=…" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) is older than 3.11: install a later one, or say make PYTHON=…" >&2; exit 2; }
	@"$(PYTHON)" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	  { echo "make: $(PYTHON) has no Python.h: install python3-dev (Debian, Ubuntu) or python3-devel (Fedora)" >&2; exit 2; }
	@command -v "$${CC:-cc}" >/dev/null || { echo "make: no C compiler: install gcc or clang, or set CC" >&2; exit 2; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "scikit-build-core>=0.11" "cffi>=2.1" "cmake>=3.22" "ninja>=1.11"
	@touch $@

$(VENV)/.installed: $(VENV)/.tools CMakeLists.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[all,mpich,dev]"
	@touch $@

# The editable install built once into build/editable; every later build is this one call.
native: setup
	@$(CMAKE) --build build/editable

# The C tests three times over: plain, with ASan and UBSan, with TSan.
ctest: ctest-plain ctest-address ctest-thread

ctest-plain ctest-address ctest-thread: ctest-%: setup
	@$(CMAKE) -S . -B build/ctest-$* -G Ninja -DEDM_PYTHON=OFF -DEDM_TESTS=ON -DEDM_WERROR=$(WERROR) \
	  -DEDM_SANITIZE=$(filter-out plain,$*) >/dev/null
	@$(CMAKE) --build build/ctest-$*
	@$(CTEST) --test-dir build/ctest-$* --output-on-failure --no-tests=error

# Real programs and tools of the end-to-end tests: command:package. Without them their tests skip, and say so.
PROGRAMS := sqlite3:sqlite3 redis-server:redis-server stress-ng:stress-ng node:nodejs gdb:gdb strace:strace perf:linux-perf \
  valgrind:valgrind musl-gcc:musl-tools

programs:
	@packages=; for one in $(PROGRAMS); do \
	  command -v "$${one%%:*}" >/dev/null 2>&1 || packages="$$packages $${one#*:}"; done; \
	if [ -z "$$packages" ]; then :; \
	elif [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	  echo "make: not installed, tests that need them will be skipped:$$packages"; \
	else export RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive; \
	  { timeout 120 apt-get update -qq && timeout 300 apt-get install -y -qq --no-install-recommends $$packages; } \
	    >/dev/null 2>&1 || echo "make: apt-get could not install:$$packages; tests that need them will be skipped"; fi

test: native ctest programs extension-address extension-thread
	$(BIN)/python -m pytest $(TESTS) -m "not soak" $(PYTEST_ARGS)
	$(BIN)/python tests/sanitized/run.py address $(SANITIZED) -q -k "$(SANITIZED_BRIEFLY) or memory_server_dies"
	$(BIN)/python tests/sanitized/run.py thread $(SANITIZED) -q -k "$(SANITIZED_BRIEFLY) or as_without_edm and uring"

# The same with a sanitized extension in the DM-Handler and the memory server, in CI some of many: a death of each, and a
# program whose memory the kernel itself reads and writes.
SANITIZED := tests/e2e/test_fault_points.py tests/e2e/test_semantics.py -m "not soak and not mpi" -p no:cacheprovider
SANITIZED_BRIEFLY := dm_handler_dies and fork_made
# With a libzmq that the thread sanitizer does not see into, a run takes minutes.
test-thread: SANITIZED += -k "not memory_server"

extension-address extension-thread: extension-%: native
	@$(CMAKE) -S . -B build/$@ -G Ninja -DEDM_SANITIZE=$* -DPython_EXECUTABLE=$(BIN)/python >/dev/null
	@$(CMAKE) --build build/$@ --target edm_native

test-address test-thread: test-%: extension-%
	$(BIN)/python tests/sanitized/run.py $* $(SANITIZED) $(PYTEST_ARGS)

soak: native ctest programs
	@for seed in 101 102 103; do \
	  for kind in plain address thread; do echo "engine, seed $$seed, $$kind"; \
	    build/ctest-$$kind/test_engine $$seed "" 10 || exit 1; done; done
	$(BIN)/python -m pytest $(TESTS) -m soak $(PYTEST_ARGS)

demo: native
	$(BIN)/python examples/demo.py

# A row without a figure fails edm bench; the other benchmarks are wanted all the same.
bench: native
	-$(BIN)/edm bench
	@set -e; for file in benchmarks/*/bench_*.py benchmarks/bench_*.py; do \
	  if [ -e "$$file" ]; then echo "== $$file"; $(BIN)/python "$$file"; fi; done

docs: native
	$(BIN)/python docs/generate.py

C_FILES := $(wildcard native/*.[ch] native/app/*.[ch] native/debugger/*.[ch] native/bench/*.[ch] native/bench/*.cpp native/tests/*.[ch])

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)

format: setup
	$(BIN)/ruff check --fix --exit-zero --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_FILES)

clean:
	rm -rf build dist .venv .demo .pytest_cache .mypy_cache .ruff_cache .hypothesis edm/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
