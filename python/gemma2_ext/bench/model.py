"""The whole model on random weights: prefill and decode, against transformers on the same weights.

Decoding is bound by reading the weights: memory's read bandwidth is probed before every token, and
the limit is the time to read all weights once. Both models share one set of weights
(transformers' parameters are views of ours).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config import Gemma2Config
from ..model import Gemma2
from ..weights import random_weights, to_hugging_face_names
from ._common import needs
from ._harness import Result, Side, Unavailable, _quartiles, compare_tensors
from ._probes import CpuProbes


@dataclass(frozen=True)
class ModelSettings:
    """What is measured.

    Attributes:
        size: "2b", "9b" or "27b".
        dtype: of the weights.
        prompt: tokens of the prefill.
        new_tokens: that are decoded after it.
        rounds: of the prefill.
        layers: fewer than the model's, for a quick look; None: all.
        peers: whether transformers is measured too.
    """

    size: str = "2b"
    dtype: torch.dtype = torch.bfloat16
    prompt: int = 512
    new_tokens: int = 20
    rounds: int = 3
    layers: int | None = None
    peers: bool = True


class _Ours:
    name = "gemma2_ext"

    def __init__(self, model: Gemma2, length: int) -> None:
        self._model = model
        self._length = length

    def prefill(self, ids: Tensor) -> Tensor:
        self._cache = self._model.new_cache(1, self._length)
        return self._model(ids, cache=self._cache, last_only=True)[:, -1]

    def decode(self, ids: Tensor) -> Tensor:
        return self._model(ids, cache=self._cache, last_only=True)[:, -1]


class _Transformers:
    name = "transformers"

    def __init__(self, config: Gemma2Config, weights: dict[str, Tensor]) -> None:
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
        self._model = hf.eval().requires_grad_(False)

    def prefill(self, ids: Tensor) -> Tensor:
        self._cache = None
        return self.decode(ids)

    def decode(self, ids: Tensor) -> Tensor:
        out = self._model(
            input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        self._cache = out.past_key_values
        logits: Tensor = out.logits[:, -1]
        return logits.float()


def run_model(
    settings: ModelSettings, show: Callable[[Result], None] = lambda result: None
) -> list[Result]:
    """Measures prefill, then decode.

    Returns:
        Two results; seconds are those of the whole prompt, and of one token.

    Raises:
        RuntimeError: this package's logits are not those of transformers.
    """
    config: Gemma2Config = getattr(Gemma2Config, f"gemma2_{settings.size}")()
    if settings.layers:
        config = replace(
            config,
            num_hidden_layers=settings.layers,
            layer_types=config.layer_types[: settings.layers],
        )
    weights = random_weights(config, settings.dtype, seed=0)
    model = Gemma2(config, weights)
    sides: list[Any] = [_Ours(model, settings.prompt + settings.new_tokens)]
    missing: list[Side] = []
    if settings.peers:
        try:
            sides.append(_Transformers(config, weights))
        except Unavailable as error:
            missing.append(Side(_Transformers.name, f"unavailable: {error}"))
    probes = CpuProbes()
    kind = "float32" if settings.dtype != torch.bfloat16 else "bfloat16"
    size = sum(w.nbytes for w in weights.values())
    ids = torch.randint(3, config.vocab_size, (1, settings.prompt))

    with torch.inference_mode():
        taken: dict[str, list[float]] = {side.name: [] for side in sides}
        logits: dict[str, Tensor] = {}
        peaks = []
        for _ in range(settings.rounds):
            peaks.append(probes.arithmetic(kind))
            for side in sides:
                start = time.perf_counter()
                logits[side.name] = side.prefill(ids)
                taken[side.name].append(time.perf_counter() - start)
        exact = logits[sides[-1].name]
        if problem := compare_tensors(logits["gemma2_ext"], exact, settings.dtype):
            raise RuntimeError(f"gemma2_ext's logits are not transformers': {problem}")
        # Without the embedding, whose rows are only looked up; of the head, the last token's.
        multiplied = sum(w.numel() for name, w in weights.items() if name.startswith("layers."))
        prefill = _result(settings, config, "prefill", taken, missing)
        prefill.operations = 2 * multiplied * settings.prompt
        prefill.peak = statistics.median(peaks)
        prefill.limit_seconds = prefill.operations / prefill.peak
        prefill.bound = "arithmetic"
        show(prefill)

        taken = {side.name: [] for side in sides}
        bandwidths = []
        tokens = {name: x.argmax(-1, keepdim=True) for name, x in logits.items()}
        for _ in range(settings.new_tokens):
            bandwidths.append(probes.bandwidth(1, 0))
            for side in sides:
                start = time.perf_counter()
                tokens[side.name] = side.decode(tokens[side.name]).argmax(-1, keepdim=True)
                taken[side.name].append(time.perf_counter() - start)
        decode = _result(settings, config, "decode", taken, missing)
        decode.bytes = size
        decode.bandwidth = statistics.median(bandwidths)
        decode.limit_seconds = size / decode.bandwidth
        decode.bound = "memory"
        show(decode)
    return [prefill, decode]


def _result(
    settings: ModelSettings,
    config: Gemma2Config,
    phase: str,
    taken: dict[str, list[float]],
    missing: list[Side],
) -> Result:
    what = f"{settings.prompt} tokens" if phase == "prefill" else f"after {settings.prompt} tokens"
    return Result(
        op="model",
        shape=f"{settings.size}, {config.num_hidden_layers} layers, {what}",
        size=settings.size,
        phase=phase,
        dtype=str(settings.dtype).removeprefix("torch."),
        device="cpu",
        bytes=0,
        operations=0,
        bandwidth=0.0,
        peak=0.0,
        limit_seconds=0.0,
        bound="",
        sides=[
            Side(name, "right", statistics.median(t), _quartiles(t), len(t))
            for name, t in taken.items()
        ]
        + missing,
    )
