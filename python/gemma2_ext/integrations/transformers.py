"""transformers with these kernels: `register()` for the attention alone, `patch(model)` for all.

    import gemma2_ext.integrations.transformers as hf

    hf.register()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="gemma2_ext")
    hf.patch(model)  # norms, GeGLU, RoPE, products, logits, loss too; hf.unpatch(model) undoes it

Works with transformers 4.57 and later, any cache of theirs and every way to generate. Between the
mask function and the attention function goes an int32 tensor in place of a 4-D mask: (2, batch),
where each row's keys start and end; (3, batch), with the number of its queries that are padding; or
(sequences + 1,), where packed sequences begin; or None.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers import masking_utils as _masks
    from transformers.loss.loss_utils import ForCausalLMLoss
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.gemma2 import modeling_gemma2 as _stock
    from transformers.utils import can_return_tuple
except ImportError as error:
    raise ImportError(
        "gemma2_ext.integrations.transformers needs transformers 4.57 or later: "
        "pip install 'transformers>=4.57'"
    ) from error

from .. import ops

__all__ = ["NAME", "attention_forward", "attention_mask", "patch", "register", "unpatch"]

NAME = "gemma2_ext"
# What the models of transformers hand to an attention function and these kernels do not have.
_UNSUPPORTED = (
    *("s_aux", "sinks", "position_bias", "attention_bias", "alibi", "head_mask"),
    *("layer_head_mask", "block_mask", "score_mod", "block_table"),
)
_Module = TypeVar("_Module", bound=nn.Module)
_Function = TypeVar("_Function", bound=Callable[..., Any])


def register() -> None:
    """Makes `attn_implementation="gemma2_ext"` known to transformers, its masks included.

    For models that are loaded with it, or by `model.set_attn_implementation("gemma2_ext")`. A
    second call changes nothing. What is then computed is `ops.attention` with the model's scale,
    soft-cap and sliding window, and no attention weights are stored: `output_attentions` is
    refused, so are attention dropout, attention that is not causal, and masks other than padding
    on the left or right and packed sequences.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


# ------------------------------------------------------------------------------------------ masks


def attention_mask(
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = _masks.causal_mask_function,
    attention_mask: Tensor | None = None,
    *,
    cache_position: Tensor | None = None,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    use_vmap: bool = False,
    device: torch.device | str | None = None,
    **_: Any,
) -> Tensor | None:
    """What transformers calls for a mask: bounds of each row's keys, instead of a 4-D tensor.

    Args:
        batch_size: rows.
        kv_length: keys that the attention will be given, empty slots of a static cache included.
        kv_offset: position of the first of them.
        mask_function: transformers' pattern, of which causal, windowed and packed ones are known.
        attention_mask: (batch, positions), True where there is a token.
        cache_position: (q_length,), positions of the queries; up to transformers 5.3.
        q_length: number of queries; from transformers 5.4 on.
        q_offset: position of the first query; from transformers 5.4 on.
        use_vmap: True where a caller has laid a function of its own over the mask.
        device: of the result.

    Returns:
        None: the keys are those of the last query and before. (2, batch) int32: each row's first
        key and the end of its keys. (3, batch) int32: and how many of its queries stand before its
        first key. (sequences + 1,) int32: where packed sequences begin and end.

    Raises:
        NotImplementedError: the kernels cannot express the mask: padding between tokens,
            attention that is not causal, blocks, chunks, a function of the caller.
        ValueError: attention_mask has fewer columns than there are positions.
    """
    if cache_position is not None:
        q_length, device = cache_position.shape[0], cache_position.device
        q_offset = cache_position[0]
    assert q_length is not None
    if torch.compiler.is_compiling():
        # A graph cannot look into functions. It can ask them: does each query see the key before
        # its own? That fails where one packed sequence ends and another begins.
        if use_vmap:
            raise NotImplementedError(_refusal("a mask function of the caller"))
        if attention_mask is None and not isinstance(q_offset, Tensor) and q_offset == 0:
            _assert_unpacked(mask_function, batch_size, q_length, device)
    else:
        sequences = _sequences(mask_function)
        if sequences is not None:
            packed = _packed(sequences.expand(batch_size, -1))
            if packed is not None:
                return packed
    return _bounds(attention_mask, batch_size, q_length, q_offset, kv_length, kv_offset, device)


