#!/usr/bin/env bash
# gpu.sh [OUT]: on a machine with a GPU, without a network: builds the CUDA kernels for that GPU, runs the CUDA tests,
# compute-sanitizer on small shapes, and benchmarks/gpu.py. Everything goes into the folder OUT (build/gpu); a step
# that fails or is refused is recorded, and the next one runs. Under 9 minutes: every step has a limit.
#
# PYTHON names a Python with a CUDA build of torch (2.11 or later), pytest, setuptools and cmake; nvcc is on PATH or in
# CUDA_HOME. Peers (liger-kernel, transformers) are used where they are installed.
set -uo pipefail
cd -P "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
out=${1:-build/gpu}
mkdir -p "$out"
export PYTHONPATH=$PWD/python${PYTHONPATH:+:$PYTHONPATH} GEMMA2_EXT_CUDA=ON
: >"$out/steps.txt"

step() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS status=0
  shift 2
  echo "== $name"
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  tail -n "${LINES_SHOWN:-5}" "$out/$name.log"
  echo "$name: exit code $status, $((SECONDS - start)) s" | tee -a "$out/steps.txt"
  return "$status"
}

"$PYTHON" -c 'import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}{chr(97) if (major, minor) == (9, 0) else str()}")' >"$out/architecture" ||
  {
    echo "gpu.sh: '$PYTHON' has no torch that sees a GPU"
    exit 1
  }
GEMMA2_EXT_CUDA_ARCHS=${GEMMA2_EXT_CUDA_ARCHS:-$(<"$out/architecture")}
export GEMMA2_EXT_CUDA_ARCHS
step build 240 "$PYTHON" setup.py -q build_ext --inplace || exit 1
step tests 150 "$PYTHON" -m pytest -q -x -p no:cacheprovider tests/cuda tests/test_rms_norm.py \
  tests/test_add_rms_norm.py tests/test_geglu.py tests/test_rope.py tests/test_rope_append_cache.py \
  tests/test_linear.py tests/test_logits.py tests/test_attention.py tests/test_attention_cache.py \
  tests/test_attention_varlen.py tests/test_attention_paged.py tests/test_attention_append_cache.py tests/test_argmax.py \
  tests/test_quantize.py tests/test_linear_int8.py tests/test_linear_int4.py \
  tests/test_linear_cross_entropy.py tests/test_linear_distillation.py tests/test_linear_distillation_topk.py -k "cuda or gpu" --maxfail=20
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
for tool in memcheck racecheck; do
  step "$tool" 40 "$sanitizer" --tool "$tool" --error-exitcode 9 "$PYTHON" tests/cuda/small_shapes.py
done
LINES_SHOWN=1000 step benchmark 250 "$PYTHON" benchmarks/gpu.py --budget 215 --json "$out/gpu.json"
cat "$out/steps.txt"
