"""Every op once or twice on small and odd shapes, for compute-sanitizer."""

from __future__ import annotations

import torch

from gemma2_ext import ops


def main() -> None:
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    for dtype in (torch.float32, torch.bfloat16):
        for rows, size in ((1, 41), (3, 2304)):
            x, w = torch.randn(rows, size).to(dtype), torch.randn(size).to(dtype)
            ops.rms_norm(x, w)
            ops.add_rms_norm(x, x, w, w)
            ops.geglu(x, x)
            for count in (1, 9):
                weight = torch.randn(33, size).to(dtype)
                ops.linear(x[:1].expand(count, size), weight)
                ops.logits(x[:1].expand(count, size), weight, 30.0)
        for head_dim in (64, 256):
            q, k = (torch.randn(2, 5, heads, head_dim).to(dtype) for heads in (4, 2))
            positions = torch.arange(5)
            ops.rope(q, k, positions)
            cache = torch.zeros(2, 7, 2, head_dim, dtype=dtype)
            ops.rope_append_cache(q, k, k, positions, cache, cache.clone())
            lengths = torch.full((2,), 5)
            int8 = [torch.zeros(2, 7, 2, head_dim, dtype=torch.int8) for _ in range(2)]
            scales = [torch.zeros(2, 7, 2) for _ in range(2)]
            ops.rope_append_cache(q, k, k, positions, *int8, 10000.0, *scales)
            k_scales, v_scales = scales
            for count in (1, 5):
                ops.attention_cache(
                    *(q[:, :count].repeat(1, 1, 2, 1), *int8, lengths),
                    scale=0.1,
                    k_scales=k_scales,
                    v_scales=v_scales,
                )
            try:
                ops.attention(q, k, k, window=3, scale=0.1, softcap=50.0)
                ops.attention_cache(q[:, :1], cache, cache, lengths, scale=0.1, softcap=50.0)
                token = [t[:, :1] for t in (q, k, k)]
                ops.attention_append_cache(*token, cache, cache.clone(), lengths, scale=0.1)
            except NotImplementedError as error:
                print(error)
        for format in ("int8", "int4"):
            packed = ops.quantize(torch.randn(33, 300), format)
            packed.rows(torch.tensor([0, 32, 7]), dtype, 2.0)
            for count in (1, 3, 9):
                linear = ops.linear_int8 if format == "int8" else ops.linear_int4
                linear(torch.randn(count, 300).to(dtype), packed.data, packed.scales)
        drawn = torch.empty(2, dtype=torch.int64)
        torch.ops.gemma2_ext.argmax_out(torch.randn(2, 5003), drawn)
        keys = torch.zeros(2, 2, dtype=torch.int32)
        for filters in ((0, 1.0, 0.0), (40, 0.9, 0.01), (3000, 1.0, 0.0)):
            torch.ops.gemma2_ext.draw_out(torch.randn(2, 5003), keys, 0.7, *filters, drawn)
        state = torch.zeros_like(drawn), torch.ones(2, dtype=torch.bool), drawn.clone()
        torch.ops.gemma2_ext.advance_out(drawn, drawn[:1], 0, *state)
        hidden, weight = torch.randn(5, 41).to(dtype), torch.randn(1003, 41).to(dtype)
        hidden.requires_grad_()
        weight.requires_grad_()
        target = torch.tensor([3, -100, 1002, 0, 7])
        caps = {"softcap": 3.0, "target": target}
        ops.linear_cross_entropy(hidden, weight, **caps).backward()
        options = {"temperature": 2.0, "hard_weight": 0.5, **caps}
        ops.linear_distillation(
            hidden, weight, hidden.detach(), weight.detach(), **options
        ).backward()
        log_probs, indices = torch.randn(5, 1003).log_softmax(-1).topk(40)
        ops.linear_distillation_topk(hidden, weight, indices, log_probs, **options).backward()
    torch.cuda.synchronize()
    print("all done")


if __name__ == "__main__":
    main()
