"""What watches a training from inside: its log, numbers that are none, and signals."""

import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qvl import ending_signals
from qvl.errors import UserError
from qvl.processes import anywhere, flag_of_all, num_processes

# A loss scaler starts at 65,536 and halves at every overflow; below 1 it scales gradients down, into fp16's underflow.
_SMALLEST_LOSS_SCALE = 1.0

Log = Callable[[dict[str, float], int], None]


class LogCallback(TrainerCallback):
    """Hands every training log to a function, rounded to nothing, at its step."""

    def __init__(self, log: Log) -> None:
        self.sink = log

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Passes on the numbers of the main process."""
        if logs and state.is_world_process_zero:
            self.sink({key: value for key, value in logs.items() if isinstance(value, int | float)}, state.global_step)


class DivergenceWatchdog(TrainerCallback):
    """Stops a run whose loss is no number, or whose fp16 loss scaler has collapsed, and names the step.

    Trainer skips such steps (fp16) or replaces the logged loss (`logging_nan_inf_filter`): a dead run looks alive.
    """

    def __init__(self, model: nn.Module, loss_scale: Callable[[], float | None]) -> None:
        self.loss_scale = loss_scale
        self.not_finite: torch.Tensor | None = None
        self._answers = _OneStepLate()
        self.hook = model.register_forward_hook(self._look)

    def _look(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        log_probs = outputs.log_probs if "log_probs" in outputs else outputs.get("loss")
        if module.training and log_probs is not None:
            bad = ~torch.isfinite(log_probs.detach()).all()
            self.not_finite = bad if self.not_finite is None else self.not_finite | bad

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Looks at the step before, whose answer has come meanwhile, and at this one where the trainer waits anyway.

        To ask a GPU about this step at every step would keep it idle until the next batch is there.

        Raises:
            UserError: the run has diverged.
        """
        if self.not_finite is not None:
            of_step_before = self._answers.swap(self.not_finite)
            if of_step_before is not None:
                _require_finite(of_step_before, state.global_step - 1)
            if control.should_log or control.should_save or control.should_evaluate or control.should_training_stop:
                _require_finite(self.not_finite, state.global_step)
        scale = self.loss_scale()
        if scale is not None and scale < _SMALLEST_LOSS_SCALE:
            raise UserError(
                f"Step {state.global_step}: the fp16 loss scale has collapsed to {scale:g}, gradients overflow at "
                "every step. Lower --learning_rate, or use --dtype float32 or a GPU with bf16."
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes its hook off the model, which goes on to be evaluated."""
        self.hook.remove()


def _require_finite(not_finite: torch.Tensor, step: int) -> None:
    if bool(not_finite):
        raise UserError(
            f"Step {step}: the loss is not a number. Lower --learning_rate or --max_grad_norm; in "
            "fp16 also try --dtype float32, or bf16 on a GPU that has it (compute capability 8.0)."
        )


class _OneStepLate:
    """Numbers of a device, each told on the host when the next one is sent: nobody waits for the step at work."""

    def __init__(self) -> None:
        self._sent: torch.Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def swap(self, number: torch.Tensor) -> torch.Tensor | None:
        """Sends this one off and returns the one before; None at first."""
        if self._arrived is not None:
            self._arrived.synchronize()
        before, self._sent = self._sent, number.to("cpu", non_blocking=True)
        if number.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        return before


class EarlyStopping(EarlyStoppingCallback):
    """Upstream's, which goes on counting where the checkpoint did that a training is resumed from.

    Upstream does so with `restore_callback_states_from_checkpoint` only, which would bring back the patience of the
    checkpoint too, and what the trainer was about to do.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the count of the checkpoint, if it has one: it may be of a training without a patience.

        Upstream then has no place in the state to save this one's, and fails at the next checkpoint.
        """
        super().on_train_begin(args, state, control, **kwargs)
        self._first_step = state.global_step
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Upstream's, but for what `--eval_on_start` evaluates: a checkpoint has been counted before it was saved."""
        if state.global_step != self._first_step:
            super().on_evaluate(args, state, control, metrics, **kwargs)


class SaveOnTermination(TrainerCallback):
    """A signal to end during training: finish the step, save a checkpoint, stop. `requested` then tells."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}
        self._answers = _OneStepLate()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the signals over for the time of the training; trials of a sweep run in a thread, which gets none."""
        if threading.current_thread() is threading.main_thread():
            self._previous = ending_signals.take_over(self._request)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Asks for a checkpoint and the end; of several processes all at the same step, whichever had the signal."""
        if num_processes() > 1:
            of_step_before = self._answers.swap(flag_of_all(self.requested, args.device))
            stops = of_step_before is not None and bool(of_step_before)
        else:
            stops = self.requested
        if stops:
            self.requested = True
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gives the signals back, and has all processes know of one that came in the last step."""
        self.requested = anywhere(self.requested, args.device)
        ending_signals.give_back(self._previous)
