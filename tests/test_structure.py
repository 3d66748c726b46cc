"""Rules that hold the project together: each op is whole, includes and imports run one way."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from gemma2_ext import ops, reference

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "gemma2_ext"
OPS = sorted(p.stem for p in (PACKAGE / "ops").glob("*.py") if not p.stem.startswith("_"))
# What an op is made of that the reference does not have by that name: reference.linear and a cap,
# and rope and attention over tensors in place of caches.
WITHOUT_REFERENCE = {
    *("logits", "logits_int8", "logits_int4", "rope_append_cache", "attention_cache"),
    *("attention_paged", "attention_append_cache"),
}
# Public functions of ops without a dispatcher's name.
NO_OPS = {"quantize"}
BACKWARD = sorted(
    name.removeprefix("gemma2_ext::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("gemma2_ext::") and name.endswith("_backward")
)


def test_the_public_functions_are_the_files() -> None:
    assert sorted(set(ops.__all__) - NO_OPS) == OPS


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_whole(op: str) -> None:
    """Schema, out form, fake, binding, docstring, reference, tests: under one name everywhere."""
    function = getattr(ops, op)
    for name in (op, f"{op}_out"):
        overload = getattr(torch.ops.gemma2_ext, name).default
        assert torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), "CPU")
        assert has_fake(name), f"{name} has no fake"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gemma2_ext::{op}", "Autograd")
    parameters = inspect.signature(function).parameters
    names = [a.name for a in getattr(torch.ops.gemma2_ext, op).default._schema.arguments]
    assert sorted(parameters) == sorted(names)
    doc = inspect.getdoc(function) or ""
    for section in ("Args:", "Returns:", "Raises:", "Source:"):
        assert section in doc, f"the docstring of {op} has no {section}"
    for name in parameters:
        assert re.search(rf"\b{name}\b", doc), f"the docstring of {op} does not name {name}"
    if op not in WITHOUT_REFERENCE:
        plain = inspect.signature(getattr(reference, op)).parameters.keys()
        assert plain | {"return_lse"} == parameters.keys() | {"return_lse"}
    test = (ROOT / "tests" / f"test_{op}.py").read_text()
    for word in ("opcheck(", "fullgraph=True", "isa"):
        assert word in test, f"tests/test_{op}.py has no {word}"


def has_fake(name: str) -> bool:
    entry = torch._library.simple_registry.singleton.find(f"gemma2_ext::{name}")
    return entry.fake_impl.kernel is not None


@pytest.mark.parametrize("backward", BACKWARD)
def test_a_backward_is_whole(backward: str) -> None:
    """Of an op: two forms, of which the bindings write the `_out` one and Python the other, fakes,
    and a second derivative that raises; it has no public function."""
    op = backward.removesuffix("_backward")
    assert op in OPS
    assert backward not in ops.__all__
    for name in (backward, f"{backward}_out"):
        assert has_fake(name), f"{name} has no fake"
    for key, name in (
        ("CPU", f"{backward}_out"),
        ("CompositeExplicitAutograd", backward),
        ("Autograd", backward),
        ("Autograd", op),
    ):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gemma2_ext::{name}", key), name
    inputs = getattr(torch.ops.gemma2_ext, backward).default._schema.arguments
    all_arguments = getattr(torch.ops.gemma2_ext, f"{backward}_out").default._schema.arguments
    assert [a.name for a in all_arguments[: len(inputs)]] == [a.name for a in inputs]
    for result in all_arguments[len(inputs) :]:
        assert result.name.startswith("grad_")
        assert result.alias_info.is_write
    test = (ROOT / "tests" / f"test_{op}.py").read_text()
    for word in ("gradcheck(", "assert_gradients_accurate(", "assert_independent_of_threads("):
        assert word in test, f"tests/test_{op}.py has no {word}"


def includes(path: Path) -> list[str]:
    return re.findall(r'#include\s+["<]([^">]+)[">]', path.read_text())


def test_only_bindings_know_torch() -> None:
    for path in (ROOT / "csrc").rglob("*.[ch]*"):
        of_torch = [i for i in includes(path) if i.startswith(("torch/", "ATen/", "c10/"))]
        allowed = "torch" in path.relative_to(ROOT / "csrc").parts or path.stem in (
            *("schema", "module"),
        )
        assert allowed or not of_torch, f"{path}: {of_torch}"
        if "cpu" in path.parts:
            assert not [i for i in includes(path) if i.startswith("../torch")], path
        stable = all(i.startswith(("torch/csrc/stable/", "torch/headeronly/")) for i in of_torch)
        assert stable, f"{path} includes what is not of the stable ABI: {of_torch}"


def test_every_op_raises_value_errors() -> None:
    """Torch 2.15 and later make RuntimeError of what TORCH_BOX lets through."""
    text = "".join(path.read_text() for path in (ROOT / "csrc").rglob("*.cpp"))
    boxes = re.findall(r"m\.impl\(\s*\"\w+\",\s*(\w+)\(", text)
    assert len(boxes) == text.count("m.impl(") > 0
    assert set(boxes) == {"GEMMA2_BOX"}


def test_only_one_header_has_ptx() -> None:
    """So that every kernel can run in emulation; and shared memory comes from one place."""
    for path in (ROOT / "csrc" / "cuda").iterdir():
        if path.name == "ptx.cuh" or "wgmma" in path.name:
            continue
        text = re.sub(r"//[^\n]*", "", path.read_text())
        for word in (r"\basm\b", "__shared__", r"_sync\(", "<<<"):
            allowed = word == "<<<" and path.name == "launch.cuh"
            assert allowed or not re.search(word, text), f"{path.name} has {word}"


def test_every_cuda_kernel_is_tested_in_emulation() -> None:
    for path in (ROOT / "csrc" / "cuda").glob("*.cu"):
        assert f"csrc/cuda/{path.name}" in (ROOT / "CMakeLists.txt").read_text()
        test = "linear" if path.stem == "soft_cap" else path.stem
        assert (ROOT / "tests" / "host_cuda" / f"test_cuda_{test}.py").exists(), path.name


def test_kernels_use_no_templates_of_the_standard_library() -> None:
    """The linker could pick their wide copy for code that runs before the check."""
    free = {"table.cpp", "isa.cpp", "isa.h", "float64.cpp"}
    for path in (ROOT / "csrc" / "cpu").iterdir():
        if path.name in free:
            continue
        for include in includes(path):
            assert include.endswith(".h") or include == "cstdint", (path, include)


def test_imports_run_one_way() -> None:
    """A module imports only from those before it."""
    order = [
        *(
            "_C",
            "_memory",
            "quantize",
            "ops",
            "nn",
            "reference",
            "config",
            "device",
            "weights",
            "packed",
        ),
        *(
            "cache",
            "decode_calls",
            "decode_graph",
            "speculative",
            "generate",
            "model",
            "models",
            "threads",
            "tokenizer",
            "evaluate",
        ),
        *("chat", "training", "bench", "cli", "__main__"),
    ]
    found = {p.stem for p in PACKAGE.glob("*.py")} - {"__init__"}
    assert found <= set(order)
    for name in found:
        tree = ast.parse((PACKAGE / f"{name}.py").read_text())
        typing_only = {
            node
            for branch in ast.walk(tree)
            if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.dump(branch.test)
            for node in ast.walk(branch)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or node.level != 1 or node in typing_only:
                continue
            modules = [node.module] if node.module else [a.name for a in node.names]
            for module in modules:
                if module in order:
                    assert order.index(module) < order.index(name), f"{name} imports {module}"


def test_importing_the_package_imports_no_extra() -> None:
    code = """
import sys, gemma2_ext, gemma2_ext.cli
for name in ("transformers", "sentencepiece", "tokenizers", "safetensors"):
    assert name not in sys.modules, name
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_objects_of_an_instruction_set_share_nothing() -> None:
    """No weak symbol: the linker keeps one of several copies, and might keep the widest."""
    own = f"{sysconfig.get_platform()}-*"  # setup.py's folder, not those of scripts/variant.sh
    objects = list((ROOT / "build").glob(f"{own}/CMakeFiles/_C_*.dir/**/*.o"))
    if not objects:
        pytest.skip("the package was built elsewhere")
    for path in objects:
        isa = re.search(r"_C_(\w+)\.dir", str(path))
        assert isa
        table = subprocess.run(
            ["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True
        ).stdout
        for line in table.splitlines():
            kind, name = line.split(maxsplit=2)[1:]
            assert kind not in "WVu", f"{path}: weak {name}"
            if kind.isupper():
                assert f"gemma2::{isa[1]}::" in name, f"{path}: {name}"
