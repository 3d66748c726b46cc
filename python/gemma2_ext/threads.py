"""How many threads pay: one a core that this process may run on, within its share of CPU time."""

from __future__ import annotations

import math
import os
from pathlib import Path

ROOT = Path("/")


def default_threads(root: Path = ROOT) -> int:
    """The cores of the process's affinity, or what its control groups grant where that is less.

    Two hardware threads of a core count once: they share what bounds the kernels.

    Args:
        root: where proc and sys are found.
    """
    if hasattr(os, "sched_getaffinity"):
        processors = os.sched_getaffinity(0)
    else:
        processors = set(range(os.cpu_count() or 1))
    cores = {_core(root, processor) for processor in processors}
    quota = cpu_quota(root)
    if quota is None:
        return max(1, len(cores))
    # Rounded up: a thread that is paused for a part of the time is better than none.
    return max(1, min(len(cores), math.ceil(quota)))


def cpu_quota(root: Path = ROOT) -> float | None:
    """Processors' worth of time that the process's control groups grant; None: no limit.

    The least along the path to the root counts. Version 2: cpu.max; version 1: cpu.cfs_quota_us
    over cpu.cfs_period_us. In a container the path may not exist below its own mount: then the
    mount's root is the group.
    """
    quotas = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, group = (*line.split(":", 2), "", "")[:3]
        if number == "0" and not controllers:
            mounts = [root / "sys/fs/cgroup"]
        elif "cpu" in controllers.split(","):
            mounts = [root / "sys/fs/cgroup" / name for name in ("cpu", controllers)]
        else:
            continue
        for mount in mounts:
            folder = mount / group.strip("/")
            for level in (folder, *folder.parents):
                if (quota := _quota(level)) is not None:
                    quotas.append(quota)
                if level == mount:
                    break
    return min(quotas, default=None)


def _quota(folder: Path) -> float | None:
    fields = _read(folder / "cpu.max").split()
    if not fields:
        fields = [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    try:
        quota, period = (int(field) for field in fields)
    except ValueError:  # "max", or no such file
        return None
    return quota / period if quota > 0 and period > 0 else None


def _core(root: Path, processor: int) -> str:
    topology = root / f"sys/devices/system/cpu/cpu{processor}/topology"
    names = ("physical_package_id", "core_id")
    core = ":".join(_read(topology / name).strip() for name in names)
    return f"core {core}" if core != ":" else f"processor {processor}"


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
