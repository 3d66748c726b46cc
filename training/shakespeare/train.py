"""Trains a small Gemma 2 and its tokenizer on one text file, on a CPU, in plain torch.

Half of the rows are the text as it stands, half are its speeches as a chat in Gemma's format (a
speech is the user's turn, the next one the model's), so that the result both continues text and
answers. The last tenth of the text is held out: it stops the training early and measures it. The
result is a Hugging Face folder in bfloat16, replaced whenever the held-out loss falls.

    python train.py                       # the teacher of the model that ships, see distill.py
    python train.py --data my.txt --out my-model
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from gemma2_ext import Gemma2Config, reference

HERE = Path(__file__).resolve().parent
TEACHER = HERE / "teacher"

PAD, EOS, BOS, UNK, START_OF_TURN, END_OF_TURN = 0, 1, 2, 3, 106, 107
SPECIAL = {
    "<pad>": PAD,
    "<eos>": EOS,
    "<bos>": BOS,
    "<unk>": UNK,
    "<start_of_turn>": START_OF_TURN,
    "<end_of_turn>": END_OF_TURN,
}
TEXT_PROMPT = "ROMEO:\n"
CHAT_PROMPT = "<start_of_turn>user\nWho art thou?<end_of_turn>\n<start_of_turn>model\n"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def model_config(vocab_size: int, context: int) -> Gemma2Config:
    """A Gemma 2 of about 3.6 million parameters."""
    return Gemma2Config(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,
        max_position_embeddings=context,
        query_pre_attn_scalar=48,
        sliding_window=64,
        pad_token_id=PAD,
        eos_token_id=(EOS, END_OF_TURN),
        bos_token_id=BOS,
    )


def initial_weights(config: Gemma2Config) -> dict[str, Tensor]:
    """The fused tensors that reference.forward reads: products keep unit variance, and the norms
    behind the sub-layers start at 1 / sqrt(2 * layers), so that the stream's variance doubles."""

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns) * columns**-0.5

    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows = config.num_attention_heads * config.head_dim
    kv_rows = config.num_key_value_heads * config.head_dim
    post_norm = (2 * config.num_hidden_layers) ** -0.5 - 1.0
    weights = {
        "embed_tokens.weight": normal(config.vocab_size, hidden),
        "norm.weight": torch.zeros(hidden),
    }
    for i in range(config.num_hidden_layers):
        weights[f"layers.{i}.qkv_proj.weight"] = normal(q_rows + 2 * kv_rows, hidden)
        weights[f"layers.{i}.o_proj.weight"] = normal(hidden, q_rows)
        weights[f"layers.{i}.gate_up_proj.weight"] = normal(2 * inner, hidden)
        weights[f"layers.{i}.down_proj.weight"] = normal(hidden, inner)
        weights[f"layers.{i}.input_layernorm.weight"] = torch.zeros(hidden)
        weights[f"layers.{i}.post_attention_layernorm.weight"] = torch.full((hidden,), post_norm)
        weights[f"layers.{i}.pre_feedforward_layernorm.weight"] = torch.zeros(hidden)
        weights[f"layers.{i}.post_feedforward_layernorm.weight"] = torch.full((hidden,), post_norm)
    return weights


