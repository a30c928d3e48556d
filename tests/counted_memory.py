"""Counts what real layers allocate and save, on fake tensors: shapes of full size, no memory, no GPU."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from unittest.mock import patch

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel

from qvl.models import skeleton

_aten = torch.ops.aten
_bitsandbytes = torch.ops.bitsandbytes


class LiveBytes(TorchDispatchMode):
    """How many bytes of new tensors are alive, and were at most."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.alive = known, {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key in self.alive or key in self.known:
            return
        self.alive[key] = size = storage.nbytes()
        weakref.finalize(storage, self._drop, key)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int) -> None:
        self.now -= self.alive.pop(key)


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Bytes of the tensors that autograd saves, each storage once."""

    def __init__(self, known: set[int]) -> None:
        self.known, self.storages = known, {}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.storages[storage._cdata] = storage
        return tensor

    def total(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


@dataclass(frozen=True)
class Counted:
    """Bytes of a step: saved for the backward, and alive at most."""

    saved: int
    peak: int


def count_step(
    config: PretrainedConfig,
    lora: LoraConfig,
    dtype: torch.dtype,
    num_rows: int,
    row_tokens: int,
    has_mask: bool,
    with_backward: bool = False,
    checkpointing: bool = False,
    bits: int = 16,
) -> Counted:
    """Runs the decoder layers of a configuration with LoRA on them as they train on CUDA, on fake tensors.

    The device is the CPU by name, since the backward of fake CUDA tensors needs a driver; dropout and attention are the
    operators that CUDA's are, and save what they save there.
    """
    empty = skeleton(config) if bits == 16 else _packed(skeleton(config), dtype, bits)
    model = get_peft_model(empty, lora).train()
    base = model.get_base_model()
    if checkpointing:
        enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
        # As qvl does it: over 8-bit layers the other kind would keep what they hold on to.
        enable({"use_reentrant": bits == 8})
    decoder, text = base.get_decoder(), config.get_text_config(decoder=True)
    with _fake_cuda_operators():
        _make_fake(model, dtype)
        x = torch.empty(num_rows, row_tokens, text.hidden_size, dtype=dtype).requires_grad_(True)
        mask = torch.ones(num_rows, 1, row_tokens, row_tokens, dtype=torch.bool) if has_mask else None
        places = torch.zeros(num_rows, row_tokens, dtype=torch.long)
        rotary = decoder.rotary_emb(x, places.expand(3, -1, -1) if "vl" in text.model_type else places)
        tensors = [*model.parameters(), x, *rotary, *([mask] if mask is not None else [])]
        known = {tensor.untyped_storage()._cdata for tensor in tensors}
        # A layer's own input may be among what it saves.
        alive, saved = LiveBytes(known), SavedBytes(known - {x.untyped_storage()._cdata})
        with alive:
            with saved, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                hidden = x
                for layer in decoder.layers:
                    hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=None)
            num_saved = saved.total()
            saved.storages.clear()
            if with_backward:
                hidden.backward(torch.empty_like(hidden))
        return Counted(num_saved, alive.peak)


def _packed(empty: PreTrainedModel, dtype: torch.dtype, bits: int) -> PreTrainedModel:
    """The same with bitsandbytes' layers in the place of the decoder's linear ones."""
    decoder: Any = empty.get_decoder()
    for name, layer in [(name, layer) for name, layer in decoder.named_modules() if isinstance(layer, nn.Linear)]:
        sizes, has_bias = (layer.in_features, layer.out_features), layer.bias is not None
        decoder.set_submodule(
            name,
            bnb.nn.Linear4bit(*sizes, bias=has_bias, compute_dtype=dtype, quant_type="nf4", device="meta")
            if bits == 4
            else bnb.nn.Linear8bitLt(*sizes, bias=has_bias, has_fp16_weights=False, threshold=6.0, device="meta"),
        )
    # By this PEFT chooses its own layers for them.
    setattr(cast(Any, empty), f"is_loaded_in_{bits}bit", True)
    return empty


def _make_fake(model: nn.Module, dtype: torch.dtype) -> None:
    """Fake tensors in the place of those on the meta device; what is trained is fp32."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            _pack_fake_4bit(module, dtype)
            continue
        if isinstance(module, bnb.nn.Linear8bitLt):
            _pack_fake_8bit(module, dtype)
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            kind = torch.float32 if parameter.requires_grad else dtype
            made = nn.Parameter(torch.empty(parameter.shape, dtype=kind), requires_grad=parameter.requires_grad)
            setattr(module, name, made)
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _pack_fake_4bit(layer: bnb.nn.Linear4bit, dtype: torch.dtype) -> None:
    size = layer.in_features * layer.out_features
    weight: Any = nn.Parameter(torch.empty(size // 2, 1, dtype=torch.uint8), requires_grad=False)
    scales = torch.empty(size // 64)
    weight.quant_state = bnb.functional.QuantState(
        scales, (layer.out_features, layer.in_features), torch.empty(16), 64, "nf4", dtype
    )
    layer.weight = weight
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.empty(layer.out_features, dtype=dtype), requires_grad=False)


def _pack_fake_8bit(layer: bnb.nn.Linear8bitLt, dtype: torch.dtype) -> None:
    packed = torch.empty(layer.out_features, layer.in_features, dtype=torch.int8)
    weight: Any = nn.Parameter(packed, requires_grad=False)
    weight.CB = None
    layer.weight = weight
    layer.state.CB, layer.state.SCB = packed, torch.empty(layer.out_features)
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.empty(layer.out_features, dtype=dtype), requires_grad=False)


@contextmanager
def _fake_cuda_operators() -> Iterator[None]:
    """Fake tensors, with the operators of CUDA in the place of the CPU's: dropout, attention, the 4-bit product.

    PEFT's 4-bit layers ask about autocast without naming a device, which is about CUDA's.
    """
    is_autocast_enabled = torch.is_autocast_enabled
    with (
        patch.object(functional, "dropout", _dropout),
        patch.object(functional, "scaled_dot_product_attention", _attention),
        patch.object(_bitsandbytes.gemm_4bit, "default", _product_4bit),
        patch.object(bnb.functional, "int8_vectorwise_quant", _rounded_rows),
        patch.object(_bitsandbytes, "int8_mixed_scaled_mm", _product_8bit),
        patch.object(torch, "is_autocast_enabled", lambda device="cpu": is_autocast_enabled(device)),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


def _dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p else x


def _product_4bit(
    x: torch.Tensor,
    packed: torch.Tensor,
    shape: Sequence[int],
    scales: torch.Tensor,
    blocksize: int,
    kind: str,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """As on GPUs from some dozens of tokens on: the weight is unpacked whole for an ordinary product."""
    weight = _bitsandbytes.dequantize_4bit.default(packed, scales, blocksize, kind, shape, x.dtype)
    return functional.linear(x, weight, bias)


def _rounded_rows(x: torch.Tensor, threshold: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the kernel of CUDA does it, where no number is an outlier."""
    (x.abs() >= threshold).any()
    return torch.empty_like(x, dtype=torch.int8), torch.empty(x.shape[0]), torch.empty(0, dtype=torch.int64)


def _product_8bit(
    x: torch.Tensor, rounded: torch.Tensor, packed: torch.Tensor, *others: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers, which are scaled in fp16 and cast."""
    product = torch.empty(len(x), len(packed), dtype=torch.int32)
    return torch.empty_like(product, dtype=torch.float16).to(x.dtype), torch.empty(0, dtype=x.dtype)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if attn_mask is None:
        return _aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    bias = torch.where(attn_mask, 0.0, float("-inf")).to(query.dtype)
    bias = bias.expand(*query.shape[:3], key.shape[2])
    saves = torch.is_grad_enabled()
    return _aten._scaled_dot_product_efficient_attention(query, key, value, bias, saves, dropout_p, scale=scale)[0]
