"""The whole model on random weights: prefill and decode, against transformers on the same weights.

Decoding is bound by reading the weights: memory's read bandwidth is probed before every token, and
the limit is the time to read all weights once. Both models share one set of weights
(transformers' parameters are views of ours). Packed weights are drawn as such, so that sizes run
whose bfloat16 weights memory does not hold; they have no peer in transformers, and llama.cpp in its
own formats of 8 and 4 bits. On a GPU a step is the captured one that `generate` replays.
"""

from __future__ import annotations

import functools
import inspect
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config import Gemma2Config
from ..decode_graph import DecodeGraph
from ..generate import Sampler
from ..model import Gemma2
from ..quantize import BLOCK_ROWS, Format, QuantizedWeight
from ..weights import Arena, parameter_shapes, random_weights, to_hugging_face_names
from ._common import needs
from ._harness import Result, Side, Unavailable, _quartiles, compare_tensors
from ._llama import LlamaCpp
from ._probes import CpuProbes, CudaProbes

# A prefill that takes longer is timed once.
ONCE_SECONDS = 60.0

PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class ModelSettings:
    """What is measured.

    Attributes:
        size: "2b", "9b" or "27b".
        dtype: of the weights, and of activations.
        device: "cpu" or "cuda".
        quantize: the format of packed weights, or None.
        batch: sequences that go through the model together.
        prompt: tokens of each in the prefill.
        new_tokens: that are decoded after it.
        rounds: of the prefill.
        layers: fewer than the model's, for a quick look; None: all.
        peers: whether transformers and llama.cpp are measured too.
        phases: of PHASES.

    Raises:
        ValueError: a phase that is none of PHASES.
    """

    size: str = "2b"
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    quantize: Format | None = None
    batch: int = 1
    prompt: int = 512
    new_tokens: int = 20
    rounds: int = 3
    layers: int | None = None
    peers: bool = True
    phases: tuple[str, ...] = PHASES

    def __post_init__(self) -> None:
        for phase in self.phases:
            if phase not in PHASES:
                raise ValueError(f"bench: model has no phase {phase!r}; it has {', '.join(PHASES)}")


class _Ours:
    name = "gemma2_ext"

    def __init__(self, model: Gemma2, length: int) -> None:
        self._model = model
        self._length = length

    def prefill(self, ids: Tensor) -> Tensor:
        self._cache = self._model.new_cache(len(ids), self._length)
        return self._model(ids, cache=self._cache, last_only=True)[:, -1]

    def decode(self, ids: Tensor) -> Tensor:
        return self._model(ids, cache=self._cache, last_only=True)[:, -1]


class _OursCaptured(_Ours):
    """As on a GPU: the step's tokens stay on the device."""

    _graph: DecodeGraph | None = None

    def prefill(self, ids: Tensor) -> Tensor:
        self._graph = None
        return super().prefill(ids)

    def step(self, tokens: Tensor) -> Tensor:
        if self._graph is None:
            stops = torch.empty(0, dtype=torch.int64)
            self._graph = DecodeGraph(self._model, self._cache, Sampler(), tokens[:, 0], stops)
        self._graph.step()
        return self._graph.tokens[:, None]


def _step(side: Any, tokens: Tensor) -> Tensor:
    """The most probable tokens behind these, (batch, 1)."""
    if isinstance(side, _OursCaptured):
        return side.step(tokens)
    logits: Tensor = side.decode(tokens)
    if isinstance(side, _Ours):
        return Sampler()(logits)[:, None]
    return logits.argmax(-1, keepdim=True)


def transformers_model(config: Gemma2Config, weights: dict[str, Tensor]) -> Any:
    """transformers' model, eager, whose parameters are views of our fused weights.

    Raises:
        Unavailable: transformers is not installed.
    """
    transformers: Any = needs("transformers")
    hf_config = transformers.Gemma2Config(**config.to_dict(), attn_implementation="eager")
    with torch.device("meta"):
        hf = transformers.Gemma2ForCausalLM(hf_config)
    hf.load_state_dict(to_hugging_face_names(weights, config), strict=False, assign=True)
    hf.tie_weights()
    # What is not in a checkpoint is still without a value.
    hf.model.rotary_emb = type(hf.model.rotary_emb)(hf_config)
    if hasattr(hf.model.embed_tokens, "embed_scale"):
        hf.model.embed_tokens.embed_scale = torch.tensor(config.hidden_size**0.5)
    return hf.eval().requires_grad_(False)


