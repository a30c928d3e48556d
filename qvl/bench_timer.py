"""Times the steps of any trainer in blocks, from outside, and measures the device's matmul peak."""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qvl.bench_work import WeightCounts, WorkCounter
from qvl.compiled_layers import num_compiled_frames

# Size of the matrices and products a group.
_PEAK_OF = {"cuda": (8192, 20), "cpu": (512, 5)}
_PEAK_GROUPS = 5

Block = dict[str, float]


class BlockTimer(TrainerCallback):
    """Warm-up steps, then blocks of steps, timed from the end of a step to the end of another.

    The device is waited for at the borders of blocks only. Steps are those of the optimizer; a step's time includes
    fetching its batches. The same instrument hangs on every trainer: it replaces `get_batch_samples` of the object by
    a function that calls it, looks at the clock and counts the batches, and `training_step`, during the warm-up only,
    by one that keeps the losses.

    Args:
        counter: adds up the batches.
        weights: of the model, for the share of the peak.
        peak_tflops: of `measure_matmul_peak`.
        num_warmup_steps: before the first block, at least 1.
        num_block_steps: steps of a block.
        deadline_seconds: of `time.perf_counter`; the training is stopped behind the step that passes it.
        on_block: called with every finished block.
    """

    def __init__(
        self,
        counter: WorkCounter,
        weights: WeightCounts,
        peak_tflops: float,
        num_warmup_steps: int,
        num_block_steps: int,
        deadline_seconds: float,
        on_block: Callable[[Block], None],
    ) -> None:
        self.counter = counter
        self.weights = weights
        self.peak_tflops = peak_tflops
        self.num_warmup_steps = num_warmup_steps
        self.num_block_steps = num_block_steps
        self.deadline_seconds = deadline_seconds
        self.on_block = on_block
        self.is_late = False
        self.first_step_seconds: float | None = None
        self.warmup_seconds: float | None = None
        self.warmup_losses: list[float] = []
        self._step_losses: list[torch.Tensor] = []
        self._start = 0.0
        self._wait_seconds = 0.0
        self._num_compiled = 0
        self._trainer: Any = None

    def attach(self, trainer: Any) -> None:
        """Hangs the instrument on a trainer."""
        self._trainer = trainer
        trainer.add_callback(self)
        fetch, compute = trainer.get_batch_samples, trainer.training_step

        def timed_fetch(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            batches, num_items = fetch(*args, **kwargs)
            self._wait_seconds += time.perf_counter() - start
            for batch in batches:
                self.counter.add(batch)
            return batches, num_items

        def kept_loss(*args: Any, **kwargs: Any) -> Any:
            loss = compute(*args, **kwargs)
            self._step_losses.append(loss.detach())
            return loss

        trainer.get_batch_samples = timed_fetch
        trainer.training_step = kept_loss

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock of the warm-up."""
        self._start = now()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Looks at the clock where a block ends."""
        num_timed = state.global_step - self.num_warmup_steps
        if num_timed <= 0:
            self.warmup_losses.append(float(torch.stack(self._step_losses).sum()))
            self._step_losses.clear()
        if state.global_step == 1:
            self.first_step_seconds = now() - self._start
        if num_timed == 0:
            self.warmup_seconds = now() - self._start
            del self._trainer.training_step  # the class's own comes back
            self._trainer = None
            self._begin_block()
        elif num_timed > 0 and num_timed % self.num_block_steps == 0:
            self.on_block(self._block())
            self._begin_block()
        if time.perf_counter() > self.deadline_seconds:
            self.is_late = control.should_training_stop = True

    def _begin_block(self) -> None:
        self.counter.take()
        self._wait_seconds = 0.0
        self._num_compiled = num_compiled_frames()
        self._start = now()

    def _block(self) -> Block:
        seconds = now() - self._start
        work = self.counter.take()
        tflop = work.tflop(self.weights)
        return {
            "num_steps": self.num_block_steps,
            "seconds": seconds,
            "num_captions": work.num_captions,
            "num_tokens": work.num_tokens,
            "num_target_tokens": work.num_target_tokens,
            "num_visual_tokens": work.num_visual_tokens,
            "num_patches": work.num_patches,
            "tflop": tflop,
            "data_wait_seconds": self._wait_seconds,
            "num_recompiles": num_compiled_frames() - self._num_compiled,
            "captions_per_second": work.num_captions / seconds,
            "tokens_per_second": work.num_tokens / seconds,
            "ms_per_step": 1000 * seconds / self.num_block_steps,
            "matmul_peak_share": tflop / seconds / self.peak_tflops,
            "data_wait_share": self._wait_seconds / seconds,
        }


def now() -> float:
    """The clock in seconds, once the device has done all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_matmul_peak(device: torch.device, dtype: torch.dtype) -> dict[str, float | int | str]:
    """The most 1e12 operations a second that a square matrix product reaches here, best of five groups.

    Returns:
        `tflops`, `size` (8192 on a GPU, 512 on a CPU) and `dtype`.
    """
    size, num_products = _PEAK_OF[device.type]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(1 + _PEAK_GROUPS):  # the first warms up and is seldom the best
        start = now()
        for _ in range(num_products):
            torch.mm(left, right, out=out)
        best = max(best, 2 * size**3 * num_products / (now() - start) / 1e12)
    return {"tflops": best, "size": size, "dtype": str(dtype).removeprefix("torch.")}