def _refusal(what: str) -> str:
    return (
        f"gemma2_ext: {what} is not supported; attention is causal, with padding on the left or "
        "right, or packed sequences. attn_implementation='eager' takes any mask"
    )


def _sequences(function: Callable[..., Any]) -> Tensor | None:
    """The number of its sequence for each packed token, or None where the mask packs nothing.

    Raises NotImplementedError for a pattern other than causal, windowed, packed or these together.
    """
    if function is _masks.causal_mask_function:
        return None
    if function is getattr(_masks, "bidirectional_mask_function", None):
        raise NotImplementedError(_refusal("attention that is not causal"))
    code, closure = function.__code__, function.__closure__ or ()
    cells = dict(zip(code.co_freevars, (cell.cell_contents for cell in closure), strict=True))
    kind = function.__qualname__.split(".")[0]
    if function.__module__ == _masks.__name__:
        if kind == "and_masks":
            found = [_sequences(part) for part in cells["mask_functions"]]
            return next((sequences for sequences in found if sequences is not None), None)
        if kind == "remap_positions_for_packed_sequence":
            return _sequences(cells["mask_function"])
        if kind == "packed_sequence_mask_function":
            return cells["packed_sequence_mask"]
        if kind == "sliding_window_overlay":
            return None
    raise NotImplementedError(_refusal(f"the mask function {function.__qualname__}"))


def _packed(sequences: Tensor) -> Tensor | None:
    """Where sequences begin among all tokens of all rows; None where each row is one sequence."""
    first = torch.ones_like(sequences, dtype=torch.bool)
    first[:, 1:] = sequences[:, 1:] != sequences[:, :-1]
    if not first[:, 1:].any():
        return None
    begins = first.flatten().nonzero().flatten()
    end = begins.new_full((1,), first.numel())
    return torch.cat((begins, end)).int()


def _assert_unpacked(
    mask_function: Callable[..., Any],
    batch_size: int,
    q_length: int,
    device: torch.device | str | None,
) -> None:
    rows = torch.arange(batch_size, device=device)[:, None]
    keys = torch.arange(q_length - 1, device=device)[None]
    seen = mask_function(rows, torch.zeros_like(rows), keys + 1, keys)
    torch._assert_async(seen.all(), _refusal("a compiled forward of packed sequences"))


