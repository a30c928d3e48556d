"""Are the numbers sound: nothing infinite in any layer, and 4-bit weights that say nearly what the full ones say."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from qvl.answer_distributions import mean_divergence
from qvl.checks import Check, at_most
from qvl.features import encoder_inputs

# Mean over answers. Measured in NF4: 0.06 and 0.05 for the two embedded Qwen-VL models, whose narrow layers suffer more
# from quantization than a full-size model's; weights of another layer or a wrong scale give whole nats.
MOST_KL_NATS = 0.2


class FiniteWatch:
    """Notes which layers gave NaN or infinity, forward and backward, without asking the device until the end."""

    def __init__(self) -> None:
        self._bad: dict[tuple[str, str], torch.Tensor] = {}

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Looks at the floating-point outputs of every module, and at the gradients that reach them."""
        handles = [
            module.register_forward_hook(lambda _, __, output, name=name: self._look(name, output))
            for name, module in model.named_modules()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def look_at_gradients(self, model: nn.Module) -> None:
        """Looks at what has arrived in the parameters."""
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self._note("gradient", name, parameter.grad)

    def offenders(self, side: str) -> list[str]:
        """Names of the layers with a number that is not finite; `side` is "output" or "gradient"."""
        return [name for (kind, name), bad in self._bad.items() if kind == side and bool(bad)]

    def num_seen(self, side: str) -> int:
        """How many layers were looked at."""
        return sum(kind == side for kind, _ in self._bad)

    def _look(self, name: str, output: Any) -> None:
        for tensor in _floating(output):
            self._note("output", name, tensor)
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: self._note("gradient", name, gradient))

    def _note(self, side: str, name: str, tensor: torch.Tensor) -> None:
        bad = ~torch.isfinite(tensor.detach()).all()
        key = (side, name or "model")
        self._bad[key] = self._bad[key] | bad if key in self._bad else bad


def _floating(output: Any) -> Iterator[torch.Tensor]:
    """Floating-point tensors of what a module returns: a tensor, a sequence or a mapping."""
    if torch.is_tensor(output):
        if output.is_floating_point():
            yield output
        return
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    for value in values:
        yield from _floating(value)


def check_finite(model: PeftModel, batch: Mapping[str, torch.Tensor]) -> list[Check]:
    """One forward and backward pass of a training batch: no NaN or infinity in any layer's output or gradient.

    Args:
        model: adapter on its base; trained weights get no update and lose their gradients.
        batch: from the collator, with labels.
    """
    watch = FiniteWatch()
    inputs = encoder_inputs({key: value.to(model.device) for key, value in batch.items()}, model)
    with watch.watching(model), torch.enable_grad():
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
    watch.look_at_gradients(model)
    model.zero_grad(set_to_none=True)
    return [
        Check(
            f"no_nan_or_infinity_in_any_{side}",
            len(offenders := watch.offenders(side)),
            f"0 of {watch.num_seen(side)} layers",
            not offenders and watch.num_seen(side) > 0,
            ", ".join(offenders[:3]) or str(model.dtype),
        )
        for side in ("output", "gradient")
    ]


def check_quantization_divergence(quantized: Sequence[torch.Tensor], full: Sequence[torch.Tensor]) -> Check:
    """4-bit weights give nearly the distributions of the full ones.

    Args:
        quantized: from `answer_distributions`, of the 4-bit model.
        full: the same of the model in 16 bits (on a CPU 32).
    """
    mean = mean_divergence(full, [part.to(full[0].device) for part in quantized])
    return at_most("4bit_divergence_from_full_weights", mean, MOST_KL_NATS, " nats", f"{len(full)} answers")