class _Transformers:
    name = "transformers"

    def __init__(
        self, config: Gemma2Config, weights: dict[str, Any], length: int, device: torch.device
    ) -> None:
        if not all(isinstance(w, Tensor) for w in weights.values()):
            raise Unavailable("it has no such weights")
        self._model = transformers_model(config, weights).to(device)
        names = inspect.signature(self._model.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"  # 5.24, before it

    def prefill(self, ids: Tensor) -> Tensor:
        self._cache = None
        return self.decode(ids)

    def decode(self, ids: Tensor) -> Tensor:
        cache = {self._cache_name: self._cache}
        out = self._model(input_ids=ids, use_cache=True, logits_to_keep=1, **cache)
        self._cache = getattr(out, self._cache_name)
        logits: Tensor = out.logits[:, -1]
        return logits.float()


def random_packed_weights(
    config: Gemma2Config, format: Format, dtype: torch.dtype
) -> dict[str, Tensor | QuantizedWeight]:
    """Packed weights of standard deviation hidden_size ** -0.5, drawn packed."""
    arena = Arena(config, dtype, format)
    weights: dict[str, Tensor | QuantizedWeight] = {}
    # The largest of a group is taken to 127, or to about 7 by a scale of s = 100.
    scale = 2 * config.hidden_size**-0.5 / (127 if format == "int8" else 7 * 100**2)
    for name, shape in parameter_shapes(config).items():
        if len(shape) == 1:
            weights[name] = arena.tensors[name].normal_(0, 0.05)
            continue
        data, scales = arena.tensors[f"{name}.data"], arena.tensors[f"{name}.scales"]
        words = data.view(-1).view(torch.int64)
        words.random_(-(2**63), 2**63 - 1)
        if format == "int8":
            scales.fill_(scale)
        else:
            scales.random_(80, 120)
            blocks = scales.view(shape[0] // BLOCK_ROWS, -1)
            factors = torch.full((len(blocks), BLOCK_ROWS), scale, dtype=torch.bfloat16)
            blocks[:, : 2 * BLOCK_ROWS] = factors.view(torch.int8)
        weights[name] = QuantizedWeight(data, scales, format, (shape[0], shape[1]))
    return weights


def run_model(
    settings: ModelSettings, show: Callable[[Result], None] = lambda result: None
) -> list[Result]:
    """Measures prefill, then decode.

    Returns:
        A result for each phase; seconds are those of all prompts, and of a token of each sequence.

    Raises:
        RuntimeError: this package's logits are not those of transformers.
    """
    results: list[Result] = []
    config: Gemma2Config = getattr(Gemma2Config, f"gemma2_{settings.size}")()
    if settings.layers:
        config = replace(
            config,
            num_hidden_layers=settings.layers,
            layer_types=config.layer_types[: settings.layers],
        )
    missing: list[Side] = []
    sides: list[Any] = []
    weights: dict[str, Any]
    length = settings.prompt + settings.new_tokens
    if settings.quantize:
        weights = random_packed_weights(config, settings.quantize, settings.dtype)
    else:
        weights = random_weights(config, settings.dtype, seed=0)
    size = sum(w.nbytes for w in weights.values())
    device = torch.device(settings.device)
    on_gpu = device.type == "cuda"
    ours_kind = _OursCaptured if on_gpu else _Ours
    sides.append(ours_kind(Gemma2(config, weights).to(device), length))
    peers: dict[str, Callable[[], Any]] = {
        _Transformers.name: lambda: _Transformers(config, weights, length, device),
        LlamaCpp.name: lambda: _llama_cpp(settings, config, weights, length),
    }
    for name, make in peers.items() if settings.peers else ():
        try:
            sides.append(make())
        except Unavailable as error:
            missing.append(Side(name, f"unavailable: {error}"))
    probes = CudaProbes() if on_gpu else CpuProbes()
    kind = "float32" if settings.dtype != torch.bfloat16 else "bfloat16"
    if settings.quantize:
        kind = "int8"
    ids = torch.randint(3, config.vocab_size, (settings.batch, settings.prompt)).to(device)

    def seconds(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
        """Of the call with all that it started on a GPU."""
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = call()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start, result

    with torch.inference_mode():
        taken: dict[str, list[float]] = {side.name: [] for side in sides}
        for side in sides if on_gpu else ():
            side.prefill(ids)  # libraries choose and allocate at their first calls
        logits: dict[str, Tensor] = {}
        peaks = []
        for _ in range(settings.rounds if "prefill" in settings.phases else 1):
            peaks.append(probes.arithmetic(kind))
            for side in sides:
                if taken[side.name] and taken[side.name][0] > ONCE_SECONDS:
                    continue
                time_taken, logits[side.name] = seconds(functools.partial(side.prefill, ids))
                taken[side.name].append(time_taken)
        ours, exact = logits[_Ours.name], logits.get(_Transformers.name)
        if exact is not None and (problem := compare_tensors(ours, exact, settings.dtype)):
            raise RuntimeError(f"gemma2_ext's logits are not transformers': {problem}")
        verdicts = dict.fromkeys(taken, "right")
        if LlamaCpp.name in logits and not settings.quantize:  # packed, its weights are others
            verdicts[LlamaCpp.name] = _verdict(logits[LlamaCpp.name], ours)
        # Without the embedding, whose rows are only looked up; of the head, the last token's.
        multiplied = sum(
            math.prod(shape)
            for name, shape in parameter_shapes(config).items()
            if name.startswith("layers.")
        )
        head = config.vocab_size * config.hidden_size
        prefill = _result(settings, config, "prefill", taken, verdicts, missing)
        prefill.operations = 2 * multiplied * settings.batch * settings.prompt
        prefill.peak = statistics.median(peaks)
        if prefill.peak:
            prefill.limit_seconds = prefill.operations / prefill.peak
        prefill.bound = "arithmetic"
        if "prefill" in settings.phases:
            results.append(prefill)
            show(prefill)
        if "decode" not in settings.phases:
            return results

        taken = {side.name: [] for side in sides}
        bandwidths = []
        tokens = {name: x.argmax(-1, keepdim=True) for name, x in logits.items()}
        for _ in range(settings.new_tokens):
            bandwidths.append(probes.bandwidth(1, 0))
            for side in sides:
                step = functools.partial(_step, side, tokens[side.name])
                time_taken, tokens[side.name] = seconds(step)
                taken[side.name].append(time_taken)
        decode = _result(settings, config, "decode", taken, verdicts, missing)
        decode.bytes = size
        decode.bandwidth = statistics.median(bandwidths)
        decode.operations = 2 * settings.batch * (multiplied + head)
        decode.peak = prefill.peak
        decode.limit_seconds, decode.bound = size / decode.bandwidth, "memory"
        if decode.peak and decode.operations / decode.peak > decode.limit_seconds:
            decode.limit_seconds, decode.bound = decode.operations / decode.peak, "arithmetic"
        results.append(decode)
        show(decode)
    return results


def _llama_cpp(
    settings: ModelSettings, config: Gemma2Config, weights: dict[str, Any], length: int
) -> LlamaCpp:
    if settings.device != "cpu":
        raise Unavailable("it is measured on the CPU only")
    if settings.batch > 1:
        raise Unavailable("it is measured with one sequence only")
    return LlamaCpp(config, weights, length)


def _verdict(logits: Tensor, right: Tensor) -> str:
    """Of a peer that rounds in other places: whether it computes the same at all."""
    error = float((logits.float() - right).norm() / right.norm())
    return "right" if error < 0.1 else f"wrong: its logits are off by {error:.0%}"


def _result(
    settings: ModelSettings,
    config: Gemma2Config,
    phase: str,
    taken: dict[str, list[float]],
    verdicts: dict[str, str],
    missing: list[Side],
) -> Result:
    rows = f"{settings.batch} x " if settings.batch > 1 else ""
    what = f"{'' if phase == 'prefill' else 'after '}{rows}{settings.prompt} tokens"
    return Result(
        op="model",
        shape=f"{settings.size}, {config.num_hidden_layers} layers, {what}",
        size=settings.size,
        phase=phase,
        dtype=settings.quantize or str(settings.dtype).removeprefix("torch."),
        device=settings.device,
        bytes=0,
        operations=0,
        bandwidth=0.0,
        peak=0.0,
        limit_seconds=0.0,
        bound="",
        sides=[
            Side(name, verdicts[name], statistics.median(t), _quartiles(t), len(t))
            for name, t in taken.items()
        ]
        + missing,
    )
