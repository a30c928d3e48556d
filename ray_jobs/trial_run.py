"""One training of a recipe that stops at each report and waits for what a scheduler says. Knows nothing of Ray."""

import contextlib
import queue
import runpy
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qvl.errors import StoreError, Terminated, UserError, first_line
from qvl.kept_base import KeptBase
from qvl.memory_use import is_out_of_memory
from qvl.recipe import run

_MAX_REASON_CHARACTERS = 400


@dataclass(frozen=True)
class Report:
    """What a training says of itself.

    Attributes:
        numbers: the trainer's log at a step, or the run's metrics at its end, by their MLflow names.
        has_checkpoint: the run folder holds a checkpoint of this very step.
        is_last: the run has ended.
        failure: why it failed, in one line; empty if it did not.
        may_go_well_again: what failed lies outside of the trial, or in this process, which is to take no further one.
    """

    numbers: dict[str, float] = field(default_factory=dict)
    has_checkpoint: bool = False
    is_last: bool = False
    failure: str = ""
    may_go_well_again: bool = False


class Stopped(Terminated):
    """A scheduler has ended this training; its MLflow run becomes KILLED."""


class _Worker:
    """A thread that does one thing after the other.

    All runs of a process are its: torch.compile in a second thread, after the first one has ended, crashes the process
    (torch 2.11, a segmentation fault where it makes fake tensors).
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], threading.Event]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, job: Callable[[], None]) -> threading.Event:
        """Does this once the jobs before it are done; returns what is set when it has ended."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        has_ended = threading.Event()
        self._jobs.put((job, has_ended))
        return has_ended

    def _work(self) -> None:
        while True:
            job, has_ended = self._jobs.get()
            try:
                job()
            finally:
                del job  # and the run that it belongs to
                has_ended.set()


_worker = _Worker()


class TrialRun:
    """A recipe that runs in a thread, one report at a time: between two of them it does nothing."""

    def __init__(
        self, file: Path, words: Sequence[str], overrides: Mapping[str, Any], kept: KeptBase, log: Path
    ) -> None:
        """Prepares a run; `next_report` starts it.

        Args:
            file: the recipe.
            words: its command line.
            overrides: flags by name, above the command line.
            kept: what earlier runs of this process have left.
            log: file for what the run prints.
        """
        self._file, self._words, self._overrides, self._kept, self._log = file, words, overrides, kept, log
        self._reports: queue.Queue[Report] = queue.Queue()
        self._goes_on: queue.Queue[bool] = queue.Queue()
        self._work_ended: threading.Event | None = None
        self._started_at = time.perf_counter()
        self.has_ended = False

    def next_report(self) -> Report:
        """Lets the run go on and waits for what it says next."""
        if self._work_ended is None:
            self._started_at = time.perf_counter()
            self._work_ended = _worker.start(self._work)
        else:
            self._goes_on.put(True)
        report = self._reports.get()
        self.has_ended = report.is_last
        return report

    def stop(self) -> None:
        """Ends the run where it waits, if it does; the base is clean afterwards."""
        if self._work_ended is not None and not self.has_ended:
            self._goes_on.put(False)
            self._work_ended.wait()
            self.has_ended = True

    def seconds_since_start(self) -> float:
        """Since the first report was asked for."""
        return time.perf_counter() - self._started_at

    def pass_on(self, report: Report) -> None:
        """Called by the run itself: hands a report over and waits.

        Raises:
            Stopped: the run is to end here.
        """
        self._reports.put(report)
        if not self._goes_on.get():
            raise Stopped

    def _work(self) -> None:
        failure = ""
        try:
            with (
                open(self._log, "a", encoding="utf-8", buffering=1) as log,
                contextlib.redirect_stdout(log),
                contextlib.redirect_stderr(log),
            ):
                last = self._run_recipe()
                failure = last.failure
                # Not before the exception is gone, which holds the frames of the training and all of its tensors.
                self._kept.clean()
        except BaseException as error:
            # No room for the log, or a GPU that answers this process no more, as after an illegal access to memory: the
            # next trials would all fail here.
            last = Report(is_last=True, failure=failure or _reason(error), may_go_well_again=True)
        self._reports.put(last)

    def _run_recipe(self) -> Report:
        try:
            recipe = runpy.run_path(str(self._file))["RECIPE"]
            numbers = run(recipe, self._overrides, self._words, self._kept, [_Reporter(self)])
        except BaseException as error:
            traceback.print_exc()
            return Report(is_last=True, failure=_reason(error), may_go_well_again=isinstance(error, StoreError))
        return Report(numbers, is_last=True)


class _Reporter(TrainerCallback):
    """Reports each log of the training; where a checkpoint follows at the same step, after that."""

    def __init__(self, trial: TrialRun) -> None:
        self._trial = trial
        self._numbers: dict[str, float] = {}
        self._is_first_step = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Notes how long the start took."""
        if self._is_first_step:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._numbers["seconds_to_first_step"] = self._trial.seconds_since_start()
        self._is_first_step = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Reports the numbers of a logging step or an evaluation."""
        found = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
        if "loss" not in found and "eval_loss" not in found:
            return  # the summary at the end, which comes with the run's own metrics
        self._numbers |= found
        if not control.should_save:
            self._report(state, has_checkpoint=False)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Reports the last numbers again, with a checkpoint."""
        self._report(state, has_checkpoint=True)

    def _report(self, state: TrainerState, has_checkpoint: bool) -> None:
        self._trial.pass_on(Report({**self._numbers, "training_step": state.global_step}, has_checkpoint))


def _reason(error: BaseException) -> str:
    """In one line: of what the user can mend all of it, of anything else the beginning."""
    is_mendable = isinstance(error, UserError)
    text = (
        textwrap.shorten(str(error), _MAX_REASON_CHARACTERS, placeholder=" ...") if is_mendable else first_line(error)
    )
    if is_out_of_memory(error):
        return f"out of memory: {text}"
    return text if is_mendable else f"{type(error).__name__}: {text}"