def _bounds(
    mask: Tensor | None,
    batch_size: int,
    q_length: int,
    q_offset: int | Tensor,
    kv_length: int,
    kv_offset: int,
    device: torch.device | str | None,
) -> Tensor | None:
    """(2, batch): first key and end of the keys, counted from the first key that is given.

    (3, batch) where a query stands before its row's first key.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling:
        q_offset = int(q_offset)  # a sync, as torch's own `mask.all()` is
    end = q_offset + q_length
    starts: int | Tensor = 0
    padded: Tensor | None = None
    if mask is not None:
        if not isinstance(end, Tensor):
            if mask.shape[-1] < end:
                raise ValueError(
                    f"gemma2_ext: attention_mask must have a column for each of the {end} tokens "
                    f"so far, the cached ones included, got {mask.shape[-1]}"
                )
            mask = mask[:, :end]
        columns = torch.arange(mask.shape[-1], device=mask.device)
        mask = mask & (columns < end)
        tokens = mask.sum(-1)
        first = torch.where(mask, columns, mask.shape[-1]).amin(-1)
        last = torch.where(mask, columns, -1).amax(-1)
        whole = (tokens == last - first + 1) | (tokens == 0)
        holes = _refusal("padding between tokens of a row of attention_mask")
        if compiling:
            torch._assert_async(whole.all(), holes)
        elif not whole.all():
            raise NotImplementedError(holes)
        if compiling or first.any():
            first = torch.where(tokens == 0, end, first)
            starts = first.sub(kv_offset).clamp(min=0)
            before = (first - q_offset).clamp(0, q_length)
            # In decoding there is none; a graph cannot look.
            if q_length > 1 if compiling else before.any():
                padded = before
    length = end - kv_offset
    if not isinstance(starts, Tensor) and not isinstance(length, Tensor) and length == kv_length:
        return None
    bounds = torch.zeros(2 if padded is None else 3, batch_size, dtype=torch.int32, device=device)
    bounds[0] = starts
    bounds[1] = length
    if padded is not None:
        bounds[2] = padded
    return bounds


# -------------------------------------------------------------------------------------- attention


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`ops.attention` as transformers calls an attention function.

    Args:
        module: the attention module; what is not among the arguments is taken from it.
        query: (batch, num_heads, seqlen_q, head_dim).
        key: (batch, num_kv_heads, seqlen_k, head_dim).
        value: key's shape.
        attention_mask: what `attention_mask` of this module has made.
        dropout: must be 0.
        scaling: of the scores; None: head_dim ** -0.5.
        softcap: of the scores; None: `module.attn_logit_softcapping` where there is one.
        is_causal: must not be False.
        kwargs: `sliding_window`, and where there is none among them, `module.sliding_window`;
            `cu_seq_lens_q` and `cu_seq_lens_k` of packed sequences; `output_attentions`, which
            must not be True. Others do not change attention.

    Returns:
        (output of shape (batch, seqlen_q, num_heads, head_dim), None).

    Raises:
        NotImplementedError: something is asked for that the kernels do not have.
    """
    if kwargs.get("output_attentions"):
        raise NotImplementedError(
            "gemma2_ext: output_attentions is not supported, as attention weights are never "
            "stored; use attn_implementation='eager' for them"
        )
    if dropout:
        raise NotImplementedError(
            f"gemma2_ext: attention_dropout must be 0 in training, got {dropout}"
        )
    if is_causal is False or not getattr(module, "is_causal", True):
        raise NotImplementedError(_refusal("attention that is not causal"))
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"gemma2_ext: {type(module).__name__} passes {name}, which these kernels lack"
            )
    if softcap is None:
        softcap = getattr(module, "attn_logit_softcapping", None)
    window = kwargs.get("sliding_window", getattr(module, "sliding_window", None))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling

    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "window": window}
    if kwargs.get("cu_seq_lens_q") is not None:
        begins_q, begins_k = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
        return _attention_packed(q, k, v, begins_q, begins_k, options), None
    if attention_mask is None:
        return cast("Tensor", ops.attention(q, k, v, **options)), None
    if attention_mask.dtype != torch.int32 or attention_mask.dim() > 2:
        raise NotImplementedError(
            _refusal(f"an attention_mask of shape {tuple(attention_mask.shape)}")
        )
    if attention_mask.dim() == 1:
        return _attention_packed(q, k, v, attention_mask, attention_mask, options), None
    starts, lengths = attention_mask[0], attention_mask[1]
    out = ops.attention(q, k, v, key_starts=starts, key_lengths=lengths, **options)
    out = cast("Tensor", out)
    if attention_mask.shape[0] == 3:
        out = _mean_for_padding(out, v, attention_mask[2])
    return out, None


def _mean_for_padding(out: Tensor, v: Tensor, padded: Tensor) -> Tensor:
    """Each row's first `padded` queries, which see no key, get the mean of all values.

    That is what stock eager makes of a row of masked scores, equal as they are. No token depends
    on it, but a loss does that has the last padding predict the first token.
    """
    mean = v.mean(1, keepdim=True, dtype=torch.float32).to(out.dtype)
    mean = mean.repeat_interleave(out.shape[2] // v.shape[2], dim=2)
    before = torch.arange(out.shape[1], device=out.device) < padded[:, None]
    return torch.where(before[..., None, None], mean, out)


def _attention_packed(
    q: Tensor, k: Tensor, v: Tensor, begins_q: Tensor, begins_k: Tensor, options: dict[str, Any]
) -> Tensor:
    out = ops.attention_varlen(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        begins_q,
        begins_k,
        # No sequence is longer than a row; its true length would cost a sync.
        q.shape[1],
        k.shape[1],
        **options,
    )
    return cast("Tensor", out).view(q.shape)


# ---------------------------------------------------------------------- modules of a patched model

# Each takes the place of the class it inherits from, in a module that stays the same object: with
# the same parameters, hooks and children. Children are called, never their weights taken behind
# their back, unless they are exactly what is expected: so adapters and hooks are not bypassed.

# Up to transformers 5.0 a layer returns a tuple.
_LAYER_RETURNS_TUPLE = (
    "output_attentions" in inspect.signature(_stock.Gemma2DecoderLayer.forward).parameters
)
_CACHE = (
    "cache"
    if "cache" in inspect.signature(_stock.Gemma2Attention.forward).parameters
    else "past_key_values"
)


def _in_place_of(original: Callable[..., Any]) -> Callable[[_Function], _Function]:
    """Gives a method the signature that transformers and trainers will look for."""
    return cast("Callable[[_Function], _Function]", wraps(original))


class _RMSNorm(_stock.Gemma2RMSNorm):
    @_in_place_of(_stock.Gemma2RMSNorm.forward)
    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class _Linear(nn.Linear):
    @_in_place_of(nn.Linear.forward)
    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight)


