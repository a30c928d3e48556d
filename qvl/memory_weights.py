"""What lies on the device all through a training: weights, adapter, gradients, optimizer state; counted in bytes."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from qvl.models import language_model_path

# How the linear layers of the language model are kept: as --dtype says, or packed by one of the flags.
Packing = Literal["none", "4-bit", "nested 4-bit", "8-bit", "fp8"]

# bitsandbytes: a scale for each 64 weights; with double quantization a byte for it, and a scale for each 256 of those.
_WEIGHTS_PER_SCALE = 64
_SCALES_PER_GROUP = 256
_CODE_BYTES_4_BIT = 16 * 4
_CODE_BYTES_NESTED = 256 * 4 + 4  # the scales' code book and their offset
_FP8_DIMENSION_MULTIPLE = 16
# Adapters and what is trained whole are fp32 whatever the base is.
_TRAINED_BYTES = 4
# Bytes that upstream's optimizers keep of a trained parameter: two fp32 moments, or one, or the same in 8 bits.
_OPTIMIZER_BYTES = {"sgd": 0, "adafactor": 1, "lion": 4, "rmsprop": 4, "adagrad": 4}
_ADAM_BYTES = 8


@dataclass(frozen=True)
class WeightPart:
    """A part of the base model.

    Attributes:
        name: such as "language model".
        kept_as: dtype or packing, for the reader.
        num_bytes: of its weights, scales and transposed copies counted in.
    """

    name: str
    kept_as: str
    num_bytes: int


@dataclass(frozen=True)
class TrainedCounts:
    """What an adapter trains, in parameters.

    Attributes:
        num_lora: in LoRA's matrices (and DoRA's magnitudes).
        num_whole: in copies of modules that are trained whole.
    """

    num_lora: int
    num_whole: int

    @property
    def num_trained(self) -> int:
        """All of them."""
        return self.num_lora + self.num_whole

    @property
    def weight_bytes(self) -> int:
        """Of the trained weights, fp32."""
        return self.num_trained * _TRAINED_BYTES

    def optimizer_bytes(self, optim: str) -> int:
        """What the optimizer keeps.

        Args:
            optim: upstream's `--optim`; one that is not known here counts as Adam's.
        """
        name = optim.lower().removeprefix("paged_")
        known = next((size for key, size in _OPTIMIZER_BYTES.items() if name.startswith(key)), _ADAM_BYTES)
        return self.num_trained * known // (4 if "8bit" in name else 1)


def weight_parts(empty: PreTrainedModel, dtype: torch.dtype, packing: Packing) -> list[WeightPart]:
    """Bytes of a base model's weights by part; tied ones count once, as they lie in memory once.

    Args:
        empty: the model on the meta device.
        dtype: of what is not packed: embeddings, head, norms, vision tower and merger or projector.
        packing: of the language model's linear layers.
    """
    path = language_model_path(empty) + "."
    linear = {
        f"{name}.weight": module
        for name, module in empty.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(path)
    }
    tables = {id(module.weight) for module in (empty.get_input_embeddings(), empty.get_output_embeddings()) if module}
    sizes: Counter[tuple[str, str]] = Counter()
    plain = str(dtype).removeprefix("torch.")
    for name, parameter in empty.named_parameters():
        if id(parameter) in tables:
            sizes["embeddings and head", plain] += parameter.numel() * dtype.itemsize
        elif name in linear and packing != "none":
            sizes["language model", packing] += _packed_bytes(linear[name], dtype, packing)
        else:
            part = "language model" if name.startswith(path) else "vision tower and what follows it"
            sizes[part, plain] += parameter.numel() * dtype.itemsize
    return [WeightPart(name, kept_as, size) for (name, kept_as), size in sorted(sizes.items(), key=lambda x: -x[1])]


def packed_4bit_bytes(num_weights: int, nested: bool) -> int:
    """What bitsandbytes keeps of a weight: half a byte for each, its scales and code books.

    Args:
        num_weights: of the matrix.
        nested: whether the scales are quantized too (double quantization).
    """
    scales = -(-num_weights // _WEIGHTS_PER_SCALE)
    nested_bytes = scales + -(-scales // _SCALES_PER_GROUP) * 4 + _CODE_BYTES_NESTED
    return -(-num_weights // 2) + _CODE_BYTES_4_BIT + (nested_bytes if nested else scales * 4)


def largest_packed_layer(empty: PreTrainedModel) -> int:
    """Weights of the language model's largest linear layer: a packed one is unpacked whole for its product."""
    return max(m.weight.numel() for m in empty.get_decoder().modules() if isinstance(m, nn.Linear))


def adapted_layers(empty: PreTrainedModel, lora: LoraConfig) -> dict[str, nn.Linear]:
    """The linear layers that get a LoRA pair, by name, chosen as PEFT chooses them."""
    targets = lora.target_modules or ()
    linear = {name: module for name, module in empty.named_modules() if isinstance(module, nn.Linear)}
    if isinstance(targets, str):
        return {name: module for name, module in linear.items() if re.fullmatch(targets, name)}
    return {name: module for name, module in linear.items() if f".{name}".endswith(tuple(f".{t}" for t in targets))}


def count_trained(empty: PreTrainedModel, lora: LoraConfig) -> TrainedCounts:
    """Parameters that an adapter trains.

    Args:
        empty: the base on the meta device.
        lora: what is put on it.
    """
    layers = adapted_layers(empty, lora).values()
    num_lora = sum(lora.r * (layer.in_features + layer.out_features) for layer in layers)
    num_magnitudes = sum(layer.out_features for layer in layers) if lora.use_dora else 0
    ends = tuple(f".{name}" for name in lora.modules_to_save or ())
    whole = [name for name, _ in empty.named_modules() if f".{name}".endswith(ends)] if ends else []
    inside = tuple(f"{name}." for name in whole)
    # A head that is tied to the embeddings is copied all the same.
    parameters = empty.named_parameters(remove_duplicate=False)
    num_whole = sum(value.numel() for name, value in parameters if inside and name.startswith(inside))
    return TrainedCounts(num_lora + num_magnitudes, num_whole)


def _packed_bytes(layer: nn.Linear, dtype: torch.dtype, packing: Packing) -> int:
    size = layer.weight.numel()
    if packing == "8-bit":
        return size + layer.out_features * 4
    if packing != "fp8":
        return packed_4bit_bytes(size, nested=packing == "nested 4-bit")
    if layer.in_features % _FP8_DIMENSION_MULTIPLE or layer.out_features % _FP8_DIMENSION_MULTIPLE:
        return size * dtype.itemsize
    # A copy for the forward product and a transposed one for the backward, each with its scales.
    return 2 * size + (layer.in_features + layer.out_features) * 4
