#!/usr/bin/env bash
# neon_check.sh: compiles the CPU kernels for aarch64, with a cross compiler; warnings are errors. Runs them on emulated
# processors, where QEMU is: tests/kernels_probe.cpp. Says so and ends well where there is no such compiler.
set -euo pipefail
cd -P "$(dirname "$0")/.."
export PATH=$PWD/.venv/bin:$PATH
compiler=aarch64-linux-gnu-g++
if ! command -v $compiler >/dev/null; then
  echo "gemma2_ext: no $compiler on PATH; the kernels for aarch64 are not compiled"
  exit 0
fi
python=$PWD/.venv/bin/python
cmake=$(command -v cmake || "$python" -c 'import cmake; print(cmake.CMAKE_BIN_DIR + "/cmake")')
generator=()
if [[ ! -e build/neon_check/CMakeCache.txt ]] && command -v ninja >/dev/null; then generator=(-G Ninja); fi
"$cmake" -S . -B build/neon_check "${generator[@]}" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=$compiler -DCMAKE_CXX_FLAGS=-Werror -DPython_EXECUTABLE="$python" \
  -DPython_INCLUDE_DIR="$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')" \
  -DGEMMA2_EXT_CUDA=OFF -UGEMMA2_EXT_CPU_ISAS >/dev/null
"$cmake" --build build/neon_check --target _C_scalar _C_neon_dot _C_neon_bf16 \
  -j "${MAX_JOBS:-$(env -u OMP_NUM_THREADS nproc)}"
folder=build/neon_check
emulator=$(command -v qemu-aarch64 || command -v qemu-aarch64-static || true)
if [[ ! $emulator ]]; then
  echo "gemma2_ext: no qemu-aarch64 on PATH; the kernels for aarch64 are compiled only"
  exit 0
fi
$compiler -std=c++17 -O1 -Wall -Wextra -Werror -Icsrc -DGEMMA2_BUILT_scalar -DGEMMA2_BUILT_neon_dot \
  -DGEMMA2_BUILT_neon_bf16 tests/kernels_probe.cpp csrc/cpu/isa.cpp \
  $folder/CMakeFiles/_C_{scalar,neon_dot,neon_bf16}.dir/csrc/cpu/*.o -static -o $folder/kernels_probe
# Without products of bytes, with them, and with those of bfloat16.
for processor in cortex-a53 neoverse-n1 max; do
  echo -n "$processor: "
  "$emulator" -cpu $processor $folder/kernels_probe
done
