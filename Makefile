# `make demo` sets up and prints text; `make test` sets up and runs the tests. The rest is for developers.
# PYTHON is the Python to build on: its torch (2.11 or later) is used where it has one, else TORCH is installed.
PYTHON ?= python3
TORCH ?= torch==2.13.0
export PYTHON TORCH

.PHONY: demo test build lint format sanitize emulate scalar oldest-transformers check-packages cuda-check
.PHONY: neon-check distillation performance clean

demo:
	@scripts/setup.sh
	.venv/bin/python -m gemma2_ext generate --max-new-tokens 120 "ROMEO:"

test:
	@scripts/setup.sh test
	.venv/bin/python -m pytest $(PYTEST_ARGS)

build:
	@scripts/setup.sh

lint:
	@scripts/setup.sh lint
	@scripts/lint.sh

format:
	@scripts/setup.sh lint
	@scripts/lint.sh --fix

# The tests of the ops with kernels built with ASan and UBSan; with the AVX-512 and NEON levels in AVX2's instructions at
# most; with no instruction set beyond the compiler's default.
sanitize emulate scalar:
	@scripts/setup.sh test
	@scripts/test_variant.sh $@ $(PYTEST_ARGS)

oldest-transformers:
	@scripts/setup.sh test
	@scripts/test_oldest_transformers.sh $(PYTEST_ARGS)

cuda-check:
	@scripts/setup.sh
	@scripts/cuda_check.sh

neon-check:
	@scripts/setup.sh
	@scripts/neon_check.sh

check-packages:
	@scripts/setup.sh test
	@scripts/check_packages.sh

# The runs of docs/distillation.md, those whose result is missing; ARGS="--data FILE --out DIR" for another text.
distillation:
	@scripts/setup.sh test
	.venv/bin/python training/distillation/run.py $(ARGS)

# docs/performance.md, of this machine: what benchmarks/results has not yet is measured.
performance:
	@scripts/setup.sh test
	@scripts/performance.sh

clean:
	rm -rf build dist python/gemma2_ext.egg-info python/gemma2_ext/_C*.so .venv/gemma2_ext.built
