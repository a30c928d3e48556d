"""What a training step does, counted from its batches: captions, tokens and useful floating-point operations.

The operations of a step, for T tokens of the language model, of which K are trained on, V visual ones among them, and
P patches of the vision tower::

    4 * (language * T + head * K)  +  6 * adapter * T  +  2 * (tower * P + merger * V)

where the names stand for numbers of weights. A weight costs 2 operations a token forward and 2 for the gradient of its
input; frozen weights need no gradient of their own, an adapter's do (2 more). The head is counted at the tokens trained
on, since TRL's loss projects only those. The tower is frozen and in front of everything trained: forward only, and only
where a batch brings pixels (with cached features it brings none). Left out: padding, what activation checkpointing
computes a second time, the products of attention scores (1% at a few hundred tokens), norms, and rotary embeddings.
So a share of the matmul peak says how much of it did something useful.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from qvl.encode import IGNORED_LABEL
from qvl.models import language_model_path, skeleton


@dataclass(frozen=True)
class WeightCounts:
    """Numbers of weights that take part in matrix products.

    Attributes:
        language: linear layers of the language model, without the output head.
        head: the output head.
        tower: linear and convolution layers of the vision tower.
        merger: linear layers between tower and language model, which see visual tokens instead of patches.
        adapter: trained weights.
    """

    language: int
    head: int
    tower: int
    merger: int
    adapter: int


def count_weights(config: PretrainedConfig, num_adapter_weights: int) -> WeightCounts:
    """Counts on a model without weights, so that quantized or replaced layers count as what they stand for."""
    model = skeleton(config)
    inside = language_model_path(model) + "."
    head = model.get_output_embeddings()
    language = tower = merger = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) or module is head:
            continue
        if name.startswith(inside):
            language += module.weight.numel()
        elif "merger" in name or "projector" in name:
            merger += module.weight.numel()
        else:
            tower += module.weight.numel()
    return WeightCounts(language, head.weight.numel(), tower, merger, num_adapter_weights)


@dataclass(frozen=True)
class Work:
    """What some steps have processed; real numbers only, no padding.

    Attributes:
        num_captions: answers trained on: an image with five captions counts five, however they are batched.
        num_tokens: of the language model, visual ones included.
        num_target_tokens: that are trained on.
        num_visual_tokens: places of images in the text.
        num_patches: that went through the vision tower; 0 where its features came from a cache.
    """

    num_captions: int = 0
    num_tokens: int = 0
    num_target_tokens: int = 0
    num_visual_tokens: int = 0
    num_patches: int = 0

    def tflop(self, weights: WeightCounts) -> float:
        """Useful operations in units of 1e12, by this module's formula."""
        language = 4 * (weights.language * self.num_tokens + weights.head * self.num_target_tokens)
        vision = 2 * (
            weights.tower * self.num_patches + weights.merger * self.num_visual_tokens * (self.num_patches > 0)
        )
        return (language + vision + 6 * weights.adapter * self.num_tokens) / 1e12


class WorkCounter:
    """Adds up batches without waiting for the device; `take` waits, once a block."""

    def __init__(self, config: PretrainedConfig, image_token_id: int | None) -> None:
        self.image_token_id = image_token_id
        self.patch_size = getattr(getattr(config, "vision_config", None), "patch_size", 1)
        self._counted: list[torch.Tensor] = []
        self._num_patches = 0

    def add(self, batch: dict[str, Any]) -> None:
        """Counts a batch as the trainer gets it: (batch, length) tensors `input_ids`, `attention_mask`, `labels`."""
        ids, labels = batch["input_ids"], batch["labels"]
        is_target = labels != IGNORED_LABEL
        # An answer is a run of targets: prompts stand between the answers of a sequence.
        begins = is_target.sum() - (is_target[:, 1:] & is_target[:, :-1]).sum()
        visual = (ids == self.image_token_id).sum() if self.image_token_id is not None else torch.zeros_like(begins)
        mask = batch.get("attention_mask")
        num_tokens = mask.sum() if mask is not None else torch.full_like(begins, ids.numel())
        self._counted.append(torch.stack([begins, num_tokens, is_target.sum(), visual]))
        # Absent where the features come from the cache.
        if "pixel_values" in batch:
            self._num_patches += self._patches(batch["pixel_values"])

    def take(self) -> Work:
        """What was counted since the last call."""
        counted = torch.stack(self._counted).sum(0).tolist() if self._counted else [0] * 4
        num_captions, num_tokens, num_target_tokens, num_visual_tokens = map(int, counted)
        work = Work(num_captions, num_tokens, num_target_tokens, num_visual_tokens, self._num_patches)
        self._counted, self._num_patches = [], 0
        return work

    def _patches(self, pixel_values: torch.Tensor) -> int:
        """Qwen's processors hand over one row a patch, CLIP's whole images."""
        if pixel_values.dim() < 4:
            return int(pixel_values.shape[0])
        *_, height, width = pixel_values.shape
        return int(pixel_values.shape[0] * (height // self.patch_size) * (width // self.patch_size))
