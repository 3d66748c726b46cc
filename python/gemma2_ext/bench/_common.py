"""What the descriptions of the ops share: shapes by model size, sets of inputs, peers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cache import cache_room
from ..config import Gemma2Config
from ..quantize import BLOCK_ROWS, Format, QuantizedWeight, quantize
from ._harness import Call, Unavailable, compare_tensors

SIZES = ("2b", "9b", "27b")
PHASES = ("decode", "prefill", "training")
CACHE_BYTES = 96 << 20  # more than the last-level cache of what this runs on
MOST_SETS = 64
PACKED_ROWS = 512  # that are drawn, a multiple of BLOCK_ROWS
ROWS = {"decode": (1, 8), "prefill": (512, 2048), "training": (2048,)}


@dataclass(frozen=True)
class Setting:
    """What the cases of an op are made for."""

    size: str
    phase: str
    dtype: torch.dtype
    device: str
    quantize: Format | None = None  # the format of packed weights

    @property
    def config(self) -> Gemma2Config:
        """The model whose shapes are measured."""
        config: Gemma2Config = getattr(Gemma2Config, f"gemma2_{self.size}")()
        return config

    @property
    def dtype_name(self) -> str:
        """As in `--dtype`."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def arithmetic(self) -> str:
        """What products run in."""
        if self.quantize and self.device == "cpu":
            return "int8"
        if self.dtype == torch.float32 or (self.device == "cpu" and self.dtype == torch.float16):
            return "float32"
        return self.dtype_name

    @property
    def facts(self) -> dict[str, Any]:
        """The fields of a Case that these are."""
        return {
            "size": self.size,
            "phase": self.phase,
            "dtype": self.quantize or self.dtype_name,
            "device": self.device,
        }

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        """A tensor of this dtype on this device; a training phase asks for its gradient."""
        x = (torch.randn(shape, device=self.device) * scale).to(self.dtype)
        return x.requires_grad_(self.phase == "training")

    def weights(self, count: int, *shape: int, scale: float) -> list[Tensor]:
        """`count` times `randn`, on the CPU in huge pages as the model's weights are."""
        room = cache_room([math.prod(shape)] * count, self.dtype, torch.device(self.device))
        made = [t.view(shape).normal_(0, scale) for t in room]
        return [t.requires_grad_(self.phase == "training") for t in made]

    def packed_weights(
        self, format: Format, count: int, rows: int, columns: int, *, scale: float
    ) -> list[QuantizedWeight]:
        """`count` packed matrices of like values, in huge pages likewise."""
        device = torch.device(self.device)
        # Blocks of rows are packed each on its own, so they can be repeated.
        drawn = rows if rows % BLOCK_ROWS else min(rows, PACKED_ROWS)
        few = quantize(torch.randn(drawn, columns, device=device) * scale, format)
        parts = []
        for part in (few.data, few.scales):
            room = cache_room([rows * part.shape[1]] * count, part.dtype, device)
            for flat in room:
                for first in range(0, rows, drawn):
                    to = flat.view(rows, -1)[first : first + drawn]
                    to.copy_(part[: len(to)])
            parts.append([flat.view(rows, -1) for flat in room])
        return [QuantizedWeight(d, s, format, (rows, columns)) for d, s in zip(*parts, strict=True)]


def number_of_sets(bytes_of_one: int) -> int:
    """Sets of inputs that together lie beyond the caches."""
    return max(2, min(MOST_SETS, -(-CACHE_BYTES // max(1, bytes_of_one))))


def sets_of(count: int, make: Callable[[], tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """`count` sets of inputs, each a tuple of arguments."""
    return [make() for _ in range(count)]


def forward_backward(function: Callable[..., Any], inputs: list[tuple[Any, ...]]) -> Call:
    """Runs `function` on a set; where it has inputs that ask for gradients, backward as well.

    A backward run returns the gradients, so that they are what is checked; the results' own are
    ones, made once.
    """
    ones: dict[int, list[Tensor]] = {}

    def call(i: int) -> Any:
        arguments = inputs[i]
        out = function(*arguments)
        wanted = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
        if not wanted:
            return out
        outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
        if i not in ones:
            ones[i] = [torch.ones_like(o) for o in outs]
        return torch.autograd.grad(outs, wanted, ones[i])

    return call


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of it, for these shapes alone."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def peer(
    function: Callable[..., Any], inputs: list[tuple[Any, ...]], *, compile: bool = False
) -> Callable[[], Call]:
    """What makes a peer's callable from a function of one set's arguments."""
    return lambda: forward_backward(compiled(function) if compile else function, inputs)


def needs(module: str) -> Any:
    """Imports a peer's module.

    Raises:
        Unavailable: it is not installed, or does not run here.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise Unavailable(f"{module} is not installed") from None


def needs_cuda(setting: Setting, what: str) -> None:
    """Raises Unavailable unless the setting is on a GPU."""
    if setting.device != "cuda":
        raise Unavailable(f"{what} runs on GPUs only")


def checker(
    exact: Callable[..., Any], arguments: tuple[Any, ...], dtype: torch.dtype
) -> Callable[[Any], str | None]:
    """Compares a result with the reference in float32 on set 0, computed at the first use."""
    answers: list[tuple[Tensor, ...]] = []

    def check(result: Any) -> str | None:
        if not answers:
            wide = tuple(
                a.detach().float().requires_grad_(a.requires_grad)
                if isinstance(a, Tensor) and a.is_floating_point()
                else a
                for a in arguments
            )
            answer = forward_backward(exact, [wide])(0)
            answers.append(answer if isinstance(answer, tuple) else (answer,))
        parts = result if isinstance(result, tuple) else (result,)
        if len(parts) != len(answers[0]):
            return f"{len(parts)} results for {len(answers[0])}"
        for part, answer in zip(parts, answers[0], strict=True):
            if problem := compare_tensors(part.detach(), answer.detach(), dtype):
                return problem
        return None

    return check
