"""Loading a checkpoint against merely reading its bytes, in turns, and the peak memory of it.

    python benchmarks/load.py --size 2b --layers 10 --folder /tmp/checkpoint

A checkpoint of random weights is written to the folder where there is none. Files come from the
page cache after the first round. Peak memory is that of a process that only loads.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from gemma2_ext import Gemma2Config
from gemma2_ext.weights import load_weights, random_weights, save_weights

READ_BYTES = 8 << 20
PEAK = """
import resource, sys
from gemma2_ext import Gemma2
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = Gemma2.from_pretrained(sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
      sum(p.nbytes for p in model.parameters()))
"""


def read(files: list[Path]) -> float:
    """Seconds to read all files into one small buffer, in one thread."""
    buffer = bytearray(READ_BYTES)
    start = time.perf_counter()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def read_whole(files: list[Path]) -> float:
    """Seconds to read all files into fresh memory, as a program that keeps them must."""
    start = time.perf_counter()
    kept = [path.read_bytes() for path in files]
    seconds = time.perf_counter() - start
    del kept
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", default="2b", choices=("2b", "9b", "27b"))
    parser.add_argument("--layers", type=int, help="fewer layers")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config = getattr(Gemma2Config, f"gemma2_{args.size}")()
    if args.layers:
        config = replace(config, num_hidden_layers=args.layers, layer_types=None)
    if not (args.folder / "config.json").exists():
        save_weights(args.folder, random_weights(config), config)
        config.save_pretrained(args.folder)
    files = sorted(args.folder.glob("*.safetensors"))
    nbytes = sum(path.stat().st_size for path in files)
    seconds: dict[str, list[float]] = {"read": [], "read into fresh memory": [], "load": []}
    read(files)  # into the page cache
    for _ in range(args.rounds):
        seconds["read"].append(read(files))
        seconds["read into fresh memory"].append(read_whole(files))
        start = time.perf_counter()
        weights = load_weights(args.folder, config)
        seconds["load"].append(time.perf_counter() - start)
        del weights
    best = {name: min(values) for name, values in seconds.items()}
    for name, value in best.items():
        print(f"{name:24s} {value:6.2f} s  {nbytes / value / 1e9:5.2f} GB/s")
    output = subprocess.run(
        [sys.executable, "-c", PEAK, str(args.folder)], check=True, capture_output=True, text=True
    ).stdout
    peak, kept = map(int, output.split())
    print(f"peak memory {peak / 1e6:.0f} MB, weights {kept / 1e6:.0f} MB")
    if args.json:
        result = {"bytes": nbytes, "seconds": best, "peak_bytes": peak, "weight_bytes": kept}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
