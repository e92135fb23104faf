# make demo, make test: everything they need is made or installed into .venv first; a second run is quick.
#
#   PYTHON   interpreter that makes .venv                      VENV    where it is made
#   TORCH    what is installed if .venv has no torch           EFFOPS_CUDA=off, EFFOPS_CUDA_ARCHITECTURES="80;90"
#   ARGS     further arguments of demo, bench and pytest      WORKERS="-n 0": tests in one process

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
ARGS ?=
WORKERS ?= -n auto --maxprocesses 8 --dist worksteal

bin := $(VENV)/bin
pip := $(bin)/python -m pip --disable-pip-version-check
# pytest-benchmark warns of several processes, and warnings are errors.
pytest := -m pytest -q -p no:benchmark $(WORKERS)
constraint := $(VENV)/torch-constraint.txt
sanitize := .build/sanitize
native := $(wildcard csrc/*.cpp csrc/*/* cmake/*) CMakeLists.txt pyproject.toml
cpp := $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh python_tests/native/*.h \
	python_tests/native/*.cpp)

.PHONY: demo test bench docs install lint format wheel sanitize clean
.DELETE_ON_ERROR:

demo: $(VENV)/extra-demo  ## run every op on photographs, write effops-demo/index.html
	$(bin)/python -m effops demo $(ARGS)

test: $(VENV)/extra-test  ## the test suite
	$(bin)/python $(pytest) python_tests $(ARGS)

bench: $(VENV)/extra-bench  ## benchmarks, results in bench/results
	$(bin)/python -m effops bench $(ARGS)

docs: $(VENV)/extra-docs  ## the reference of all functions and modules, in .build/docs
	$(bin)/pdoc --math --docformat google --output-directory .build/docs effops effops.ops effops.nn effops.losses \
		effops.compat

install: $(VENV)/effops  ## build and install effops into .venv, editable

# ---------------------------------------------------------------- .venv
# Marks without contents inside .venv say what is installed: deleting .venv starts over.

$(bin)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/torch: | $(bin)/python
	$(bin)/python -c 'import torch' 2>/dev/null || $(pip) install '$(TORCH)'
	$(bin)/python -c 'import torch; print("torch==" + torch.__version__.split("+")[0])' > $(constraint)
	touch $@

$(VENV)/build-tools: | $(VENV)/torch
	$(pip) install -q -c $(constraint) 'scikit-build-core>=0.11' 'pybind11>=3.0' ninja
	command -v cmake >/dev/null || $(pip) install -q cmake
	touch $@

# Warnings are errors in developer builds. --no-deps and the constraint: torch is never replaced.
$(VENV)/effops: $(native) | $(VENV)/build-tools
	PATH="$(abspath $(bin)):$$PATH" EFFOPS_WERROR=ON $(pip) install --no-build-isolation --no-deps -e .
	touch $@

# effops is installed, so this adds the packages of the extra without building anything.
$(VENV)/extra-%: pyproject.toml $(VENV)/effops
	$(pip) install -q -c $(constraint) 'effops[$*]'
	touch $@

# ---------------------------------------------------------------- checks

lint: $(VENV)/extra-lint $(VENV)/extra-demo  ## ruff, mypy, clang-format
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
	$(bin)/clang-format --dry-run -Werror $(cpp)

format: $(VENV)/extra-lint  ## apply ruff's and clang-format's layout
	$(bin)/ruff check --fix .
	$(bin)/ruff format .
	$(bin)/clang-format -i $(cpp)

# A second copy with AddressSanitizer and UBSan in an environment of its own that shares the packages of
# .venv, but not its editable effops (which would come first on any path).
$(sanitize)/site: $(native) $(shell find effops -name '*.py') | $(VENV)/extra-test
	rm -rf $@
	PATH="$(abspath $(bin)):$$PATH" EFFOPS_WERROR=ON EFFOPS_SANITIZE=ON EFFOPS_CUDA=off $(pip) install -q \
	  --no-build-isolation --no-deps -C build-dir=$(sanitize)/build --target $@ .
	$(bin)/python -m venv --without-pip $(sanitize)/venv
	printf '%s\n' '$(abspath $@)' "$$($(bin)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	  > "$$($(sanitize)/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/effops.pth"
	touch $@

# The tests run from another folder, so that the sources do not hide the built copy.
sanitize: $(sanitize)/site  ## the CPU tests under AddressSanitizer and UBSan
	cd $(sanitize) && \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	venv/bin/python $(pytest) -c $(CURDIR)/pyproject.toml --rootdir=$(CURDIR) -p no:cacheprovider \
	  -m 'not compile and not same_native' --ignore-glob='$(CURDIR)/python_tests/test_simulator_*' \
	  $(CURDIR)/python_tests $(ARGS)

# ---------------------------------------------------------------- release

wheel: $(VENV)/build-tools  ## dist/*.whl with all CUDA architectures (EFFOPS_CUDA=off: without CUDA)
	PATH="$(abspath $(bin)):$$PATH" EFFOPS_CUDA_ARCHITECTURES="$${EFFOPS_CUDA_ARCHITECTURES:-release}" \
	  $(pip) wheel --no-build-isolation --no-deps --wheel-dir dist .

clean:  ## everything made except .venv
	rm -rf .build dist effops-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f $(VENV)/effops
