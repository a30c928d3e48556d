"""A frozen base in FP8 under LoRA: weights that are never trained need no more than eight bits, and train faster so.

e4m3 throughout (4 bits of exponent, 3 of mantissa, largest value 448). A weight is quantized once, with a scale per
output channel for the forward product and, as a transposed copy, with a scale per input channel for the backward one;
activations and gradients are quantized per token at every product. Adapters, norms, embeddings, the head and the
vision tower keep their format.

The products are `torch._scaled_mm` and not torchao's (0.18): its training layer keeps the 16-bit weight, quantizes it
anew at every step and saves the input for a weight gradient that a frozen layer does not have; its inference tensors
have no backward. Everything around the product is plain torch, so that a compiled decoder layer fuses it and quantizes
the input that several projections share once.

On a CPU the same quantized values are multiplied in fp32: the same rounding, no gain in speed.
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from qvl.errors import UserError
from qvl.models import language_model_path
from qvl.precision import Device
from qvl.settings import Settings

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max
# A row of zeros needs a scale above zero; 1/scale of this one is still finite in fp32.
_SMALLEST_AMAX = 1e-30
# What `torch._scaled_mm` asks of both dimensions of a weight.
_DIMENSION_MULTIPLE = 16


def require_fp8(device: Device, settings: Settings) -> None:
    """Stops `--base_precision fp8` where it cannot work, before anything is loaded.

    Raises:
        UserError: a GPU without FP8 units, or a base that is quantized otherwise.
    """
    if settings.recipe.base_precision != "fp8":
        return
    if device.kind == "cuda" and device.capability < (8, 9):
        major, minor = device.capability
        raise UserError(
            f"--base_precision fp8 needs compute capability 8.9 (RTX 40, L4, H100), this GPU has {major}.{minor}: "
            "leave the flag out, or use --load_in_4bit to save memory."
        )
    for flag in ("load_in_4bit", "load_in_8bit"):
        if getattr(settings.model, flag):
            raise UserError(f"--base_precision fp8 and --{flag} both quantize the frozen weights: keep one.")


def quantize_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row in e4m3 with a scale of its own, so that the row's largest value becomes 448.

    A row with a value that is not finite gives NaN, as the product in 16 bit would.

    Args:
        matrix: (rows, columns), any floating-point dtype.

    Returns:
        (rows, columns) e4m3, contiguous, and (rows, 1) fp32: their product is the matrix again, up to 1/16 of a value
        (half of the last of 3 mantissa bits), or for values below 2^-6 of the scale, up to 2^-10 of it.
    """
    scale = matrix.abs().amax(dim=1, keepdim=True).float().clamp(min=_SMALLEST_AMAX) / _LARGEST
    # Beyond 448, where the division's rounding can lead, the cast would make NaN.
    return (matrix.float() / scale).clamp(-_LARGEST, _LARGEST).to(FP8).contiguous(), scale


