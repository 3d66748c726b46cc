#!/usr/bin/env bash
# lint.sh [--fix]: ruff, mypy and clang-format over everything; with --fix, formats in place first.
set -euo pipefail
cd -P "$(dirname "$0")/.."
export PATH=$PWD/.venv/bin:$PATH
python_files=(build_backend benchmarks python scripts setup.py tests training)
mapfile -t cpp_files < <(git ls-files --cached --others --exclude-standard '*.cpp' '*.h' '*.cu' '*.cuh')
if [[ ${1:-} == --fix ]]; then
  ruff check -q --fix-only "${python_files[@]}"
  ruff format -q "${python_files[@]}"
  clang-format -i "${cpp_files[@]}"
fi
ruff check "${python_files[@]}"
ruff format --check "${python_files[@]}"
clang-format --dry-run -Werror "${cpp_files[@]}"
mypy
for script in .ci/run scripts/*.sh; do bash -n "$script"; done
