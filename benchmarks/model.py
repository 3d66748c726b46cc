"""Whole model against transformers, in turns: prefill and decode token/s on random weights.

    python benchmarks/model.py --size 2b --prompt 512 --new-tokens 16 --json out.json
    python benchmarks/model.py --size 27b --quantize int4 --prompt 16

Packed weights are drawn as such, so that sizes run whose bfloat16 weights memory does not hold;
they have no peer in transformers.
Both models share one set of weights (transformers' parameters are views of ours). The memory's read
bandwidth is probed between the decoded tokens, so that a share of it means something on a machine
whose memory is also used by others.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

import gemma2_ext
from gemma2_ext import Gemma2, Gemma2Config, QuantizedWeight
from gemma2_ext.quantize import BLOCK_ROWS, FORMATS, Format
from gemma2_ext.weights import Arena, parameter_shapes, random_weights, to_hugging_face_names

PROBE_BYTES = 1 << 30


def random_packed_weights(
    config: Gemma2Config, format: Format, dtype: torch.dtype
) -> dict[str, torch.Tensor | QuantizedWeight]:
    """Packed weights of standard deviation hidden_size ** -0.5, drawn packed."""
    arena = Arena(config, dtype, format)
    weights: dict[str, torch.Tensor | QuantizedWeight] = {}
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


def read_bandwidth(buffer: torch.Tensor) -> float:
    """GB/s of one pass over a buffer much larger than the caches (a sum, all threads)."""
    start = time.perf_counter()
    buffer.view(torch.int64).sum()
    return buffer.nbytes / (time.perf_counter() - start) / 1e9


def transformers_model(config: Gemma2Config, weights: dict[str, torch.Tensor]):
    import transformers

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


class Ours:
    name = "gemma2_ext"

    def __init__(self, model: Gemma2, length: int) -> None:
        self.model, self.length = model, length

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        self.cache = self.model.new_cache(1, self.length)
        return self.model(ids, cache=self.cache, last_only=True)[:, -1].argmax(-1, keepdim=True)

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, cache=self.cache, last_only=True)[:, -1].argmax(-1, keepdim=True)


class Transformers:
    name = "transformers eager"

    def __init__(self, model) -> None:
        self.model = model

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        self.cache = None
        return self.decode(ids)

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        out = self.model(
            input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        self.cache = out.past_key_values
        return out.logits[:, -1].argmax(-1, keepdim=True)


def timed(call, *args) -> tuple[float, torch.Tensor]:
    start = time.perf_counter()
    result = call(*args)
    return time.perf_counter() - start, result


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="2b", choices=("2b", "9b", "27b"))
    parser.add_argument("--layers", type=int, help="fewer layers, for a quick look")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--quantize", choices=FORMATS)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1, help="of prefill")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-peer", action="store_true", help="without transformers")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    config = getattr(Gemma2Config, f"gemma2_{args.size}")()
    if args.layers:
        from dataclasses import replace

        config = replace(
            config, num_hidden_layers=args.layers, layer_types=config.layer_types[: args.layers]
        )
    if args.quantize:
        weights = random_packed_weights(config, args.quantize, dtype)
    else:
        weights = random_weights(config, dtype, seed=0)
    sides = [Ours(Gemma2(config, weights), args.prompt + args.new_tokens)]
    if not args.no_peer and not args.quantize:
        sides.append(Transformers(transformers_model(config, weights)))
    probe = torch.ones(PROBE_BYTES // 8, dtype=torch.int64)
    weight_bytes = sum(w.nbytes for w in weights.values())

    ids = torch.randint(3, config.vocab_size, (1, args.prompt))
    prefill: dict[str, list[float]] = {side.name: [] for side in sides}
    decode: dict[str, list[float]] = {side.name: [] for side in sides}
    bandwidth: list[float] = []
    tokens = {}
    for _ in range(args.rounds):
        for side in sides:
            seconds, tokens[side.name] = timed(side.prefill, ids)
            prefill[side.name].append(seconds)
    for _ in range(args.new_tokens):
        bandwidth.append(read_bandwidth(probe))
        for side in sides:
            seconds, tokens[side.name] = timed(side.decode, tokens[side.name])
            decode[side.name].append(seconds)

    limit = statistics.median(bandwidth) * 1e9 / weight_bytes
    result = {
        "machine": platform.processor() or platform.machine(),
        "cpu_isa": gemma2_ext._C.cpu_isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "size": args.size,
        "layers": config.num_hidden_layers,
        "dtype": args.dtype,
        "quantize": args.quantize,
        "prompt": args.prompt,
        "read_bandwidth_gb_s": statistics.median(bandwidth),
        "decode_limit_token_s": limit,
        "sides": {},
    }
    layers, threads = config.num_hidden_layers, torch.get_num_threads()
    print(f"{args.size} {args.quantize or args.dtype}, {layers} layers, {threads} threads")
    print(f"read bandwidth {result['read_bandwidth_gb_s']:.1f} GB/s: at most {limit:.1f} token/s")
    for side in sides:
        row = {
            "prefill_token_s": args.prompt / min(prefill[side.name]),
            "decode_token_s": 1 / statistics.median(decode[side.name]),
        }
        row["decode_share_of_limit"] = row["decode_token_s"] / limit
        result["sides"][side.name] = row
        print(
            f"{side.name:20s} prefill {row['prefill_token_s']:8.1f} token/s   "
            f"decode {row['decode_token_s']:6.2f} token/s "
            f"({row['decode_share_of_limit']:.0%} of the limit)"
        )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
