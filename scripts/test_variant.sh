#!/usr/bin/env bash
# test_variant.sh sanitize|emulate|scalar [PYTEST_ARGUMENT...]: the tests of the ops with kernels built another way.
#   sanitize  AddressSanitizer and UndefinedBehaviorSanitizer; without what compiles code or forks, which they mistake
#   emulate   the AVX-512 levels in AVX2's instructions, for machines without AVX-512, and NEON's in SSE2's
#   scalar    no instruction set beyond the compiler's default
set -euo pipefail
cd -P "$(dirname "$0")/.."
variant=$1
shift
case $variant in
  sanitize)
    settings=(-DGEMMA2_EXT_SANITIZE=address,undefined)
    if [[ ${SANITIZE_ISAS:-} ]]; then settings+=("-DGEMMA2_EXT_CPU_ISAS=$SANITIZE_ISAS"); fi
    ;;
  emulate) settings=(-DGEMMA2_EXT_EMULATE_ISA=ON) ;;
  scalar) settings=(-DGEMMA2_EXT_CPU_ISAS=scalar) ;;
  *) echo "test_variant.sh: sanitize, emulate or scalar, got '$variant'" >&2 && exit 2 ;;
esac
package=$(scripts/variant.sh "$variant" "${settings[@]}")
tests=()
for op in python/gemma2_ext/ops/[a-z]*.py; do
  tests+=("tests/test_$(basename "$op")")
done
tests+=(tests/test_argmax.py tests/test_draw.py tests/test_isa.py)
environment=(PYTHONPATH="$package")
select=()
if [[ $variant == sanitize ]]; then
  compiler=${CXX:-c++}
  environment+=(
    LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libubsan.so)"
    # Python and torch leak by design. Allocations beyond memory are for torch to report.
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1
    UBSAN_OPTIONS=print_stacktrace=1
  )
  select=(-k "not compile and not opcheck")
fi
env "${environment[@]}" .venv/bin/python -c "import gemma2_ext
print('gemma2_ext of', gemma2_ext.__file__, gemma2_ext.build_info())"
env "${environment[@]}" .venv/bin/python -m pytest -p no:cacheprovider "${select[@]}" "$@" "${tests[@]}"
