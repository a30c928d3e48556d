"""What training and saving must keep: gradients everywhere, the base as it was, adapters that load and merge."""

import functools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qvl.adapters import load_adapter
from qvl.answer_distributions import divergences, largest_difference
from qvl.checks import Check, at_most
from qvl.trained_parts import take_off

if TYPE_CHECKING:
    from peft.tuners.lora.bnb import Linear4bit

# Merging rounds the sum to the weights' format. Measured: 1e-8 nats in fp32; in bf16 1.5e-4 with a tiny model and 0.014
# and 0.016 with the 7B shape (random weights, loss from 12.6 to 8.3, a harder case than real ones). Quantizing the sum
# of that model again, which loses most of the adapter, is 0.34.
MOST_MERGE_NATS_FP32 = 1e-6
MOST_MERGE_NATS_16_BIT = 0.03
MOST_OVERFIT_RATIO = 0.1

Distributions = Callable[[PreTrainedModel | PeftModel], list[torch.Tensor]]


class GradientWatch(TrainerCallback):
    """Which groups of trained tensors have had a gradient; asks the device at each step until all have, then no more.

    A group is an adapted layer (LoRA's A and B together: while B is zero, A gets none), or a module that is trained as
    a whole.
    """

    def __init__(self, model: nn.Module) -> None:
        self._waiting: dict[str, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._waiting.setdefault(_group(name), []).append(parameter)
        self.num_groups = len(self._waiting)
        self._num_looks = 0

    def look(self) -> None:
        """Looks at the gradients as they are now."""
        self._num_looks += 1
        counts = {
            group: torch.stack([grad.count_nonzero() for grad in grads]).sum()
            for group, parameters in self._waiting.items()
            if (grads := [parameter.grad for parameter in parameters if parameter.grad is not None])
        }
        if counts:
            for group, count in zip(list(counts), torch.stack(list(counts.values())).tolist(), strict=True):
                if count:
                    del self._waiting[group]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Looks before the gradients are used and dropped."""
        if self._waiting:
            self.look()

    def verdicts(self) -> list[Check]:
        """The verdict; none where no step was taken, as when a finished training is resumed."""
        still = sorted(self._waiting)
        check = Check(
            "every_group_had_a_gradient",
            len(still),
            f"0 of {self.num_groups} without",
            not still and self.num_groups > 0,
            ", ".join(still[:3]),
        )
        return [check] if self._num_looks else []


class StopWhenLearned(TrainerCallback):
    """Ends a training on a few rows once they are known by heart, so that it costs as few steps as it needs.

    Args:
        loss: mean loss of a token at which it ends, in nats.
    """

    def __init__(self, loss: float) -> None:
        self.loss = loss

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Looks at every logged training loss."""
        if logs and logs.get("loss", self.loss + 1) < self.loss:
            control.should_training_stop = True


def _group(name: str) -> str:
    return re.sub(r"\.(lora_\w+|weight|bias)(\..*)?$", "", name)


def check_base_kept(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> Check:
    """With the adapter switched off the model gives the very numbers that the base gave before it had one.

    Args:
        before: `answer_distributions` of the base.
        after: the same rows, after training, inside `model.disable_adapter()`.
    """
    return at_most("adapter_off_gives_the_base_exactly", largest_difference(before, after), 0, " difference")


def check_save_load(model: PeftModel, measure: Distributions, folder: Path) -> tuple[PeftModel, Check]:
    """An adapter that is saved and loaded again gives the very same numbers.

    Args:
        model: a trained adapter on its base; the adapter is taken off.
        measure: gives distributions of a model on some rows.
        folder: where the adapter is saved; made if missing.

    Returns:
        The loaded adapter on the same base, and the verdict.
    """
    before = measure(model)
    model.save_pretrained(folder)
    loaded = load_adapter(take_off(model), folder)
    after = measure(loaded)
    return loaded, at_most("saved_and_loaded_gives_the_same", largest_difference(before, after), 0, " difference")


def check_merge(model: PeftModel, measure: Distributions, is_4bit: bool) -> Check:
    """The adapter merged into the weights gives nearly what it gives beside them.

    Into 4-bit weights as they are when they are used, in 16 bits (on a CPU 32): what a model is that serves without an
    adapter. Quantizing the sum again would make another model, for most of what an adapter changes is less than the
    distance of two of the sixteen numbers; what that does is told beside the verdict.

    Args:
        model: adapter on its base; afterwards the base's weights are the merged ones, and of no other use.
        measure: gives distributions of a model on some rows.
        is_4bit: whether the base is quantized.
    """
    beside = measure(model)
    merged = None
    if is_4bit:
        with _merged_when_used(model):
            merged = measure(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Merge lora module to 4-bit linear.*")
        kept = measure(model.merge_and_unload(safe_merge=True))
    again = f"; quantized again: {max(divergences(beside, kept)):.3g} nats" if is_4bit else ""
    return at_most(
        "merge_divergence_4bit_base" if is_4bit else "merge_divergence_full_base",
        max(divergences(beside, merged or kept)),
        MOST_MERGE_NATS_FP32 if model.dtype == torch.float32 else MOST_MERGE_NATS_16_BIT,
        " nats in any row",
        f"{len(beside)} rows{again}",
    )


@contextmanager
def _merged_when_used(model: PeftModel) -> Iterator[None]:
    """Adapted 4-bit layers multiply once, with dequantized and merged weights that are made anew for each call.

    All of them at a time would take four times the quantized model's memory.
    """
    # Imported here: training needs no bitsandbytes where nothing is quantized.
    from peft.tuners.lora.bnb import Linear4bit

    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    for layer in layers:
        layer.forward = functools.partial(_forward_merged, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward_merged(layer: "Linear4bit", states: torch.Tensor) -> torch.Tensor:
    from peft.utils.integrations import dequantize_bnb_weight

    base = layer.get_base_layer()
    weight = dequantized = dequantize_bnb_weight(base.weight, state=base.weight.quant_state)
    for name in layer.active_adapters:
        variant = layer.lora_variant.get(name)
        weight = variant.merge_safe(layer, name, weight) if variant else weight + layer.get_delta_weight(name)
    return functional.linear(states.to(dequantized.dtype), weight.to(dequantized.dtype), base.bias).to(states.dtype)


def check_overfit(before: float, after: float, num_rows: int, num_steps: int) -> Check:
    """A few rows can be learned by heart: their loss falls below a tenth.

    Args:
        before: mean loss of a token at the start, in nats.
        after: the same at the end.
        num_rows: rows trained on.
        num_steps: optimizer steps.
    """
    return at_most(
        "overfit_loss_ratio",
        after / before,
        MOST_OVERFIT_RATIO,
        "",
        f"{before:.3f} -> {after:.3f} on {num_rows} rows in {num_steps} steps",
    )
