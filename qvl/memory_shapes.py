"""Sizes of a model that decide what a step keeps: of its decoder layers, of the adapter on them, of its vision part."""

from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from qvl.memory_weights import adapted_layers

# What each projection of a layer reads, by the name of its size.
PROJECTION_INPUTS = {
    "q_proj": "hidden",
    "k_proj": "hidden",
    "v_proj": "hidden",
    "o_proj": "query",
    "gate_proj": "hidden",
    "up_proj": "hidden",
    "down_proj": "intermediate",
}


@dataclass(frozen=True)
class DecoderShape:
    """What the formulas need to know of the decoder's layers and the adapter on them. Sizes are numbers of features.

    Attributes:
        hidden: of the residual stream.
        query: of all query heads together.
        key_value: of all key heads together.
        intermediate: of the MLP.
        has_head_norms: whether queries and keys are normalized (Qwen3).
        adapted: names of the projections with LoRA.
        rank: of LoRA.
        dropout: whether LoRA has any.
    """

    num_layers: int
    hidden: int
    query: int
    key_value: int
    intermediate: int
    num_heads: int
    num_key_value_heads: int
    has_head_norms: bool
    vocabulary: int
    adapted: frozenset[str]
    rank: int
    dropout: bool


@dataclass(frozen=True)
class TowerShape:
    """What the formulas need to know of the vision part.

    Attributes:
        hidden: features of a patch.
        patch_values: numbers that a patch consists of.
        patches_per_token: patches behind one visual token.
        pixels_per_token: pixels behind it.
        num_features: features that a visual token brings: one, and one for each layer that DeepStack adds to.
        num_kept: hidden states that the tower gives besides the last one (LLaVA asks CLIP for all of them).
    """

    hidden: int
    intermediate: int
    num_blocks: int
    patch_values: int
    patches_per_token: int
    pixels_per_token: int
    num_features: int
    num_kept: int


def decoder_shape(empty: PreTrainedModel, lora: LoraConfig) -> DecoderShape | None:
    """Reads the sizes off a model on the meta device; None where its layers are not of the kind the formulas know."""
    config, layer = empty.config.get_text_config(decoder=True), empty.get_decoder().layers[0]
    projections = {name.rpartition(".")[2]: m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
    if set(projections) != set(PROJECTION_INPUTS):
        return None
    adapted = adapted_layers(empty, lora)
    return DecoderShape(
        num_layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        query=projections["q_proj"].out_features,
        key_value=projections["k_proj"].out_features,
        intermediate=projections["gate_proj"].out_features,
        num_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        has_head_norms=any(name.endswith("q_norm") for name, _ in layer.named_modules()),
        vocabulary=config.vocab_size,
        adapted=frozenset(name.rpartition(".")[2] for name in adapted if ".layers.0." in name),
        rank=lora.r,
        dropout=lora.lora_dropout > 0,
    )


def tower_shape(config: Any) -> TowerShape | None:
    """Reads the sizes off a model's configuration; None for a text-only model."""
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return None
    channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", 3)
    depth = getattr(vision, "depth", None) or vision.num_hidden_layers
    is_qwen = hasattr(vision, "spatial_merge_size")
    # A projector may pool CLIP's patches into fewer tokens.
    patches_per_token = (
        vision.spatial_merge_size**2
        if is_qwen
        else max(1, (vision.image_size // vision.patch_size) ** 2 // config.image_seq_length)
    )
    return TowerShape(
        hidden=vision.hidden_size,
        intermediate=vision.intermediate_size,
        num_blocks=depth,
        patch_values=channels * vision.patch_size**2 * getattr(vision, "temporal_patch_size", 1),
        patches_per_token=patches_per_token,
        pixels_per_token=patches_per_token * vision.patch_size**2,
        num_features=1 + len(getattr(vision, "deepstack_visual_indexes", None) or ()),
        num_kept=0 if is_qwen else depth,
    )
