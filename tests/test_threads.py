"""The default number of threads: affinity, cores, quotas of control groups."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gemma2_ext import cli
from gemma2_ext.threads import cpu_quota, default_threads

AFFINITY = sorted(os.sched_getaffinity(0))


def machine(root: Path, cgroup: str, files: dict[str, str], siblings: bool = False) -> Path:
    """A fake root: the process's control group, files below sys/fs/cgroup, and cores."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for i, processor in enumerate(AFFINITY):
        topology = root / f"sys/devices/system/cpu/cpu{processor}/topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text("0\n")
        (topology / "core_id").write_text(f"{i // 2 if siblings else i}\n")
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "cpu.max": "300000 100000\n"}, 3.0),
        # A container whose own group is the mount's root.
        ("0::/../other\n", {"cpu.max": "200000 100000\n"}, 2.0),
        ("0::/docker/1f\n", {"cpu.max": "200000 100000\n"}, 2.0),
        # Version 1.
        (
            "7:memory:/a\n4:cpu,cpuacct:/a\n",
            {"cpu/a/cpu.cfs_quota_us": "70000\n", "cpu/a/cpu.cfs_period_us": "50000\n"},
            1.4,
        ),
        (
            "4:cpu,cpuacct:/\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
            None,
        ),
        ("0::/\n", {"cpu.max": "garbage"}, None),
        ("0::/\n", {}, None),
        ("", {}, None),
    ],
)
def test_cpu_quota(cgroup: str, files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    assert cpu_quota(machine(tmp_path, cgroup, files)) == quota


def test_the_quota_bounds_the_threads(tmp_path: Path) -> None:
    for name, text, threads in (
        ("none", "max 100000", len(AFFINITY)),
        ("half", "50000 100000", 1),
        ("more", "1100000 1000000", min(2, len(AFFINITY))),
        ("much", "99900000 100000", len(AFFINITY)),
    ):
        assert default_threads(machine(tmp_path / name, "0::/\n", {"cpu.max": text})) == threads


def test_two_hardware_threads_are_one_core(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/\n", {}, siblings=True)
    assert default_threads(root) == (len(AFFINITY) + 1) // 2


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    assert default_threads(tmp_path) == len(AFFINITY)


@pytest.mark.skipif(shutil.which("taskset") is None, reason="needs taskset")
def test_the_command_line_keeps_to_its_affinity() -> None:
    command = ["taskset", "-c", str(AFFINITY[-1]), sys.executable, "-m", "gemma2_ext", "info"]
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    out = subprocess.run([*command, "--json"], capture_output=True, check=True, env=environment)
    assert json.loads(out.stdout)["threads"] == 1


def test_what_the_user_says_wins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_num_threads()
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr("gemma2_ext.cli.default_threads", lambda: 1)
        torch.set_num_threads(2)
        assert cli.main(["info", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["threads"] == 1
        torch.set_num_threads(2)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert cli.main(["info", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["threads"] == 2
        assert cli.main(["info", "--json", "--threads", "1"]) == 0
        assert json.loads(capsys.readouterr().out)["threads"] == 1
    finally:
        torch.set_num_threads(before)
