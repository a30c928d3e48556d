"""Compiles the layers of a model one by one: else a step of an 8B model launches tens of thousands of small kernels.

Layers of one kind run the same code, so they share one compilation, and lengths are symbols in it, so that new lengths
compile nothing.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch._dynamo.config
import torch._functorch.config
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.compiler import config as _compiler_config
from transformers import PreTrainedModel

_LEAST_CAPABILITY = (8, 0)
# Of what a layer would save for its backward, the share that it may: the cheap rest (norms, dropout masks, products of
# activations) is computed again: 32 GiB in place of 56 for a twentieth of the speed (8B shape, one H100).
_ACTIVATION_MEMORY_BUDGET = 0.5

# Vision blocks and decoder layers run one piece of upstream's code, with and without gradients, of one row and of many:
# at torch's limit of 8 variants a layer would silently run uncompiled, and keep what compiled ones compute again.
_MOST_VARIANTS = 64
_num_forgotten_frames = 0
# dynamo's names of LoRA's weights. Their rank is a symbol too, so that the next trial of a sweep finds compiled layers.
_OF_ANY_RANK = r".*\['lora_[AB]'\].*"

_Calls: TypeAlias = dict[nn.Module, Callable[..., Any] | None]
# To wrap the two hundred modules of a model takes half a second, and a run generates several times.
_generation_calls: WeakKeyDictionary[PreTrainedModel, _Calls] = WeakKeyDictionary()


def can_compile(device: torch.device) -> bool:
    """Whether compiling pays: on CUDA with compute capability 8.0 or higher, which Triton's kernels are made for."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


def num_compiled_frames() -> int:
    """How many pieces of code, variants counted, torch.compile has compiled in this process so far."""
    utils = sys.modules.get("torch._dynamo.utils")
    return int(utils.counters["frames"]["total"]) if utils is not None else 0


def make_room_for_variants() -> None:
    """Forgets all compiled code where a next training of this process might come to torch's limit of variants.

    Trainings of one process differ in flags such as the kind of checkpointing, and each of these is a variant.
    """
    global _num_forgotten_frames
    if num_compiled_frames() - _num_forgotten_frames > _MOST_VARIANTS // 2:
        torch._dynamo.reset()
        _num_forgotten_frames = num_compiled_frames()


@contextmanager
def compiled_layers(
    base: PreTrainedModel, keeps_inputs_only: bool, in_pieces: bool = False, backend: str = "inductor"
) -> Iterator[None]:
    """Trains with compiled decoder layers and vision blocks; outside of it they are as they were.

    Args:
        base: the base model.
        keeps_inputs_only: of each layer, keep for the backward what goes into it and compute everything else again:
            activation checkpointing inside of the compiled code. Around it (`torch.utils.checkpoint`, which upstream's
            `gradient_checkpointing` puts there) torch 2.11's partitioner stops where it has a memory budget and lengths
            are symbols ("Node add was invalid, but is output"), and the last product of a layer would be computed again
            for nothing.
        in_pieces: hooks of each layer gather its weights and let them go (ZeRO-3, FSDP2): they stay outside of it.
        backend: `torch.compile`'s.
    """
    layers = layers_of(base)
    # The first layer shares the others' compilation if its input wants a gradient as theirs do.
    base.enable_input_require_grads()
    budget = 0.0 if keeps_inputs_only else _ACTIVATION_MEMORY_BUDGET
    with (
        torch._functorch.config.patch(activation_memory_budget=budget),
        _compiler_config.patch(dynamic_sources=_OF_ANY_RANK),  # type: ignore[attr-defined]
        _compiled_forwards(layers, backend) if in_pieces else _called(_compile(layers, backend)),
    ):
        yield


def layers_of(base: PreTrainedModel) -> list[nn.Module]:
    """What is compiled, and where a model in pieces is put together: decoder layers and vision blocks."""
    return [*base.get_decoder().layers, *_vision_blocks(base)]


def scale_by_tensors(model: PeftModel, device: torch.device) -> None:
    """Makes LoRA's scale (alpha / rank) an input of compiled code, which would else hold the number and serve no other.

    Args:
        model: an adapter on its base; it stays so, and computes the same.
        device: where it will compute.
    """
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling = {name: torch.tensor(float(s), device=device) for name, s in layer.scaling.items()}


@contextmanager
def compiled_generation(base: PreTrainedModel, backend: str = "inductor") -> Iterator[None]:
    """Answers with compiled code where that keeps no state: vision blocks, and decoder layers but for their attention.

    The attention writes into the layer's own cache of keys and values, which would compile every layer for itself.

    Args:
        base: the base model.
        backend: `torch.compile`'s; the first one that a model is compiled with stays.
    """
    if base not in _generation_calls:
        stateless = [
            module
            for layer in base.get_decoder().layers
            for module in layer.modules()
            if module is getattr(layer, "mlp", None) or "Norm" in type(module).__name__
        ]
        _generation_calls[base] = _compile([*stateless, *_vision_blocks(base)], backend)
    with _called(_generation_calls[base]):
        yield


@contextmanager
def plain_layers(base: PreTrainedModel) -> Iterator[None]:
    """Takes `compiled_layers` off for a while."""
    calls = {module: module._compiled_call_impl for module in base.modules() if module._compiled_call_impl}
    for module in calls:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in calls.items():
            module._compiled_call_impl = call


def _compile(modules: Iterable[nn.Module], backend: str = "inductor") -> _Calls:
    """What each module may be called by in place of its own code; compiled when it is first called."""
    calls: _Calls = {}
    for module in modules:
        module.compile(dynamic=True, backend=backend)
        calls[module], module._compiled_call_impl = module._compiled_call_impl, None
    return calls


@contextmanager
def _called(calls: _Calls) -> Iterator[None]:
    for module, call in calls.items():
        module._compiled_call_impl = call
    try:
        with _settings_of_tracing():
            yield
    finally:
        for module in calls:
            module._compiled_call_impl = None


@contextmanager
def _compiled_forwards(modules: Iterable[nn.Module], backend: str) -> Iterator[None]:
    own = {module: module.__dict__.get("forward") for module in modules}
    for module in own:
        module.forward = torch.compile(module.forward, dynamic=True, backend=backend)
    try:
        with _settings_of_tracing():
            yield
    finally:
        for module, forward in own.items():
            del module.__dict__["forward"]
            if forward is not None:
                module.forward = forward


def _settings_of_tracing() -> AbstractContextManager[None]:
    # Lengths are symbols, numbers such as a norm's epsilon are not: torch would hand each of them in as a tensor on
    # the CPU, and call the C++ compiler for what is computed of them there.
    # A layer is compiled whole under DDP too: torch would cut it where a bucket of gradients is full, and keep what
    # goes over the cut (tokens x 24,576 numbers a layer of 8B, under checkpointing too).
    return torch._dynamo.config.patch(specialize_float=True, recompile_limit=_MOST_VARIANTS, optimize_ddp=False)


def _vision_blocks(base: PreTrainedModel) -> Iterable[nn.Module]:
    vision = getattr(base.base_model, "visual", None)
    return vision.blocks if vision is not None else []