class _MLP(_stock.Gemma2MLP):
    @_in_place_of(_stock.Gemma2MLP.forward)
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.geglu(self.gate_proj(x), self.up_proj(x)))


class _Attention(_stock.Gemma2Attention):
    @_in_place_of(_stock.Gemma2Attention.forward)
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        past = kwargs.pop("past_key_values", None)
        cache = past if cache is None else cache
        positions = kwargs.get("position_ids")
        if positions is None:
            raise ValueError("gemma2_ext: a patched attention layer needs position_ids")
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.q_proj(hidden_states).view(shape)
        k = self.k_proj(hidden_states).view(shape)
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if positions.shape[0] == 1:
            positions = positions[0]
        q, k = (t.transpose(1, 2) for t in ops.rope(q, k, positions, _rope_theta(self.config)))
        if cache is not None:
            # Up to transformers 5.3 a static cache is told where to write.
            cache_position = kwargs.pop("cache_position", None)
            told = () if cache_position is None else ({"cache_position": cache_position},)
            k, v = cache.update(k, v, self.layer_idx, *told)
        attend: Callable[..., Any] = _stock.eager_attention_forward
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            softcap=self.attn_logit_softcapping,
            **kwargs,
        )
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


class _DecoderLayer(_stock.Gemma2DecoderLayer):
    @_in_place_of(_stock.Gemma2DecoderLayer.forward)
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        residual = hidden_states
        if cache is not None:
            kwargs[_CACHE] = cache
        hidden_states, weights = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **kwargs,
        )
        post, pre = self.post_attention_layernorm, self.pre_feedforward_layernorm
        if _is_plain(post, _RMSNorm) and _is_plain(pre, _RMSNorm) and post.eps == pre.eps:
            residual, hidden_states = ops.add_rms_norm(
                hidden_states, residual, post.weight, pre.weight, post.eps
            )
        else:
            residual = residual + post(hidden_states)
            hidden_states = pre(residual)
        hidden_states = self.post_feedforward_layernorm(self.mlp(hidden_states))
        hidden_states = residual + hidden_states
        if not _LAYER_RETURNS_TUPLE:
            return hidden_states
        return (hidden_states, weights) if kwargs.get("output_attentions") else (hidden_states,)