def scaled_product(
    left: torch.Tensor, right: torch.Tensor, left_scale: torch.Tensor, right_scale: torch.Tensor
) -> torch.Tensor:
    """`left @ right.T` of two matrices from `quantize_rows`.

    Args:
        left: (M, K) e4m3, contiguous.
        right: (N, K) e4m3, contiguous; its transpose is the column-major operand that FP8 units want.
        left_scale: (M, 1) fp32.
        right_scale: (N, 1) fp32.

    Returns:
        (M, N), bf16 on a GPU, fp32 on a CPU.
    """
    if left.is_cuda:
        return torch._scaled_mm(
            left,
            right.t(),
            scale_a=left_scale,
            scale_b=right_scale.t(),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    return (left.float() @ right.float().t()) * left_scale * right_scale.t()


# In the graph as one call, which is opened behind dynamo: dynamo itself fails to look into it where lengths are symbols
# (torch 2.14: "lift_tracked_freevar_to_input should not be called on root").
@torch.compiler.allow_in_graph
class _FrozenProduct(torch.autograd.Function):
    """`x @ weight.T` whose backward multiplies in FP8 too, and gives a gradient to `x` alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        transposed: torch.Tensor | None,
        transposed_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, scale, transposed, transposed_scale)
        quantized, x_scale = quantize_rows(x)
        return scaled_product(quantized, weight, x_scale, scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (grad,) = grad_outputs
        weight, scale, transposed, transposed_scale = ctx.saved_tensors
        if transposed is None:
            # One copy: the output channels' scales go into the gradient, and the copy is made for this product only.
            quantized, grad_scale = quantize_rows(grad * scale.t())
            transposed, transposed_scale = weight.t().contiguous(), torch.ones_like(weight[:1], dtype=scale.dtype).t()
        else:
            quantized, grad_scale = quantize_rows(grad)
        grad_x = scaled_product(quantized, transposed, grad_scale, transposed_scale).to(grad.dtype)
        return grad_x, None, None, None, None


class Fp8Linear(nn.Module):
    """A frozen `nn.Linear` in FP8.

    It has no `weight`: PEFT would cast adapters to that weight's dtype, and merge into it.

    Attributes:
        forward_weight: (out_features, in_features) e4m3.
        forward_scale: (out_features, 1) fp32.
        backward_weight: (in_features, out_features) e4m3, or None with one copy.
        backward_scale: (in_features, 1) fp32, or None with one copy.
    """

    forward_weight: torch.Tensor
    forward_scale: torch.Tensor
    backward_weight: torch.Tensor | None
    backward_scale: torch.Tensor | None

    def __init__(self, linear: nn.Linear, num_copies: int = 2) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        forward = quantize_rows(weight)
        backward = quantize_rows(weight.t()) if num_copies == 2 else (None, None)
        # Persistent, so that the proof that nothing frozen has changed covers them.
        self.register_buffer("forward_weight", forward[0])
        self.register_buffer("forward_scale", forward[1])
        self.register_buffer("backward_weight", backward[0])
        self.register_buffer("backward_scale", backward[1])
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output as `nn.Linear` would give it, in autocast's dtype where that is on.

        Args:
            x: (..., in_features).

        Returns:
            (..., out_features).
        """
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rows = x.reshape(-1, self.in_features)
        product = _FrozenProduct.apply(
            rows, self.forward_weight, self.forward_scale, self.backward_weight, self.backward_scale
        )
        if self.bias is not None:
            product = product + self.bias.to(product.dtype)
        return product.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """As `nn.Linear` shows itself."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            # An AttributeError, so that `getattr(layer, "weight", None)` goes on.
            raise AttributeError(
                "A base in FP8 has no weights to merge into: load the adapter on the 16-bit base and merge there."
            )
        return super().__getattr__(name)


@dataclass(frozen=True)
class Fp8Report:
    """What was quantized.

    Attributes:
        modules: for each kind of layer (`layers.*.self_attn.q_proj`) its count.
        left: the same for frozen linear layers of the decoder whose dimensions FP8 units do not take.
        gib_before: memory of the quantized layers' weights before, in GiB.
        gib_after: the same now, scales and transposed copies included.
        is_emulated: products run in fp32 on a CPU.
    """

    modules: dict[str, int]
    left: dict[str, int]
    gib_before: float
    gib_after: float
    is_emulated: bool

    def lines(self) -> list[str]:
        """The report as text lines."""
        lines = [
            f"FP8: {sum(self.modules.values())} frozen layers of the language model, "
            f"{self.gib_before:.3g} GiB before, {self.gib_after:.3g} GiB now."
        ]
        if self.left:
            lines.append(f"Not in FP8, dimensions are no multiples of {_DIMENSION_MULTIPLE}: {', '.join(self.left)}.")
        if self.is_emulated:
            lines.append("No FP8 units on a CPU: the same rounding, products in fp32, slower than without.")
        return lines


def quantize_frozen_base(model: PeftModel, num_copies: int = 2) -> Fp8Report:
    """Puts the frozen linear layers of the decoder into FP8, in place, and frees their 16-bit weights.

    There is no way back: who needs the 16-bit base again loads it again. The adapter stays what it is, and is saved
    and loaded as any other.

    Args:
        model: a base with its adapter on it, weights on the device that they will be used on.
        num_copies: 2 keeps a transposed copy of each weight for the backward, 1 transposes at every backward.

    Raises:
        UserError: there is nothing to quantize, or the adapter is a DoRA.
    """
    if any(config.use_dora for config in model.peft_config.values()):
        raise UserError("DoRA reads the base's own weights at every step: leave out --base_precision fp8.")
    base = model.get_base_model()
    decoder = language_model_path(base)
    frozen = {
        name: module
        for name, module in base.named_modules()
        if type(module) is nn.Linear
        and name.startswith(f"{decoder}.layers.")
        and not any(parameter.requires_grad for parameter in module.parameters())
    }
    modules: Counter[str] = Counter()
    left: Counter[str] = Counter()
    bytes_before = bytes_after = 0
    while frozen:
        # Out of the table as well: one layer's 16-bit weights at a time are held beside the quantized ones.
        name, linear = frozen.popitem()
        kind = re.sub(r"\.\d+\.", ".*.", name.removesuffix(".base_layer"))
        if linear.in_features % _DIMENSION_MULTIPLE or linear.out_features % _DIMENSION_MULTIPLE:
            left[kind] += 1
            continue
        quantized = Fp8Linear(linear, num_copies)
        base.set_submodule(name, quantized)
        modules[kind] += 1
        bytes_before += linear.weight.nbytes
        bytes_after += sum(buffer.nbytes for buffer in quantized.buffers())
    if not modules:
        raise UserError("--base_precision fp8 found no frozen linear layer in the language model: leave it out.")
    is_emulated = next(base.parameters()).device.type != "cuda"
    return Fp8Report(dict(modules), dict(left), bytes_before / 2**30, bytes_after / 2**30, is_emulated)
