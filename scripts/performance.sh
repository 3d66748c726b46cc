#!/usr/bin/env bash
# performance.sh: measures all ops and the model on this machine's CPU, where nothing else should run, and writes
# docs/performance.md with its pictures. Results are kept in benchmarks/results/cpu-*.json: those that are there are
# not measured again. Half an hour in all.
set -euo pipefail
cd -P "$(dirname "$0")/.."
bench() { # NAME ARGUMENT...
  local file=benchmarks/results/cpu-$1.json
  shift
  [[ -e $file ]] || .venv/bin/python -m gemma2_ext bench --json "$file" "$@"
}
bench ops
bench model model
bench model-int8 model --quantize int8
bench model-int4 model --quantize int4
.venv/bin/python -m gemma2_ext bench --load benchmarks/results/cpu-{ops,model,model-int8,model-int4}.json \
  --plot docs/images/performance.png --roofline docs/images/roofline.png --report docs/performance.md >/dev/null
