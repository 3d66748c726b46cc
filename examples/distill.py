"""A distillation step by hand: a small student learns the shipped model's distributions.

    python examples/distill.py

`gemma2-ext distill` does this at length, over files, with checkpoints. Here are its parts: hidden
states of packed sequences, and a loss that never stores a row of the vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from gemma2_ext import Gemma2, ops
from gemma2_ext.models import shipped_model
from gemma2_ext.tokenizer import Tokenizer

TEXT = "ROMEO:\nO, she doth teach the torches to burn bright!\n"


def main(steps: int = 5) -> None:
    torch.manual_seed(0)
    teacher = Gemma2.from_pretrained(shipped_model(), torch.float32)
    tokenizer = Tokenizer.from_pretrained(shipped_model())
    config = replace(
        teacher.config, num_hidden_layers=2, layer_types=teacher.config.layer_types[:2]
    )
    student = Gemma2(config, dtype=torch.float32).requires_grad_(True)

    ids = torch.tensor(tokenizer.encode(TEXT))
    cu_seqlens = torch.tensor([0, len(ids)])  # one sequence; more stand one behind another
    with torch.no_grad():
        target = teacher.hidden(ids, cu_seqlens, len(ids))

    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for step in range(steps):
        loss = ops.linear_distillation(
            student.hidden(ids, cu_seqlens, len(ids)),
            student.embed_tokens.weight,
            target,
            teacher.embed_tokens.weight,
            softcap=config.final_logit_softcapping,
            teacher_softcap=teacher.config.final_logit_softcapping,
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: {loss.item():.3f} nats a token")


if __name__ == "__main__":
    main()
