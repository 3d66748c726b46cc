"""What a teacher says about data, stored once: its most probable tokens in each token's place.

Stored log-probabilities are those of the teacher's whole, soft-capped distribution, in float16
(relative error of a probability p at most 2^-11 |log p|). The teacher reads the data cut as
training without shifted cuts reads it, so the length of a sequence belongs to the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
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
    sequence_length: int,
    batch_tokens: int,
    name: str,
    progress: bool = False,
) -> Documents:
    """Stores a teacher's `top_k` log-probabilities for every token of the documents.

    Args:
        teacher: the model.
        tokenizer: of teacher and documents.
        documents: what to read; all go into one shard.
        path: the shard, replaced at once when all is written.
        top_k: at most the teacher's vocabulary.
        sequence_length: the most tokens of a sequence.
        batch_tokens: the most tokens of a batch.
        name: of the teacher, for the shard's header.
        progress: whether to show a progress bar on stderr.

    Returns:
        The shard, mapped.

    Raises:
        ValueError: top_k exceeds the vocabulary, or a document's ids do.
        OSError: the shard cannot be written.
    """
    config = teacher.config
    if not 1 <= top_k <= config.vocab_size:
        raise ValueError(
            f"teach: top_k must be between 1 and vocab_size = {config.vocab_size}, got {top_k}"
        )
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
    facts = {"name": name, "top_k": top_k, "sequence_length": sequence_length}
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
                best = logits.topk(top_k, sorted=True)
                log_probs = best.values - logits.logsumexp(-1, keepdim=True)
                rows = batch.rows[first : first + step].numpy()
                top_ids[rows] = best.indices.cpu().numpy()
                top_log_probs[rows] = log_probs.cpu().half().numpy()
            bar.update(len(hidden))
    return open_shard(path, tokenizer)
