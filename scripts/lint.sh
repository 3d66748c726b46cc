#!/usr/bin/env bash
# lint.sh [--fix]: ruff, mypy and clang-format over everything; with --fix, formats in place first.
# Without ruff's cache: it does not notice a module that appears, which changes the order of imports elsewhere.
set -euo pipefail
cd -P "$(dirname "$0")/.."
# The tools stand in the environment, or beside the Python that it is built on.
export PATH=$PWD/.venv/bin:$(dirname "$(command -v "${PYTHON:-python3}")"):$PATH
python_files=(build_backend benchmarks examples python scripts setup.py tests training)
mapfile -t cpp_files < <(git ls-files --cached --others --exclude-standard '*.cpp' '*.h' '*.cu' '*.cuh')
if [[ ${1:-} == --fix ]]; then
  ruff check -q --no-cache --fix-only "${python_files[@]}"
  ruff format -q "${python_files[@]}"
  clang-format -i "${cpp_files[@]}"
fi
ruff check --no-cache "${python_files[@]}"
ruff format --no-cache --check "${python_files[@]}"
clang-format --dry-run -Werror "${cpp_files[@]}"
mypy
for script in .ci/run scripts/*.sh; do bash -n "$script"; done
