"""Microbenchmarks: each op, and the whole model, against the machine's limits and against peers.

`gemma2-ext bench` is the way to run them. `_harness` measures, `_probes` finds the machine's
limits, `_peers` holds what others compute the same with, `_report` prints, draws and compares;
every other file describes one op's cases.
"""

from ._harness import Case, Result, Settings, measure
from ._suite import OPS, run_suite

__all__ = ["OPS", "Case", "Result", "Settings", "measure", "run_suite"]