class _ForCausalLM(_stock.Gemma2ForCausalLM):
    gemma2_ext_skip_logits: bool

    @can_return_tuple
    @_in_place_of(_stock.Gemma2ForCausalLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        named = _causal_lm_signature.bind(self, *args, **kwargs).arguments
        named.pop("self")
        extra = named.pop("kwargs", {})
        labels, keep = named.pop("labels", None), named.pop("logits_to_keep", 0)
        outputs = self.model(**named, **extra)
        hidden = outputs.last_hidden_state
        if not isinstance(keep, int) or keep > 0:
            hidden = hidden[:, slice(-keep, None) if isinstance(keep, int) else keep]
        rest = {k: v for k, v in outputs.items() if k != "last_hidden_state"}
        compute = partial(_logits, self, hidden)
        if labels is None:
            return CausalLMOutputWithPast(logits=compute(), **rest)
        whole_loss = getattr(ops, "linear_cross_entropy", None) is not None
        if not (
            whole_loss
            and self.loss_function is ForCausalLMLoss
            and _is_plain(self.lm_head, nn.Linear, _Linear)
            and hidden.shape[1] == labels.shape[1]
        ):
            logits = compute()
            loss = self.loss_function(logits, labels, self.vocab_size, **extra)
            return CausalLMOutputWithPast(loss=loss, logits=logits, **rest)
        loss = _loss(self, hidden, labels, **extra)
        if self.training and self.gemma2_ext_skip_logits:
            return CausalLMOutputWithPast(loss=loss, **rest)
        if torch.compiler.is_compiling():
            return CausalLMOutputWithPast(loss=loss, logits=compute(), **rest)
        return LazyLogitsOutput.of(compute, loss=loss, **rest)


_causal_lm_signature = inspect.signature(_stock.Gemma2ForCausalLM.forward)


def _logits(model: _stock.Gemma2ForCausalLM, hidden: Tensor) -> Tensor:
    """Soft-capped logits in hidden's dtype, as of the stock model."""
    softcap = model.config.final_logit_softcapping
    head = model.lm_head
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or head.weight.requires_grad)
    if _is_plain(head, nn.Linear, _Linear) and not needs_grad and hidden.dtype == head.weight.dtype:
        return ops.logits(hidden, head.weight, softcap).to(hidden.dtype)
    logits = head(hidden)
    if softcap is None:
        return logits
    return torch.tanh(logits / softcap) * softcap


def _loss(
    model: _stock.Gemma2ForCausalLM,
    hidden: Tensor,
    labels: Tensor,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss, without the logits: each token predicts the next label."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    total = ops.linear_cross_entropy(
        hidden,
        model.lm_head.weight,
        shift_labels.to(hidden.device),
        softcap=model.config.final_logit_softcapping,
        ignore_index=ignore_index,
        reduction="mean" if num_items_in_batch is None else "sum",
    )
    if num_items_in_batch is None:
        return total
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


class LazyLogitsOutput(CausalLMOutputWithPast):
    """A model's output whose `logits` are computed when they are first asked for.

    A training step that reads the loss alone never makes them. By attribute, by key, by index or
    in a loop over all values they are as of the stock model, with their gradient.
    """

    @classmethod
    def of(cls, logits: partial[Tensor], **fields: Any) -> LazyLogitsOutput:
        # The constructor reads what it is given, so it is given something else in their place.
        output = cls(logits=cast("Any", False), **fields)
        object.__setattr__(output, "logits", logits)
        return output

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name == "logits" and isinstance(value, partial):
            value = value()
            self["logits"] = value
        return value

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(key)
            return getattr(self, key)
        if isinstance(key, int):
            return getattr(self, list(self.keys())[key])
        return self.to_tuple()[key]

    def values(self) -> Any:
        return self.to_tuple()

    def items(self) -> Any:
        return tuple(zip(self.keys(), self.to_tuple(), strict=True))

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self.keys() else default


_TWINS: dict[type[nn.Module], type[nn.Module]] = {
    _stock.Gemma2RMSNorm: _RMSNorm,
    _stock.Gemma2MLP: _MLP,
    _stock.Gemma2Attention: _Attention,
    _stock.Gemma2DecoderLayer: _DecoderLayer,
    _stock.Gemma2ForCausalLM: _ForCausalLM,
}
for _original, _twin in {**_TWINS, nn.Linear: _Linear}.items():
    # What reads a class's name must find the one it knows: config.json's "architectures", FSDP's
    # wrapping policies, device maps. Pickle goes by the qualified name, which stays.
    _twin.__name__ = _original.__name__


