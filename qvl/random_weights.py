"""A model of full size without its checkpoint: random weights, made on the device from a configuration.

Speed and memory are those of the real model, answers are not: this is for measuring.
"""

from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from qvl.clip_llm import is_composed, see_without_gradients
from qvl.errors import UserError
from qvl.models import load_config, make_ready, quantization, skeleton
from qvl.settings import Settings

# What transformers draws from where a configuration says nothing else.
_STANDARD_DEVIATION = 0.02


def build_with_random_weights(settings: Settings, device: torch.device) -> PreTrainedModel:
    """Builds the model that `models.load_base` would load, with random weights.

    Matrices are normal with standard deviation 0.02, norms one, biases zero; seeded with `--seed`. Weights are made
    one after the other on the device, and a quantized one is packed before the next is made, so that the peak is the
    finished model plus one weight.

    Args:
        settings: model, dtype and quantization of the run; `--model_name_or_path` names a folder (or hub id) of which
            the configuration is read.
        device: where the weights are made.

    Raises:
        UserError: no such model, or `--load_in_8bit`, whose packing happens at loading only.
    """
    if settings.model.load_in_8bit:
        raise UserError("Random weights are made in 16 or 32 bits, or with --load_in_4bit; not with --load_in_8bit.")
    config = load_config(settings)
    model = skeleton(config)
    if settings.model.attn_implementation is not None:
        model.set_attn_implementation(settings.model.attn_implementation)
    quantizer = None
    wanted = quantization(settings, config)
    if wanted is not None:
        quantizer = AutoHfQuantizer.from_config(wanted, pre_quantized=False)
        quantizer.preprocess_model(model=model, device_map={"": device})
    # Qwen3-VL's configuration names it for the language model only.
    dtype = _dtype(settings, config.dtype or config.get_text_config().dtype)
    _materialize(model, device, dtype, settings.training.seed)
    model.config.dtype = dtype
    if quantizer is not None:
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
    make_ready(model)
    if is_composed(settings):
        see_without_gradients(model)
    return model.eval()


def _dtype(settings: Settings, of_config: torch.dtype | None) -> torch.dtype:
    name = settings.model.dtype
    return (of_config or torch.float32) if name in (None, "auto") else getattr(torch, name)


def _materialize(model: PreTrainedModel, device: torch.device, dtype: torch.dtype, seed: int) -> None:
    """Replaces every parameter and buffer on the meta device; tied weights stay tied."""
    generator = torch.Generator(device=device).manual_seed(seed)
    made: dict[int, nn.Parameter] = {}
    owner = model
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            # Modules come parents first, and a tower of another family knows its own buffers.
            owner = module
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                made[id(parameter)] = _made(parameter, name, device, dtype, generator)
            setattr(module, name, made[id(parameter)])
        buffers = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in buffers:
            setattr(module, name, torch.empty_like(getattr(module, name), device=device))
        if buffers:
            # Computes what buffers hold, such as rotary frequencies.
            with torch.no_grad():
                owner._init_weights(module)


def _made(
    parameter: nn.Parameter, name: str, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> nn.Parameter:
    """A parameter of the same shape and class on the device, quantized if its class packs weights on arrival."""
    values = torch.empty(parameter.shape, dtype=dtype, device=device)
    if name == "bias":
        values.zero_()
    elif values.dim() == 1:
        values.fill_(1.0)
    else:
        values.normal_(std=_STANDARD_DEVIATION, generator=generator)
    if type(parameter) is nn.Parameter:
        return nn.Parameter(values, requires_grad=parameter.requires_grad)
    # bitsandbytes' Params4bit: its attributes say how to pack, and it packs when it is moved to a device.
    return cast(nn.Parameter, type(parameter)(values, requires_grad=False, **parameter.__dict__).to(device))
