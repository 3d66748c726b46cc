"""transformers with these kernels by one line, against its own eager attention.

    python examples/transformers_one_line.py [FOLDER]

Needs transformers 4.57 or later.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gemma2_ext.integrations.transformers as hf
from gemma2_ext.models import shipped_model


def main(folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("ROMEO:", return_tensors="pt")
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")

    # One line before loading: the attention, its masks, soft-cap and window.
    hf.register()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="gemma2_ext")
    with torch.no_grad():
        difference = (model(**inputs).logits - eager(**inputs).logits).abs().max()
    print(f"attention alone: logits differ by {difference:.1e}")

    # One line after loading: norms, GeGLU, RoPE, products, logits and loss too.
    hf.patch(model)
    with torch.no_grad():
        difference = (model(**inputs).logits - eager(**inputs).logits).abs().max()
        text = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    print(f"patched: logits differ by {difference:.1e}")
    print(tokenizer.decode(text[0], skip_special_tokens=True))

    # And back: the same classes, the same attention as before.
    hf.unpatch(model)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(shipped_model()))
