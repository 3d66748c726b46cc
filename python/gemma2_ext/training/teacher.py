"""What a teacher says about data, stored once: its most probable tokens in each token's place.

The most probable ones alone would teach that all others never come, and the more so the less sure
the teacher is. So some of the stored words are drawn from the others, in proportion to their
probability, and share what those have together: over the draws, the mean of a distillation's loss
and gradient is that of the teacher's whole distribution.

Stored log-probabilities are those of the teacher's whole, soft-capped distribution, in float16
(relative error of a probability p at most 2^-11 |log p|). The teacher reads the data cut as
training without shifted cuts reads it, so the length of a sequence belongs to the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .. import ops
from ..evaluate import LOGITS_BYTES
from ..model import Gemma2
from ..tokenizer import Tokenizer
from .data import Batches, Documents, new_teacher_shard, open_shard


def teach(
    teacher: Gemma2,
    tokenizer: Tokenizer,
    documents: Sequence[Documents],
    path: Path,
    *,
    top_k: int,
    tail: int = 0,
    seed: int = 0,
    sequence_length: int,
    batch_tokens: int,
    name: str,
    progress: bool = False,
) -> Documents:
    """Stores a teacher's log-probabilities of `top_k` words for every token of the documents.

    Args:
        teacher: the model.
        tokenizer: of teacher and documents.
        documents: what to read; all go into one shard.
        path: the shard, replaced at once when all is written.
        top_k: words of a place, at most the teacher's vocabulary.
        tail: how many of them are drawn from those less probable than the `top_k - tail` first, one
            word perhaps several times; each stands for an equal share of what they have together.
        seed: of the draws.
        sequence_length: the most tokens of a sequence.
        batch_tokens: the most tokens of a batch.
        name: of the teacher, for the shard's header.
        progress: whether to show a progress bar on stderr.

    Returns:
        The shard, mapped.

    Raises:
        ValueError: top_k exceeds the vocabulary, or a document's ids do; tail leaves no word.
        OSError: the shard cannot be written.
    """
    config = teacher.config
    if not 1 <= top_k <= config.vocab_size:
        raise ValueError(
            f"teach: top_k must be between 1 and vocab_size = {config.vocab_size}, got {top_k}"
        )
    if not 0 <= tail < top_k:
        raise ValueError(f"teach: tail must be from 0 to top_k - 1 = {top_k - 1}, got {tail}")
    batches = Batches(
        documents,
        tokenizer.bos_id,
        config.vocab_size,
        sequence_length,
        batch_tokens,
        seed=None,
    )
    sizes = [d.num_bytes for d in documents]
    num_bytes = None if None in sizes else sum(size for size in sizes if size is not None)
    tokens = np.concatenate([d.tokens for d in documents])
    ends = np.concatenate(
        [d.ends + offset for d, offset in zip(documents, batches.offsets, strict=False)]
    )
    facts = {"name": name, "top_k": top_k, "tail": tail, "sequence_length": sequence_length}
    generator = torch.Generator(teacher.device).manual_seed(seed)
    weight, softcap = teacher.embed_tokens.weight, config.final_logit_softcapping
    step = max(1, LOGITS_BYTES // (4 * config.vocab_size))
    bar = tqdm(total=len(tokens), desc="teaching", unit="token", disable=not progress)
    room = new_teacher_shard(path, tokens, ends, num_bytes, tokenizer, top_k, facts)
    with bar, room as (top_ids, top_log_probs), torch.inference_mode():
        for index in range(batches.count(0)):
            batch = batches.get(0, index)
            on_device = batch.to(teacher.device)
            hidden = teacher.hidden(on_device.input_ids, on_device.cu_seqlens, on_device.max_seqlen)
            for first in range(0, len(hidden), step):
                logits = ops.logits(hidden[first : first + step], weight, softcap)
                ids, log_probs = _words(logits, top_k - tail, tail, generator)
                rows = batch.rows[first : first + step].numpy()
                top_ids[rows] = ids.cpu().numpy()
                top_log_probs[rows] = log_probs.cpu().half().numpy()
            bar.update(len(hidden))
    return open_shard(path, tokenizer)


def _words(
    logits: Tensor, best: int, drawn: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities (tokens, best + drawn): the best words, and some of the others.

    The drawn ones share what all others have together; -inf where that is nothing.
    """
    top = logits.topk(best, sorted=True)
    largest = top.values[:, :1]
    others = (logits - largest).exp_()
    total = others.sum(-1, keepdim=True)
    log_probs = top.values - largest - total.log()
    if drawn == 0:
        return top.indices, log_probs
    others.scatter_(-1, top.indices, 0.0)
    share = others.sum(-1, keepdim=True)
    others.masked_fill_(share == 0, 1.0)  # any will do: they are marked absent
    ids = torch.multinomial(others, drawn, replacement=True, generator=generator)
    each = (share / total / drawn).log().expand(-1, drawn)
    return torch.cat([top.indices, ids], -1), torch.cat([log_probs, each], -1)
