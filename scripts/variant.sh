#!/usr/bin/env bash
# variant.sh NAME -DCMAKE_VARIABLE=VALUE...: builds _C another way under build/NAME and prints the folder that, put on
# PYTHONPATH, holds the package with it. Python files are links, so the installed package stays as it is.
set -euo pipefail
cd -P "$(dirname "$0")/.."
# As deep as the package's own build folder, so that paths from it are alike and ccache knows what is compiled alike.
python=$PWD/.venv/bin/python folder=$PWD/build/$1 cmake_folder=$PWD/build/$1-cmake
shift
cmake=$(PATH=$PWD/.venv/bin:$PATH command -v cmake ||
  "$python" -c 'import cmake; print(cmake.CMAKE_BIN_DIR + "/cmake")')
generator=()
if command -v ninja >/dev/null || PATH=$PWD/.venv/bin:$PATH command -v ninja >/dev/null; then generator=(-G Ninja); fi
export PATH=$PWD/.venv/bin:$PATH
{
  "$cmake" -S . -B "$cmake_folder" "${generator[@]}" -DPython_EXECUTABLE="$python" -DGEMMA2_EXT_CUDA=OFF \
    -UGEMMA2_EXT_CPU_ISAS "$@"
  "$cmake" --build "$cmake_folder" --target _C -j "${MAX_JOBS:-$(env -u OMP_NUM_THREADS nproc)}"
} >&2
rm -rf "$folder/python"
mkdir -p "$folder/python/gemma2_ext"
ln -s "$PWD"/python/gemma2_ext/* "$folder/python/gemma2_ext/"
rm -f "$folder"/python/gemma2_ext/{_C*.so,__pycache__}
ln -s "$cmake_folder"/_C*.so "$folder/python/gemma2_ext/"
echo "$folder/python"
