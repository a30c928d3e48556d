"""Attention that keeps apart what shares a row: branches of one prefix, samples packed behind each other.

Registered through transformers' `AttentionInterface`, so that no model is patched: the batch carries a 2D
`attention_mask`, which keeps token counts honest, and beside it `segment_ids`, which transformers hands down to here.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SEGMENT_ATTENTION = "qvl_segments"
PADDING_SEGMENT = -1
# A segment id is its sample's number times this, plus 0 for the sample's prefix or the number of the branch.
SEGMENTS_PER_SAMPLE = 4096
# FlexAttention's own.
_BLOCK_TOKENS = 128

_compiled_flex_attention = torch.compile(flex_attention, dynamic=True)


def use_segment_attention(model: PreTrainedModel) -> None:
    """Switches the language model to `segment_attention`; without `segment_ids` it stays what SDPA does."""
    AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)
    AttentionMaskInterface.register(SEGMENT_ATTENTION, _mask_without_segments)
    model.get_decoder().register_forward_pre_hook(_look_for_segments, with_kwargs=True)
    _set_language_model_attention(model, SEGMENT_ATTENTION)


def use_sdpa(model: PreTrainedModel) -> None:
    """Takes `use_segment_attention` back."""
    hooks = model.get_decoder()._forward_pre_hooks
    for number in [number for number, hook in hooks.items() if hook is _look_for_segments]:
        del hooks[number]
    _set_language_model_attention(model, "sdpa")


def sees(
    query_segment: torch.Tensor, key_segment: torch.Tensor, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor:
    """Whether a query token sees a key token: one before it, of its sample's prefix or its own branch.

    Example, one image with two captions in a row of 6 (prefix 0, branches 1 and 2); a row of the table is a query::

        segments    0 0 1 1 2 2
                  0 x . . . . .
                  0 x x . . . .
                  1 x x x . . .
                  1 x x x x . .
                  2 x x . . x .
                  2 x x . . x x

    Args:
        query_segment: segment ids of the queries.
        key_segment: segment ids of the keys, broadcastable.
        query: places of the queries in the row.
        key: places of the keys in the row.
    """
    same_sample = query_segment // SEGMENTS_PER_SAMPLE == key_segment // SEGMENTS_PER_SAMPLE
    is_prefix = key_segment % SEGMENTS_PER_SAMPLE == 0
    return (key <= query) & same_sample & (is_prefix | (query_segment == key_segment))


def dense_mask(segment_ids: torch.Tensor) -> torch.Tensor:
    """The mask as SDPA takes it.

    Args:
        segment_ids: int64 (batch, length), `PADDING_SEGMENT` at padding.

    Returns:
        bool (batch, 1, length, length), True where a query (third dimension) sees a key (last). Padding sees itself, so
        that no row of the softmax is empty.
    """
    places = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    return sees(segment_ids[:, None, :, None], segment_ids[:, None, None, :], places[:, None], places)


def block_mask(segment_ids: torch.Tensor) -> BlockMask:
    """The mask as FlexAttention takes it: blocks of 128 x 128 that hold nothing visible are skipped.

    Made of the first and last sample of each block; torch's own `create_block_mask` makes the dense mask on its way,
    256 MiB at 16,384 tokens.

    Args:
        segment_ids: int64 (batch, length), samples behind each other, `PADDING_SEGMENT` behind them.
    """

    def visible(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return sees(segment_ids[batch, query], segment_ids[batch, key], query, key)

    length = segment_ids.shape[1]
    some, all_of = _visible_blocks(segment_ids)
    partial, full = _listed(some & ~all_of), _listed(all_of)
    return BlockMask.from_kv_blocks(
        *partial, *full, BLOCK_SIZE=_BLOCK_TOKENS, mask_mod=visible, seq_lengths=(length, length)
    )


def _visible_blocks(segment_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each block of queries (second dimension) and of keys (last): may it see some of it, and does it see all.

    Args:
        segment_ids: int64 (batch, length).

    Returns:
        Two bool tensors (batch, num_blocks, num_blocks). What the first leaves out holds nothing visible; what it holds
        beyond that is masked one by one.
    """
    num_rows, length = segment_ids.shape
    num_blocks = -(-length // _BLOCK_TOKENS)
    missing = num_blocks * _BLOCK_TOKENS - length
    blocks = nn.functional.pad(segment_ids, (0, missing), value=PADDING_SEGMENT).view(num_rows, num_blocks, -1)
    # Padding stands behind all samples, so its number is the highest.
    samples = blocks.div(SEGMENTS_PER_SAMPLE, rounding_mode="floor").where(blocks != PADDING_SEGMENT, 2**31)
    first, last = samples.amin(dim=-1), samples.amax(dim=-1)
    places = torch.arange(num_blocks, device=segment_ids.device)
    some = (places <= places[:, None]) & (first[:, :, None] <= last[:, None]) & (first[:, None] <= last[:, :, None])
    is_one = (first == last) & (last < 2**31)
    is_prefix = is_one & (blocks % SEGMENTS_PER_SAMPLE == 0).all(dim=-1)
    same = first[:, :, None] == first[:, None]
    return some, (places < places[:, None]) & is_one[:, :, None] & is_prefix[:, None] & same


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the blocks of keys, how many each block of queries has (batch, 1, Q) and which, in front (batch, 1, Q, K)."""
    counts = blocks.sum(dim=-1, dtype=torch.int32)
    numbers = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[:, None], numbers[:, None]


def segment_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segment_ids: torch.Tensor | None = None,
    block_mask: BlockMask | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention by segments.

    Args:
        module: the attention layer.
        query: (batch, num_heads, length, head_dim).
        key: (batch, num_key_value_heads, length, head_dim).
        value: like `key`.
        attention_mask: transformers' own mask; used only where the batch has no segments.
        scaling: factor of the scores.
        dropout: share of the attention weights dropped; not for `block_mask`.
        segment_ids: int64 (batch, length); see `sees`.
        block_mask: the same as a FlexAttention mask; goes before `segment_ids`.
        **kwargs: what other implementations need.

    Returns:
        (batch, length, num_heads, head_dim), and no attention weights.
    """
    if block_mask is not None:
        flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention
        attended = flex(query, key, value, block_mask=block_mask, scale=scaling, enable_gqa=True)
        return attended.transpose(1, 2).contiguous(), None
    if segment_ids is not None:
        attention_mask = dense_mask(segment_ids)
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


class _Batch:
    """The batch that the decoder is at, which transformers' functions for masks are not told of."""

    has_segments = False


def _look_for_segments(module: nn.Module, inputs: Any, kwargs: dict[str, Any]) -> None:
    _Batch.has_segments = kwargs.get("segment_ids") is not None


def _mask_without_segments(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """SDPA's mask, or none where segments say it all.

    To make one, transformers asks whether there is padding at all, and so waits for the GPU in every forward pass, and
    it would be dense in the length of the row.
    """
    return None if _Batch.has_segments else sdpa_mask(*args, **kwargs)


def _set_language_model_attention(model: PreTrainedModel, name: str) -> None:
    if model.config.get_text_config(decoder=True) is model.config:
        model.set_attn_implementation(name)
    else:
        model.set_attn_implementation({"text_config": name})
