#!/usr/bin/env bash
# performance.sh [NAME]: measures all ops and the model on this machine's CPU, where nothing else should run, and writes
# docs/performance.md (or performance-NAME.md) with its pictures. Results are kept in benchmarks/results/NAME-*.json
# (cpu-*.json): those that are there are not measured again, and where it is interrupted it goes on the next time. Beside a
# torch whose bfloat16 products are slow it takes an hour.
set -euo pipefail
cd -P "$(dirname "$0")/.."
name=${1:-cpu}
page=docs/performance${1:+-$1}
files=()
bench() { # NAME ARGUMENT...
  local file=benchmarks/results/$name-$1.json
  shift
  [[ -e $file ]] || .venv/bin/python -m gemma2_ext bench --json "$file" "$@"
  files+=("$file")
}
bench model model
bench model-int8 model --quantize int8
bench model-int4 model --quantize int4
bench norms rms_norm add_rms_norm geglu rope
bench attention attention
bench linear linear logits
bench linear-int8 linear logits --quantize int8
bench linear-int4 linear logits --quantize int4
# The check of 256000 words' gradients takes some 30 GB.
if (($(awk '/^MemAvailable/ { print int($2 / 1048576) }' /proc/meminfo) >= 40)); then
  bench losses linear_cross_entropy linear_distillation
else
  echo "performance.sh: the losses are left out: they take 40 GB of memory" >&2
fi
.venv/bin/python -m gemma2_ext bench --load "${files[@]}" \
  --plot "docs/images/$name.png" --roofline "docs/images/$name-roofline.png" --report "$page.md" >/dev/null