def hugging_face_weights(config: Gemma2Config, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The fused tensors under Hugging Face's names, in bfloat16."""
    q_rows = config.num_attention_heads * config.head_dim
    kv_rows = config.num_key_value_heads * config.head_dim
    parts = {
        "qkv_proj": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                     (q_rows, kv_rows, kv_rows)),
        "gate_up_proj": (("mlp.gate_proj", "mlp.up_proj"), (config.intermediate_size,) * 2),
        "o_proj": (("self_attn.o_proj",), (config.hidden_size,)),
        "down_proj": (("mlp.down_proj",), (config.hidden_size,)),
    }  # fmt: skip
    out = {}
    for name, tensor in weights.items():
        *layer, module, _ = name.split(".")
        names, rows = parts.get(module, ((module,), (tensor.shape[0],)))
        for part, piece in zip(names, tensor.split(rows), strict=True):
            out[".".join(("model", *layer, part, "weight"))] = piece.bfloat16().clone()
    return out


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Byte-level BPE: any UTF-8 text survives a round trip. The special tokens have Gemma's ids,
    the 256 bytes fill the room around them, merged words follow."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    trained = json.loads(tokenizer.to_str())["model"]

    taken = set(SPECIAL.values())
    free = (i for i in range(vocab_size) if i not in taken)
    vocab = SPECIAL | {
        token: next(free) for token in sorted(trained["vocab"], key=trained["vocab"].__getitem__)
    }
    merges = [tuple(merge) for merge in trained["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of the text alone, without a bos."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def split(text: str) -> tuple[str, str]:
    """The first nine tenths, to the end of a paragraph, and what is held out."""
    cut = len(text) * 9 // 10
    paragraph = text.rfind("\n\n", 0, cut)
    cut = paragraph + 2 if paragraph >= 0 else cut
    return text[:cut], text[cut:]


def speeches(text: str) -> list[str]:
    """What is said in a play: paragraphs whose first line is a name and a colon, without it."""
    return [
        m[1].strip() for m in re.finditer(r"(?:^|\n\n)[^\n:]+:\n(.+?)(?=\n\n|\s*$)", text, re.S)
    ]


class Rows:
    """Draws rows of bos and `length` ids: text from the start of a line, or a chat."""

    def __init__(self, tokenizer: Tokenizer, text: str, chat_share: float, shortest: int):
        ids = torch.tensor(encode(tokenizer, text))
        newline = torch.tensor([i for i in set(ids.tolist()) if tokenizer.decode([i])[-1:] == "\n"])
        starts = F.pad(torch.isin(ids, newline), (1, 0), value=True)[:-1].nonzero()[:, 0]
        self.plain = (ids, starts)
        self.chats = []
        turns = speeches(text)
        for first in range(2 if len(turns) > 1 else 0):  # each speech is asked, and is an answer
            chat = "".join(
                f"<start_of_turn>{('user', 'model')[i % 2]}\n{speech}<end_of_turn>\n"
                for i, speech in enumerate(turns[first:])
            )
            ids = torch.tensor(encode(tokenizer, chat))
            if len(ids) >= shortest:
                self.chats.append((ids, (ids == START_OF_TURN).nonzero()[::2, 0]))
        self.chat_share = chat_share if self.chats else 0.0

    def draw(self, batch: int, length: int) -> Tensor:
        """(batch, length + 1) ids."""
        rows = []
        for is_chat in torch.rand(batch) < self.chat_share:
            stream = int(torch.randint(2, ())) % max(len(self.chats), 1)
            ids, starts = self.chats[stream] if is_chat else self.plain
            starts = starts[starts <= len(ids) - length]
            start = int(starts[torch.randint(len(starts), ())])
            rows.append(F.pad(ids[start : start + length], (1, 0), value=BOS))
        return torch.stack(rows)


@torch.no_grad()
def bits_per_byte(
    config: Gemma2Config, weights: dict[str, Tensor], ids: Tensor, num_bytes: int, stride: int
) -> float:
    """-log2 of the probability of all ids, over the bytes they stand for. Windows of twice the
    stride, each behind a bos, overlap by half: past the first, a token has `stride` before it."""
    nats = 0.0
    for start in range(0, len(ids), stride):
        begin = max(start - stride, 0)
        window = F.pad(ids[begin : start + stride], (1, 0), value=BOS)[None]
        logits = reference.forward(config, weights, window[:, :-1])[0, start - begin :]
        nats += F.cross_entropy(logits, ids[start : start + stride], reduction="sum").item()
    return nats / math.log(2) / num_bytes


@torch.no_grad()
def sample(
    config: Gemma2Config,
    weights: dict[str, Tensor],
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.8,
) -> str:
    """What the model writes behind the prompt, to a stop or max_new_tokens."""
    ids = [BOS, *encode(tokenizer, prompt)]
    for _ in range(max_new_tokens):
        logits = reference.forward(config, weights, torch.tensor([ids]))[0, -1]
        ids.append(int(torch.multinomial((logits / temperature).softmax(-1), 1)))
        if ids[-1] in (EOS, END_OF_TURN):
            break
    return tokenizer.decode(ids, skip_special_tokens=False).removeprefix("<bos>").strip()


def write(folder: Path, name: str, content: str | dict[str, Tensor]) -> None:
    """Replaces a file of the folder at once, so that a killed run leaves a whole one."""
    path = folder / (name + ".part")
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        save_file(content, path, metadata={"format": "pt"})
    os.replace(path, folder / name)


def save_tokenizer(folder: Path, tokenizer: Tokenizer, config: Gemma2Config) -> None:
    """tokenizer.json, tokenizer_config.json and the two configs of the model."""
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
    }
    generation_config = {
        "bos_token_id": BOS,
        "eos_token_id": [EOS, END_OF_TURN],
        "pad_token_id": PAD,
        "do_sample": True,
        "temperature": 0.8,
    }
    write(folder, "tokenizer.json", tokenizer.to_str(pretty=False))
    write(folder, "tokenizer_config.json", json.dumps(tokenizer_config, indent=2) + "\n")
    write(
        folder, "config.json", json.dumps(config.to_dict() | {"dtype": "bfloat16"}, indent=2) + "\n"
    )
    write(folder, "generation_config.json", json.dumps(generation_config, indent=2) + "\n")


CARD = """\
# A Gemma 2 of {millions:.1f} million parameters, trained on {data}

A real Gemma 2 in miniature, for demonstrations and tests: it continues text in the style of what
it has read, and answers in Gemma's chat format. It knows nothing else, and what it says is not to
be relied on.

| | |
|---|---|
| hidden size, layers | {hidden_size}, {num_hidden_layers} (local and global in turns) |
| heads, key-value heads, head size | {num_attention_heads}, {num_key_value_heads}, {head_dim} |
| intermediate size | {intermediate_size} |
| vocabulary | {vocab_size} (byte-level BPE) |
| context, sliding window | {max_position_embeddings}, {sliding_window} |
| soft-caps | attention {attn_logit_softcapping:g}, logits {final_logit_softcapping:g} |
| weights | bfloat16, Hugging Face names, tied embeddings |
| **held-out loss** | **{bits_per_byte:.3f} bits per byte** |

The loss is that of the weights as stored, computed in float32, on the last tenth of the text
({held_out_bytes:,} bytes), which neither weights nor tokenizer were trained on; only the step to
keep was chosen by it. Windows of {context} tokens overlap by half: past the first window, a token
is predicted from at least {length} others.

## Tokens

`<pad>` 0, `<eos>` 1, `<bos>` 2, `<unk>` 3, `<start_of_turn>` 106 and `<end_of_turn>` 107 stand
where Gemma has them. The 256 bytes fill the ids around them, so any UTF-8 text survives a round
trip. As Gemma's does, tokenizer.json puts one `<bos>` in front of a text that is encoded with
special tokens. Generation stops at 1 and 107.

## Training

{training}

## What it writes

At temperature 0.8, drawn once and not chosen. Continuing `ROMEO:`

```
{continuation}
```

Asked by a user:

```
{answer}
```
"""


TRAINING = """\
Step {best_step} of {steps}, each of {tokens} tokens (rows of {length}, every fourth step of
{context}); AdamW at {learning_rate:g}, {warm_up} steps of warm-up, then a cosine to 0; weight decay
{weight_decay:g}, gradients clipped to {clip:g}, seed {seed}. {plain_share:.0%} of the rows are the
text as it stands, the others its speeches as a chat: one is the user's turn, the next the model's.
Float32 on a CPU ({minutes:.0f} minutes on {num_threads} of its threads). The script, the text and
how to repeat it are in the project's `training/shakespeare`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, default=HERE / "tinyshakespeare.txt", help="UTF-8")
    parser.add_argument("--out", type=Path, default=TEACHER, help="folder, made where missing")
    parser.add_argument("--steps", type=int, default=750)
    parser.add_argument("--tokens", type=int, default=2048, help="a step")
    parser.add_argument("--length", type=int, default=256, help="of a row; every fourth step twice")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--chat-share", type=float, default=0.4, help="of the rows")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--warm-up", type=int, default=100, help="steps")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--clip", type=float, default=1.0, help="norm of the gradient")
    parser.add_argument("--evaluate", type=int, default=150, help="steps between")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None, help="torch's default where missing")
    args = parser.parse_args()
    if args.vocab_size < 256 + len(SPECIAL):
        parser.error(f"--vocab-size must be at least {256 + len(SPECIAL)}, got {args.vocab_size}")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    train_text, held_out = split(args.data.read_text(encoding="utf-8"))
    tokenizer = train_tokenizer(train_text, args.vocab_size)
    held_out_ids = torch.tensor(encode(tokenizer, held_out), dtype=torch.long)
    held_out_bytes = len(held_out.encode())
    rows = Rows(tokenizer, train_text, args.chat_share, shortest=2 * args.length)
    if len(rows.plain[0]) < 2 * args.length or not held_out:
        raise SystemExit(
            f"{args.data}: {len(rows.plain[0])} tokens to train on and {held_out_bytes} bytes held "
            f"out; a row needs {2 * args.length} tokens"
        )
    config = model_config(args.vocab_size, 2 * args.length)
    save_tokenizer(args.out, tokenizer, config)

    weights = initial_weights(config)
    for tensor in weights.values():
        tensor.requires_grad_()
    groups: list[dict[str, Any]] = [
        {"params": [w for w in weights.values() if w.dim() == 2]},
        {"params": [w for w in weights.values() if w.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=args.weight_decay)
    print(
        f"{config.num_parameters:,} parameters; {len(rows.plain[0]):,} tokens to train on, "
        f"{held_out_bytes / len(held_out_ids):.2f} bytes a token held out",
        flush=True,
    )

    best, seen, begin = math.inf, 0, time.perf_counter()
    for step in range(1, args.steps + 1):
        progress = (step - args.warm_up) / max(args.steps - args.warm_up, 1)
        rate = step / args.warm_up if progress < 0 else 0.5 + 0.5 * math.cos(math.pi * progress)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * rate
        length = args.length if step % 4 else 2 * args.length
        batch = rows.draw(max(args.tokens // length, 1), length)
        logits = reference.forward(config, weights, batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        if not torch.isfinite(loss):
            raise SystemExit(f"loss is {loss.item()} at step {step}; the last checkpoint stands")
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), args.clip)
        optimizer.step()
        seen += batch.shape[0] * length
        if step % 20 == 0:
            rate = seen / (time.perf_counter() - begin)
            print(
                f"step {step}/{args.steps}  loss {loss.item():.3f}  |gradient| {norm:.2f}  "
                f"{rate:.0f} token/s",
                flush=True,
            )
        if step % args.evaluate == 0 or step == args.steps:
            rounded = {name: w.detach().bfloat16().float() for name, w in weights.items()}
            measured = bits_per_byte(
                config, rounded, held_out_ids, held_out_bytes, stride=args.length
            )
            print(f"step {step}/{args.steps}  held out {measured:.4f} bits per byte", flush=True)
            if measured < best:
                best, best_step, kept = measured, step, rounded
                write(args.out, "model.safetensors", hugging_face_weights(config, weights))
    figures = {
        "data": args.data.name,
        "millions": config.num_parameters / 1e6,
        "bits_per_byte": best,
        "best_step": best_step,
        "held_out_bytes": held_out_bytes,
        "context": config.max_position_embeddings,
        "plain_share": 1 - rows.chat_share,
        "minutes": (time.perf_counter() - begin) / 60,
        "num_threads": torch.get_num_threads(),
        "continuation": sample(config, kept, tokenizer, TEXT_PROMPT, 160),
        "answer": sample(config, kept, tokenizer, CHAT_PROMPT, 160),
    }
    print(figures["continuation"], figures["answer"], sep="\n\n")
    facts = config.to_dict() | vars(args) | figures
    write(args.out, "README.md", CARD.format(**facts, training=TRAINING.format(**facts)))


if __name__ == "__main__":
    main()
