"""llama.cpp as a peer of the model: our weights as a GGUF file, through llama-cpp-python's C calls.

Norm weights are 1 + w there. Packed weights are unpacked and packed again in llama.cpp's format of
the same bits, so what it computes is of other weights, and only its time is of use.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import Gemma2Config
from ..quantize import QuantizedWeight
from ..weights import hugging_face_parts
from ._common import needs

# Of a checkpoint's matrices and norms, in a layer.
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_feedforward_layernorm": "post_ffw_norm",
}
KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
PACKED_KINDS = {"int8": "Q8_0", "int4": "Q4_0"}
ROWS_AT_ONCE = 4096


def gguf_name(name: str) -> str:
    """Of a tensor "layers.0.mlp.up_proj.weight", "embed_tokens.weight" or "norm.weight"."""
    if name == "embed_tokens.weight":
        return "token_embd.weight"
    if name == "norm.weight":
        return "output_norm.weight"
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def write_gguf(
    path: Path, config: Gemma2Config, weights: Mapping[str, Tensor | QuantizedWeight]
) -> None:
    """Writes fused weights as a GGUF file without a vocabulary.

    Raises:
        Unavailable: gguf is not installed.
    """
    gguf = needs("gguf")
    writer = gguf.GGUFWriter(path, "gemma2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping or 0.0)
    writer.add_final_logit_softcapping(config.final_logit_softcapping or 0.0)
    writer.add_sliding_window(config.sliding_window)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, part in hugging_face_parts(config).items():
        weight = weights[part.fused]
        if len(part.shape) == 1:
            assert isinstance(weight, Tensor)
            writer.add_tensor(gguf_name(name), (1 + weight.float()).numpy())
            continue
        data, kind = _matrix(gguf, weight, part.first_row, part.shape[0])
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _matrix(
    gguf: Any, weight: Tensor | QuantizedWeight, first: int, rows: int
) -> tuple[np.ndarray[Any, Any], Any]:
    if isinstance(weight, Tensor):
        part = weight.narrow(0, first, rows).contiguous()
        return part.view(torch.uint8).numpy(), gguf.GGMLQuantizationType[KINDS[part.dtype]]
    kind = gguf.GGMLQuantizationType[PACKED_KINDS[weight.format]]
    dense = weight.dequantize(torch.float32)[first : first + rows]
    return np.concatenate(
        [gguf.quants.quantize(t.numpy(), kind) for t in dense.split(ROWS_AT_ONCE)]
    ), kind


class LlamaCpp:
    """A model in llama.cpp, with as many threads as torch has.

    Args:
        config: its sizes.
        weights: fused ones, packed or not.
        length: tokens that its cache holds.

    Raises:
        Unavailable: llama-cpp-python or gguf is not installed.
        RuntimeError: llama.cpp does not take the file.
    """

    name = "llama.cpp"

    def __init__(
        self,
        config: Gemma2Config,
        weights: Mapping[str, Tensor | QuantizedWeight],
        length: int,
    ) -> None:
        self._library = library = needs("llama_cpp")
        self._vocab_size = config.vocab_size
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name) / "model.gguf"
        write_gguf(path, config, weights)
        library.llama_backend_init()
        self._log = library.llama_log_callback(lambda *_: None)
        library.llama_log_set(self._log, ctypes.c_void_p(0))
        model = library.llama_model_load_from_file(
            str(path).encode(), library.llama_model_default_params()
        )
        options = library.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = length + 1, length + 1, 512
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self._context = model and library.llama_init_from_model(model, options)
        if not self._context:
            raise RuntimeError("llama.cpp does not load the GGUF file")

    def prefill(self, ids: Tensor) -> Tensor:
        """Logits of the last of (1, seqlen) tokens, (1, vocab_size), from an empty cache."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        return self.decode(ids)

    def decode(self, ids: Tensor) -> Tensor:
        """The same behind what the cache holds."""
        tokens = ids[0].tolist()
        array = (self._library.llama_token * len(tokens))(*tokens)
        batch = self._library.llama_batch_get_one(array, len(tokens))
        if status := self._library.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode: {status}")
        logits = self._library.llama_get_logits_ith(self._context, -1)
        return torch.from_numpy(np.ctypeslib.as_array(logits, (self._vocab_size,)).copy())[None]