def _is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module is exactly of one of these classes and nothing listens to its calls, so that
    its weight may be used without calling it."""
    return (
        type(module) in kinds
        and getattr(module, "bias", None) is None
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in module.__dict__
    )


# -------------------------------------------------------------------------------- patch and unpatch


def patch(model: _Module, *, skip_logits: bool = False) -> _Module:
    """Puts these kernels into a loaded Gemma 2 of transformers, in place, training included.

    Replaces norms, GeGLU, RoPE, attention, the matrix products of the layers, the soft-capped
    logits, and, where `labels` are given, the loss, which then is computed without the logits
    (they are computed when `output.logits` is read). Modules stay the objects that they are and
    keep their parameters, hooks and children, so names, shapes, order, `state_dict`,
    `save_pretrained`, `deepcopy` and adapters (PEFT, before or after) are as they were.

    Args:
        model: a Gemma2ForCausalLM, another model of transformers' gemma2, or a PEFT model of one.
        skip_logits: in training with labels, `output.logits` is None. For wrappers that read every
            output (DDP, FSDP, accelerate's mixed precision) and would have them computed.

    Returns:
        The same model. A second call changes nothing but `skip_logits`.

    Raises:
        TypeError: the model is not a Gemma 2 of transformers.
        NotImplementedError: its configuration has something that these kernels do not.
        ValueError: another library has replaced the `forward` of one of its modules.
    """
    base = _gemma2(model, "patch")
    _check_config(base.config)
    swaps = []
    for name, module in base.named_modules():
        twin = _TWINS.get(type(module))
        if twin is None and type(module) is nn.Linear and module.bias is None:
            # Quantized or distributed weights are tensors of another class, with its own product.
            twin = _Linear if type(module.weight.data) is Tensor else None
        if twin is not None:
            if "forward" in module.__dict__ and "_old_forward" not in module.__dict__:
                raise ValueError(
                    f"gemma2_ext.patch: {name or type(module).__name__} has a forward of its own, "
                    "put there by another library; undo that first"
                )
            swaps.append((module, twin))
    for module, twin in swaps:
        _become(module, twin)
    register()
    if "gemma2_ext_attention_before" not in base.__dict__:
        base.gemma2_ext_attention_before = base.config._attn_implementation
    base.config._attn_implementation = NAME
    base.gemma2_ext_skip_logits = skip_logits
    return model


def unpatch(model: _Module) -> _Module:
    """Undoes `patch`: classes and the attention implementation are what they were.

    Args:
        model: a patched model, or a PEFT model of one.

    Returns:
        The same model.

    Raises:
        TypeError: the model is not a Gemma 2 of transformers.
        ValueError: it is not patched.
    """
    base = _gemma2(model, "unpatch")
    if "gemma2_ext_attention_before" not in base.__dict__:
        raise ValueError("gemma2_ext.unpatch: the model is not patched")
    originals = {twin: original for original, twin in _TWINS.items()} | {_Linear: nn.Linear}
    for module in base.modules():
        original = originals.get(type(module))
        if original is not None:
            _become(module, original)
    base.config._attn_implementation = base.__dict__.pop("gemma2_ext_attention_before")
    del base.gemma2_ext_skip_logits
    return model


def _gemma2(model: object, function: str) -> Any:
    """The Gemma 2 itself, which a PEFT model may hold."""
    found = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(found, _stock.Gemma2PreTrainedModel):
        kind = type(found).__name__
        if isinstance(found, PreTrainedModel):
            kind += f" (model_type {found.config.model_type!r})"
        raise TypeError(
            f"gemma2_ext.{function}: model must be a Gemma 2 of transformers, such as "
            f"Gemma2ForCausalLM, got {kind}"
        )
    return found


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind
    if "_old_forward" in module.__dict__:
        # accelerate's hooks keep the method that they call.
        module._old_forward = kind.forward.__get__(module)


def _check_config(config: Any) -> None:
    def refuse(field: str, expected: str, got: object) -> None:
        raise NotImplementedError(f"gemma2_ext.patch: {field} must be {expected}, got {got!r}")

    if config.hidden_activation != "gelu_pytorch_tanh":
        refuse("hidden_activation", "'gelu_pytorch_tanh'", config.hidden_activation)
    if getattr(config, "use_bidirectional_attention", False):
        refuse("use_bidirectional_attention", "False", True)
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    kind = (scaling or {}).get("rope_type", "default")
    if kind != "default":
        refuse("rope_type", "'default'", kind)
    if config.head_dim % 8 or not 8 <= config.head_dim <= 256:
        refuse("head_dim", "a multiple of 8 from 8 to 256", config.head_dim)


def _rope_theta(config: Any) -> float:
    parameters = getattr(config, "rope_parameters", None)
    return parameters["rope_theta"] if parameters else config.rope_theta
