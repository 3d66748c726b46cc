"""Training and distillation of Gemma 2.

`gemma2-ext train`, `distill`, `teach` and `tokenize` are made of these parts: `data` cuts and
packs, `module` computes a batch's loss, `trainer` is the loop, `checkpoint` and `export` write what
comes out of it, `teacher` stores what a teacher says, `commands` is the command line.
"""
