"""Is an adapter merged into the weights what it is beside them? Judged by what rounding costs and the adapter does."""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from torch.nn import functional

from qvl.answer_distributions import Distributions, mean_divergence
from qvl.checks import Check, at_most

# What a merge may lose, as a share of the adapter's strength. Rounding to nearest gives the old weight back where its
# change is below half a step of the format: with the shape of a 7B model in bf16 that took 21% of an adapter after 3
# steps, and 5% after 20. Quantizing to 4 bits again took all of it, both times.
MOST_LOST = 0.1
# Differences that no one makes: beside its base an adapter's layer rounds each product and their sum, merged each
# weight. Errors of one size: twice the divergence of the one is expected between both. Over 72 adapters of a tiny model
# in bf16 (full and 4-bit, LoRA and DoRA, small to large) it was 0.5 to 2.4 times on 8 rows.
_ROUNDING_RATIO = 4
# Below that a divergence of fp32 probabilities is not resolved; in fp32 merging is 1e-8.
RESOLVED_NATS = 1e-6

_LayerForward: TypeAlias = Callable[[LoraLayer, torch.Tensor], torch.Tensor]


def check_merge(model: PeftModel, measure: Distributions, is_4bit: bool) -> Check:
    """The adapter merged into the weights gives nearly what it gives beside them.

    Into 4-bit weights as they are when they are used, in 16 bits (on a CPU 32): what a model is that serves without an
    adapter. Quantizing the sum again would make another model, for most of what an adapter changes is less than the
    distance of two of the sixteen numbers; what that does is told beside the verdict.

    How near that is depends on the model and on the adapter, so both are measured on the same rows: how far the adapter
    at nine tenths of its strength is (16 bits only, fp32 holds every adapter), and how far 16-bit arithmetic puts it
    from itself with its layers' products in fp32.

    Args:
        model: adapter on its base; afterwards the base's weights are the merged ones, and of no other use.
        measure: gives distributions of a model on some rows.
        is_4bit: whether the base is quantized.
    """
    beside = measure(model)
    with _adapted_layers(model, _forward_in_fp32):
        rounding = mean_divergence(measure(model), beside)
    most = max(RESOLVED_NATS, _ROUNDING_RATIO * rounding)
    if model.dtype != torch.float32:
        with rescale_adapter_scale(model, 1 - MOST_LOST):
            most = max(most, mean_divergence(beside, measure(model)))
    merged = None
    if is_4bit:
        with _adapted_layers(model, _forward_merged):
            merged = measure(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Merge lora module to 4-bit linear.*")
        kept = measure(model.merge_and_unload(safe_merge=True))
    again = f"; quantized again: {mean_divergence(beside, kept):.3g} nats" if is_4bit else ""
    return at_most(
        "merge_divergence_4bit_base" if is_4bit else "merge_divergence_full_base",
        mean_divergence(beside, merged or kept),
        most,
        " nats",
        f"{len(beside)} rows; rounding alone: {rounding:.3g} nats{again}",
    )


@contextmanager
def _adapted_layers(model: PeftModel, forward: _LayerForward) -> Iterator[None]:
    """Adapted linear layers compute otherwise, each call with weights that are made for it.

    All of them at a time would take several times the model's memory.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Linear)
    ]
    for layer in layers:
        layer.forward = functools.partial(forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward_in_fp32(layer: LoraLayer, states: torch.Tensor) -> torch.Tensor:
    """LoRA (Hu et al. 2021) or DoRA (Liu et al. 2024) by their formulas: not by the code that merges."""
    base = layer.get_base_layer()
    weight = dequantize_module_weight(base).float()
    for name in layer.active_adapters:
        weight = weight + layer.scaling[name] * (layer.lora_B[name].weight.float() @ layer.lora_A[name].weight.float())
        if layer.use_dora.get(name):
            magnitude = layer.lora_magnitude_vector[name].weight.float()
            weight = weight * (magnitude / torch.linalg.vector_norm(weight, dim=1)).unsqueeze(1)
    bias = None if base.bias is None else base.bias.float()
    return functional.linear(states.float(), weight, bias).to(states.dtype)


def _forward_merged(layer: LoraLayer, states: torch.Tensor) -> torch.Tensor:
    base = layer.get_base_layer()
    weight = dequantized = dequantize_module_weight(base)
    for name in layer.active_adapters:
        variant = layer.lora_variant.get(name)
        weight = variant.merge_safe(layer, name, weight) if variant else weight + layer.get_delta_weight(name)
    return functional.linear(states.to(dequantized.dtype), weight.to(dequantized.dtype), base.bias).to(states.dtype)
