from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gemma2_ext
from gemma2_ext import Gemma2, cli, ops
from gemma2_ext.bench import OPS, Settings, _common, _probes, _report, _suite, attention, measure
from gemma2_ext.bench import model as bench_model
from gemma2_ext.bench._harness import Case, Result, Side, compare_tensors
from gemma2_ext.bench._llama import write_gguf
from gemma2_ext.weights import Arena, hugging_face_parts, random_weights
from training_common import student

QUICK = Settings(rounds=3, sample_seconds=1e-4)


@pytest.fixture(scope="module")
def probes() -> _probes.CpuProbes:
    return _probes.CpuProbes(1 << 20)


def setting(phase: str = "decode", dtype: torch.dtype = torch.float32) -> _common.Setting:
    return _common.Setting("2b", phase, dtype, "cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shapes of a model that is small enough for a test."""
    config = gemma2_ext.Gemma2Config.gemma2_2b()
    tiny = replace(
        config,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=199,
        sliding_window=24,
        query_pre_attn_scalar=16,
    )
    for size in ("2b", "9b", "27b"):
        name = f"gemma2_{size}"
        monkeypatch.setattr(gemma2_ext.Gemma2Config, name, staticmethod(lambda: tiny))
    monkeypatch.setattr(attention, "LENGTHS", {"decode": (40,), "prefill": (40,), "training": (9,)})
    monkeypatch.setattr(_common, "CACHE_BYTES", 1)


def mapping_flags(tensor: torch.Tensor) -> set[str]:
    """What the system says of the mapping that holds a tensor: "hg" huge pages, "sh" shared."""
    address, inside = tensor.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    raise AssertionError("no mapping holds the tensor")


@pytest.mark.skipif(
    not Path("/proc/self/smaps").exists()
    or not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(),
    reason="needs a Linux with huge pages",
)
def test_limit_and_weights_lie_in_huge_pages() -> None:
    """A shared mapping gets none, and a limit without is one that weights exceed."""
    config = replace(gemma2_ext.Gemma2Config.gemma2_2b(), intermediate_size=96, vocab_size=256)
    placed = {
        "probe": _probes.CpuProbes(64 << 20)._memory[0],
        "weights": setting().weights(2, 4096, 2304, scale=1.0)[1],
        "model": Arena(config, torch.bfloat16).flat(0, 1, torch.bfloat16),
    }
    for name, tensor in placed.items():
        flags = mapping_flags(tensor)
        assert "hg" in flags and "sh" not in flags, (name, flags)


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_right_in_every_phase(small: None, probes: _probes.CpuProbes, op: str) -> None:
    found = 0
    for phase in _common.PHASES:
        for case in _suite.cases(op, setting(phase)):
            result = measure(case, replace(QUICK, peers=False), probes)
            assert result.sides[0].verdict == "right"
            assert result.sides[0].seconds > 0
            assert result.sides[0].samples == 3
            assert result.limit_seconds > 0
            found += 1
    assert found


def test_a_dropped_softcap_and_a_dropped_window_are_called_wrong(
    small: None, probes: _probes.CpuProbes
) -> None:
    case, local = _suite.cases("attention", setting("prefill"))
    assert "global" in case.shape
    assert "window 24" in local.shape
    names = {name: case.peers[name] for name in ("torch eager", "SDPA")}
    result = measure(replace(case, peers=names), QUICK, probes)
    verdicts = {side.name: side.verdict for side in result.sides}
    assert verdicts["torch eager"] == "right"
    assert re.match(r"wrong: off by \d+%", verdicts["SDPA"])
    assert "wrong: off by" in "\n".join(_report.lines(result))
    dropped = measure(replace(local, peers={"no window": lambda: case.ours}), QUICK, probes)
    assert dropped.sides[1].verdict.startswith("wrong")


def test_an_own_wrong_answer_is_an_error(small: None, probes: _probes.CpuProbes) -> None:
    case = next(iter(_suite.cases("rms_norm", setting())))
    wrong = replace(case, ours=lambda i: case.ours(i) * 1.5)
    with pytest.raises(RuntimeError, match="rms_norm 1 x 64 is wrong: off by 50%"):
        measure(wrong, QUICK, probes)


def test_a_peer_that_fails_is_reported(small: None, probes: _probes.CpuProbes) -> None:
    def broken() -> None:
        raise ValueError("not here\nmore")

    case = next(iter(_suite.cases("rms_norm", setting())))
    result = measure(replace(case, peers={"broken": broken}), QUICK, probes)
    assert result.sides[1].verdict == "unavailable: ValueError: not here"
    assert "broken           unavailable" in "\n".join(_report.lines(result))


def test_liger_is_for_gpus(small: None, probes: _probes.CpuProbes) -> None:
    case = next(iter(_suite.cases("geglu", setting())))
    result = measure(replace(case, peers={"Liger": case.peers["Liger"]}), QUICK, probes)
    assert result.sides[1].verdict == "unavailable: Liger runs on GPUs only"


def test_compare_tensors() -> None:
    x = torch.randn(50)
    assert compare_tensors(x, x, torch.float32) is None
    assert compare_tensors(x.bfloat16(), x, torch.bfloat16) is None
    assert compare_tensors(x * 1.2, x, torch.bfloat16) == "off by 20%"
    assert compare_tensors(x[1:], x, torch.float32) == "shape (49,) for (50,)"
    assert compare_tensors(x * float("nan"), x, torch.float32) == "off by nan%"


def result(seconds: float, spread: float = 0.01, limit: float = 0.001) -> Result:
    side = Side(
        "gemma2_ext", "right", seconds, (seconds * (1 - spread), seconds * (1 + spread)), 20
    )
    return Result(
        op="geglu",
        shape="8 x 9216",
        size="2b",
        phase="decode",
        dtype="bfloat16",
        device="cpu",
        bytes=100,
        operations=0,
        bandwidth=100 / limit,
        peak=0.0,
        limit_seconds=limit,
        bound="memory",
        sides=[side],
    )


def test_compare_knows_noise() -> None:
    def verdict(old: Result, new: Result) -> str:
        (line,) = _report.compare([old], [new])
        return line.rsplit(": ", 1)[1]

    assert verdict(result(0.002), result(0.002)) == "no change beyond noise"
    assert verdict(result(0.002), result(0.001)) == "faster"
    assert verdict(result(0.001), result(0.002)) == "slower"
    assert (
        verdict(result(0.002, spread=0.5), result(0.0025, spread=0.5)) == "no change beyond noise"
    )
    # Memory gives half of what it gave, and the op takes twice as long.
    assert verdict(result(0.002), result(0.004, limit=0.002)) == "no change beyond noise"
    assert _report.compare([result(0.001)], [replace(result(0.001), shape="other")]) == []


def test_json_and_back(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text(_report.to_json([result(0.002)], _report.machine_facts("cpu")))
    machine, results = _report.read_json(path)
    assert results == [result(0.002)]
    assert machine["cpu_isa"] == gemma2_ext._C.cpu_isa()
    path.write_text("{}")
    with pytest.raises(ValueError, match="no results of gemma2-ext bench"):
        _report.read_json(path)
    path.write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="its format is 99"):
        _report.read_json(path)


def test_a_page_has_every_side() -> None:
    page = _report.markdown({"threads": 2}, [result(0.002)], ["bars.svg"])
    assert "![bars](bars.svg)" in page
    assert "| 8 x 9216, bfloat16, decode | gemma2_ext | 2 ms | 5e-05 GB/s | 50% |  |" in page


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    of = _report.plot_bars([result(0.002)], tmp_path / "bars.png")
    assert of == {"geglu": tmp_path / "bars.png"}
    assert (tmp_path / "bars.png").stat().st_size > 1000
    of = _report.plot_bars([result(0.002), replace(result(0.002), op="rope")], tmp_path / "b.svg")
    assert of == {"geglu": tmp_path / "b-geglu.svg", "rope": tmp_path / "b-rope.svg"}
    assert all(path.stat().st_size > 1000 for path in of.values())
    with pytest.raises(ValueError, match="a roofline needs a case that multiplies"):
        _report.plot_roofline([result(0.002)], tmp_path / "roof.png")
    multiplies = replace(result(0.002), operations=1000, peak=1e6)
    _report.plot_roofline([multiplies], tmp_path / "roof.png")
    assert (tmp_path / "roof.png").stat().st_size > 1000


def test_probes_measure(probes: _probes.CpuProbes, isa: str) -> None:
    for mix in ((1, 0), (2, 0), (1, 1), (2, 1)):
        assert probes.bandwidth(*mix) > 1e8
    assert probes.arithmetic("float32") > 1e8
    assert probes.arithmetic("bfloat16") > 1e8
    assert (probes.arithmetic("int8") > 1e8) == (isa != "scalar")


def test_probe_errors() -> None:
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or int8"):
        gemma2_ext._C.probe_multiply("int3", 1, 0.001)
    with pytest.raises(ValueError, match="threads must be at least 1"):
        gemma2_ext._C.probe_multiply("float32", 0, 0.001)
    with pytest.raises(ValueError, match="bytes must be a multiple of 65536, got 1000"):
        gemma2_ext._C.probe_memory(0, 0, 0, 1000, 1)


def test_the_probe_writes_the_sum() -> None:
    a, b, out = (torch.full((1 << 15,), value) for value in (1.0, 2.0, float("nan")))
    for fetch in (False, True):
        out.fill_(float("nan"))
        tensors = (a.data_ptr(), b.data_ptr(), out.data_ptr())
        gemma2_ext._C.probe_memory(*tensors, out.nbytes, 2, fetch)
        assert torch.equal(out, torch.full_like(out, 3.0))


def test_command(small: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    common = ("bench", "--dtype", "float32", "--rounds", "3", "--no-peers", "--phase", "decode")
    assert cli.main([*common, "rope", "--shape", "1 x", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "rope  1 x (4 + 2) heads of 16  float32 decode" in out
    page = tmp_path / "page.md"
    again = ("bench", "--load", str(path), "--compare", str(path), "--report", str(page))
    assert cli.main([*again, "--plot", str(tmp_path / "images" / "bars.png")]) == 2
    (tmp_path / "images").mkdir()
    assert cli.main([*again, "--plot", str(tmp_path / "images" / "bars.png")]) == 0
    assert "no change beyond noise" in capsys.readouterr().out
    assert page.read_text().startswith("# Performance")
    assert "## rope\n\n![rope](images/bars.png)" in page.read_text()
    assert cli.main(["bench", "--load", str(path), str(path), "--json", str(page)]) == 0
    assert page.read_text().count('"op": "rope"') == 2 * path.read_text().count('"op": "rope"')
    page.write_text(path.read_text().replace('"threads": ', '"threads": 9'))
    assert cli.main(["bench", "--load", str(path), str(page)]) == 2
    assert "its threads is 9" in capsys.readouterr().err
    assert cli.main([*again[:3], "--dtype", "float32"]) == 2
    assert "--dtype is for measuring" in capsys.readouterr().err
    assert cli.main([*again[:3], "--no-peers"]) == 2
    assert "--no-peers is for measuring" in capsys.readouterr().err
    assert cli.main(["bench", "rope", *again[1:3], "--phase", "decode", "--shape", "1 x"]) == 0


@pytest.mark.parametrize("format", [None, "int8", "int4"])
def test_the_model(
    small: None, format: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_blocks = replace(gemma2_ext.Gemma2Config.gemma2_2b(), vocab_size=208)
    name = "gemma2_2b"
    monkeypatch.setattr(gemma2_ext.Gemma2Config, name, staticmethod(lambda: whole_blocks))
    options = ("--rounds", "4", "--prompt", "9", "--layers", "2", "--dtype", "float32")
    quantized = ("--quantize", format) if format else ()
    assert cli.main(["bench", "model", *options, *quantized]) == 0
    out = capsys.readouterr().out
    assert "2b, 2 layers, 9 tokens" in out
    assert "2b, 2 layers, after 9 tokens" in out
    assert "[4 samples]" in out
    assert cli.main(["bench", "model", *options, *quantized, "--phase", "prefill"]) == 0
    out = capsys.readouterr().out
    assert "prefill" in out and "decode" not in out
    assert cli.main(["bench", "model", *options, *quantized, "--phase", "decode"]) == 0
    out = capsys.readouterr().out
    assert "decode" in out and "prefill" not in out
    assert cli.main(["bench", "model", *options, *quantized, "--batch", "3"]) == 0
    out = capsys.readouterr().out
    assert "2b, 2 layers, 3 x 9 tokens" in out
    assert "2b, 2 layers, after 3 x 9 tokens" in out
    if importlib.util.find_spec("llama_cpp"):
        assert "it is measured with one sequence only" in out


def test_a_captured_step_gives_the_same_tokens() -> None:
    # The loop of a GPU, on the CPU, where nothing is captured.
    weights = random_weights(student(), torch.float32, seed=0)
    ids = torch.randint(3, 2048, (1, 7))
    sides = [
        kind(Gemma2(student(), weights), 16)
        for kind in (bench_model._Ours, bench_model._OursCaptured)
    ]
    with torch.inference_mode():
        for _ in range(2):
            first = [side.prefill(ids).argmax(-1, keepdim=True) for side in sides]
            assert torch.equal(*first)
            tokens = first
            for _ in range(8):
                tokens = [bench_model._step(side, t) for side, t in zip(sides, tokens, strict=True)]
                assert torch.equal(*tokens)


@pytest.mark.parametrize("format", [None, "int8", "int4"])
def test_a_gguf_file_holds_the_weights(tmp_path: Path, format: Any) -> None:
    gguf = pytest.importorskip("gguf")
    config = student(intermediate_size=64)
    weights: dict[str, Any] = dict(random_weights(config, torch.bfloat16, seed=0))
    if format:
        weights = {n: ops.quantize(w, format) if w.ndim == 2 else w for n, w in weights.items()}
    write_gguf(tmp_path / "model.gguf", config, weights)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.fields["gemma2.attention.sliding_window"].contents() == config.sliding_window
    found = {t.name: t for t in reader.tensors}
    assert len(found) == 2 + 11 * config.num_hidden_layers
    norm = torch.from_numpy(found["blk.1.post_ffw_norm.weight"].data.copy())
    assert torch.equal(norm, 1 + weights["layers.1.post_feedforward_layernorm.weight"].float())
    part = hugging_face_parts(config)["layers.0.mlp.up_proj.weight"]
    tensor = found["blk.0.ffn_up.weight"]
    fused = weights[part.fused]
    dense = fused.dequantize(torch.float32) if format else fused.float()
    right = dense[part.first_row : part.first_row + part.shape[0]]
    written = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    error = (written - right).norm() / right.norm()
    assert error <= {None: 0.0, "int8": 0.01, "int4": 0.12}[format]


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_packed_weights(small: None, format: Any, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("bench", "--rounds", "3", "--quantize", format)
    assert cli.main([*options]) == 0
    out = capsys.readouterr().out
    assert f"linear  qkv: 16 x 64 -> 128  {format} decode" in out
    assert f"linear  down: 512 x 96 -> 64  {format} prefill" in out
    assert f"logits  4 x 64 -> 199  {format} decode" in out
    assert "wrong" not in out
    assert cli.main([*options, "rope"]) == 2
    assert "rope has no packed weights; linear, logits have" in capsys.readouterr().err


def test_packed_weights_repeat_those_that_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_common, "PACKED_ROWS", 32)
    setting = _common.Setting("2b", "decode", torch.bfloat16, "cpu", "int4")
    for weight in setting.packed_weights("int4", 2, 80, 70, scale=0.1):
        dense = weight.dequantize()
        assert 0.09 < dense[:32].std() < 0.11
        assert torch.equal(dense, dense[:32].repeat(3, 1)[:80])


def test_command_errors(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for options, message in {
        ("rope", "--prompt", "9"): "--prompt is for `bench model`",
        ("logits", "--phase", "training"): "no case has that phase and shape",
        ("linear", "--quantize", "int4", "--phase", "training"): "no case has that phase",
        ("--layers", "2"): "--layers is for `bench model`",
        ("rope", "--batch", "2"): "--batch is for `bench model`",
        ("model", "--shape", "1 x"): "the model is one case",
        ("model", "--phase", "training"): "model has no phase 'training'; it has prefill, decode",
    }.items():
        assert cli.main(["bench", *options]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["bench", "no_such_op"]) == 2
    assert "there is no op 'no_such_op'" in capsys.readouterr().err
    assert cli.main(["bench", "rope", "--compare", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert cli.main(["bench", "rope", "--device", "cuda"]) == 2
        assert "torch finds no CUDA device" in capsys.readouterr().err


def test_case_describes_itself(small: None) -> None:
    case = next(iter(_suite.cases("linear", setting())))
    assert isinstance(case, Case)
    assert case.shape == "qkv: 1 x 64 -> 128"
    assert case.operations == 2 * 64 * 128
