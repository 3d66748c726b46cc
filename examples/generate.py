"""From a folder to text: greedy, sampled, as a stream, and a batch of unequal prompts.

    python examples/generate.py [FOLDER]

FOLDER is a Hugging Face folder of Gemma 2; without it, the small model that ships runs.
"""

from __future__ import annotations

import sys

import torch

from gemma2_ext import Gemma2
from gemma2_ext.models import shipped_model
from gemma2_ext.tokenizer import Tokenizer


def main(folder: str) -> None:
    model = Gemma2.from_pretrained(folder)
    tokenizer = Tokenizer.from_pretrained(folder)

    ids = torch.tensor([tokenizer.encode("ROMEO:")])
    greedy = model.generate(ids, max_new_tokens=24)
    print("greedy: ", repr(tokenizer.decode(greedy[0].tolist())))

    sampled = model.generate(ids, max_new_tokens=24, temperature=0.8, top_p=0.95, seed=1)
    print("sampled:", repr(tokenizer.decode(sampled[0].tolist())))

    # Token by token: each is there as soon as it is drawn.
    stream = model.stream(ids, max_new_tokens=24, temperature=0.8, top_p=0.95, seed=1)
    assert list(stream) == sampled[0, ids.shape[1] :].tolist()

    # Prompts of unequal length: pad on either side, and say where the tokens are.
    prompts = [tokenizer.encode(text) for text in ("JULIET:\nO", "KING RICHARD III:\nA horse")]
    width = max(map(len, prompts))
    batch = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    for row in model.generate(batch, attention_mask=mask, max_new_tokens=24):
        print("batch:  ", repr(tokenizer.decode(row[row != 0].tolist())))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(shipped_model()))
