"""What a sweep says while it runs: a line when a trial starts, ends, fails or is taken up again, and once a minute."""

import logging
import pickle
import time
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError
from ray.tune import Callback

from ray_jobs.search import RUNG_METRIC, STEP

_PULSE_SECONDS = 60.0


class Narrator(Callback):
    """Prints the lines; Ray's own tables are off, which come back every half minute."""

    def __init__(self, metric: str) -> None:
        self._metric = metric
        self._spoke_at = time.monotonic()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has an actor."""
        point = " ".join(f"{name}={_short(value)}" for name, value in trial.config.items())
        self._say(f"{trial.trial_id} starts: {point}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A rung."""
        if time.monotonic() - self._spoke_at > _PULSE_SECONDS:
            running = [other for other in trials if other.status == "RUNNING"]
            said = [f"{other.trial_id} {_place(other.last_result)}" for other in running]
            done = sum(other.status == "TERMINATED" for other in trials)
            self._say(f"{done} of {len(trials)} trials done; running: {', '.join(said)}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has come to its end, or was ended."""
        last = trial.last_result
        if last.get("failure"):
            self._say(f"{trial.trial_id} failed: {last['failure']}")
        elif last.get("is_finished"):
            self._say(f"{trial.trial_id} finished: {self._metric} {_short(last.get(self._metric))}")
        else:
            self._say(f"{trial.trial_id} pruned at {_place(last)}")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its actor is gone or could not go on; there are retries left."""
        self._say(f"{trial.trial_id} {_interruption(trial)}; it goes on from its last checkpoint")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """No retries are left."""
        self._say(f"{trial.trial_id} {_interruption(trial)}; that was too often, it has failed")

    def _say(self, text: str) -> None:
        self._spoke_at = time.monotonic()
        print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def _interruption(trial: Any) -> str:
    # Ray's copy on this machine: that in the storage comes later, or not at all where the disk is full.
    file = trial.pickled_error_file
    if file is None:  # the error was Ray's own, not one of the trial or its process
        return "could not go on"
    error = pickle.loads(Path(file).read_bytes())
    if isinstance(error, RayActorError):
        return "lost its process or node"
    return f"stopped ({str(error).strip().splitlines()[-1]})"


class _OneLine(logging.Filter):
    """Of a record with a traceback the first and the last line, and no record twice."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Shortens the record; whether it is new."""
        lines = record.getMessage().strip().splitlines()
        cause = str(record.exc_info[1]) if record.exc_info and record.exc_info[1] else lines[-1]
        text = " ".join(dict.fromkeys((lines[0], cause)))
        record.msg, record.args, record.exc_info = text, (), None
        is_new = text not in self._said
        self._said.add(text)
        return is_new


def shorten_ray() -> None:
    """Leaves of Ray's own words what a sweep does not say itself."""
    # A traceback for each lost process, and the names of the trials that failed.
    for name in ("ray.tune.execution.tune_controller", "ray.tune.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # A resumed sweep has trials that have not begun, each of which is warned of.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    for name in ("ray.train._internal.syncer", "ray.tune.execution.experiment_state"):
        logging.getLogger(name).addFilter(_OneLine())


def _place(result: dict[str, Any]) -> str:
    return f"step {result.get(STEP, 0)}, loss {_short(result.get(RUNG_METRIC))}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
