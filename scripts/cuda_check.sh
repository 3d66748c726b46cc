#!/usr/bin/env bash
# cuda_check.sh: compiles every CUDA kernel for all architectures, without a GPU and beside any torch; warnings are
# errors. Says so and ends well where there is no nvcc.
set -euo pipefail
cd -P "$(dirname "$0")/.."
export PATH=$PWD/.venv/bin:$PATH
if ! command -v nvcc >/dev/null && [[ ! -x ${CUDA_HOME:-/usr/local/cuda}/bin/nvcc ]]; then
  echo "gemma2_ext: no nvcc on PATH or in CUDA_HOME; the CUDA kernels are not compiled"
  exit 0
fi
PYTHON=.venv/bin/python
cmake=$(command -v cmake || "$PYTHON" -c 'import cmake; print(cmake.CMAKE_BIN_DIR + "/cmake")')
generator=()
if [[ ! -e build/cuda_check/CMakeCache.txt ]] && command -v ninja >/dev/null; then generator=(-G Ninja); fi
"$cmake" -S . -B build/cuda_check "${generator[@]}" -DGEMMA2_EXT_CUDA=CHECK \
  -DPython_EXECUTABLE="$PWD/$PYTHON" >/dev/null
"$cmake" --build build/cuda_check --target cuda_check -j "${MAX_JOBS:-$(env -u OMP_NUM_THREADS nproc)}"
