"""Attention that keeps apart what shares a row: branches of one prefix, samples packed behind each other.

Registered through transformers' `AttentionInterface`, so that no model is patched: the batch carries a 2D
`attention_mask`, which keeps token counts honest, and beside it `segment_ids`, which transformers hands down to here.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SEGMENT_ATTENTION = "qvl_segments"
PADDING_SEGMENT = -1
# A segment id is its sample's number times this, plus 0 for the sample's prefix or the number of the branch.
SEGMENTS_PER_SAMPLE = 4096

_compiled_flex_attention = torch.compile(flex_attention, dynamic=True)


def use_segment_attention(model: PreTrainedModel) -> None:
    """Switches the language model to `segment_attention`; without `segment_ids` it stays what SDPA does."""
    AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)
    AttentionMaskInterface.register(SEGMENT_ATTENTION, sdpa_mask)
    _set_language_model_attention(model, SEGMENT_ATTENTION)


def use_sdpa(model: PreTrainedModel) -> None:
    """Takes `use_segment_attention` back."""
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

    Args:
        segment_ids: int64 (batch, length) on a CUDA device.
    """

    def visible(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return sees(segment_ids[batch, query], segment_ids[batch, key], query, key)

    num_rows, length = segment_ids.shape
    return create_block_mask(visible, num_rows, None, length, length, device=segment_ids.device)


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


def _set_language_model_attention(model: PreTrainedModel, name: str) -> None:
    if model.config.get_text_config(decoder=True) is model.config:
        model.set_attn_implementation(name)
    else:
        model.set_attn_implementation({"text_config": name})
