"""Is the model put together as asked for: what is quantized, and images in their places."""

from collections.abc import Callable, Mapping
from typing import Any

import bitsandbytes as bnb
import torch
from PIL import Image
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from qvl.checks import Check, at_most, none_of
from qvl.conversations import assistant_message
from qvl.memory_weights import packed_4bit_bytes
from qvl.models import language_model_path, own_quantization, skeleton

# Bytes that the computation leaves out: small buffers such as rotary frequencies.
MOST_FOOTPRINT_ERROR = 0.01

Collate = Callable[[list[dict[str, Any]]], Mapping[str, torch.Tensor]]


def quantized_bits(model: PreTrainedModel, load_in_4bit: bool, load_in_8bit: bool) -> int:
    """In how many bits the language model's weights were asked for: by a flag, or by a checkpoint that comes so.

    Returns:
        4, 8, or 0 for weights that are not quantized.
    """
    own = own_quantization(model.config)
    if load_in_4bit or own.get("load_in_4bit"):
        return 4
    return 8 if load_in_8bit or own.get("load_in_8bit") else 0


def check_quantization(model: PreTrainedModel, bits: int) -> list[Check]:
    """Every linear layer of the language model is quantized as asked for, and none in the vision part or head.

    Args:
        model: the base, without an adapter.
        bits: from `quantized_bits`.
    """
    path = language_model_path(model) + "."
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    inside = {name: layer for name, layer in linears.items() if name.startswith(path)}
    outside = {name: layer for name, layer in linears.items() if name not in inside}
    kind = f"{bits}bit" if bits else "not_quantized"
    return [
        none_of(f"language_model_linears_{kind}", [n for n, x in inside.items() if _bits_of(x) != bits], len(inside)),
        none_of("vision_and_head_not_quantized", [n for n, x in outside.items() if _bits_of(x)], len(outside)),
    ]


def _bits_of(layer: nn.Linear) -> int:
    """4 only where the weight is packed: a layer of the right class may hold a weight that never was."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return 4 if getattr(layer.weight, "quant_state", None) is not None else 0
    return 8 if isinstance(layer, bnb.nn.Linear8bitLt) else 0


def check_footprint(model: PreTrainedModel, dtype: torch.dtype, nested: bool) -> Check:
    """The weights take the bytes that the configuration and 4-bit packing come to.

    Args:
        model: a base whose language model is in 4 bits, without an adapter.
        dtype: what was asked for all that is not quantized.
        nested: whether the scales are quantized too (double quantization).
    """
    computed = computed_bytes_4bit(model.config, dtype, nested)
    found = footprint_bytes(model)
    return at_most(
        "memory_footprint_as_computed",
        abs(found / computed - 1),
        MOST_FOOTPRINT_ERROR,
        " off",
        f"{found / 2**20:.1f} MiB, computed {computed / 2**20:.1f}",
    )


def footprint_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, the scales and code books of quantized weights counted in, tied ones once.

    A code book that layers share counts for each of them, as it does in a saved model.
    """
    tensors = [*model.parameters(), *model.buffers()]
    total = sum(tensor.numel() * tensor.element_size() for tensor in {id(t): t for t in tensors}.values())
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            parts = [state.absmax, state.code, *([state.offset] if getattr(state, "offset", None) is not None else [])]
            total += sum(part.numel() * part.element_size() for part in parts)
            state = getattr(state, "state2", None)
    return total


def computed_bytes_4bit(config: PretrainedConfig, dtype: torch.dtype, nested: bool) -> int:
    """What `footprint_bytes` should find, from the shapes of the configuration alone.

    Args:
        config: of the model.
        dtype: of all that is not quantized.
        nested: double quantization of the scales.
    """
    empty = skeleton(config)
    path = language_model_path(empty) + "."
    packed = {
        f"{name}.weight"
        for name, layer in empty.named_modules()
        if isinstance(layer, nn.Linear) and name.startswith(path)
    }
    total = 0
    for name, parameter in empty.named_parameters():
        size = parameter.numel()
        if name not in packed:
            total += size * dtype.itemsize
            continue
        total += packed_4bit_bytes(size, nested)
    return total


def check_image_places(model: PreTrainedModel, collate: Collate, image_token_id: int) -> Check:
    """As many image placeholders in every batch as the vision tower really gives features.

    Several sizes, several images in one row, a row without an image, and all of them mixed in one batch.

    Args:
        model: a vision-language model; its own tower is run.
        collate: from examples to a batch.
        image_token_id: id of the placeholder.
    """
    differing = []
    cases = _image_cases()
    for name, rows in cases.items():
        batch = collate(rows)
        num_places = int((batch["input_ids"] == image_token_id).sum())
        if num_places != _num_features(model, batch):
            differing.append(name)
    return Check(
        "image_placeholders_equal_features_drawn",
        len(differing),
        f"0 of {len(cases)} batches differ",
        not differing,
        ", ".join(differing) or ", ".join(cases),
    )


def _num_features(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> int:
    if "pixel_values" not in batch:
        return 0
    inputs = {key: batch[key].to(model.device) for key in ("pixel_values", "image_grid_thw") if key in batch}
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.no_grad():
        output = model.base_model.get_image_features(**inputs)
    pooled = output.pooler_output if hasattr(output, "pooler_output") else output
    return sum(len(features.flatten(0, -2)) for features in pooled)


def _image_cases() -> dict[str, list[dict[str, Any]]]:
    small, wide, tall, odd = (_drawn(*size) for size in ((64, 64), (280, 96), (90, 250), (131, 77)))
    none, one, three = _row(), _row(small), _row(wide, tall, odd)
    return {
        "small": [one],
        "wide": [_row(wide)],
        "odd sides": [_row(odd)],
        "three images in a row": [three],
        "no image": [none],
        "mixed": [three, none, one, _row(tall)],
    }


def _drawn(width_px: int, height_px: int) -> Image.Image:
    return Image.linear_gradient("L").convert("RGB").resize((width_px, height_px))


def _row(*images: Image.Image) -> dict[str, Any]:
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": "What is this?"}]
    return {
        "where": "drawn for the check",
        "images": list(images),
        "prompt": [{"role": "user", "content": content}],
        "completion": [assistant_message("A picture.")],
    }
