"""What training and saving must keep: gradients everywhere, the base as it was, adapters that load."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qvl.adapters import load_adapter
from qvl.answer_distributions import Distributions, largest_difference
from qvl.checks import Check, at_most
from qvl.trained_parts import take_off

MOST_OVERFIT_RATIO = 0.1


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
