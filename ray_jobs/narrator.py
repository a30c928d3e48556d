"""What a sweep says while it runs: a line when a trial starts, ends, fails or is taken up again, and once a minute."""

import time
from typing import Any

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
        """Its actor or node is gone; there are retries left."""
        self._say(f"{trial.trial_id} lost its process or node; it goes on from its last checkpoint")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """No retries are left."""
        self._say(f"{trial.trial_id} failed for good: its process or node was lost too often")

    def _say(self, text: str) -> None:
        self._spoke_at = time.monotonic()
        print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def _place(result: dict[str, Any]) -> str:
    return f"step {result.get(STEP, 0)}, loss {_short(result.get(RUNG_METRIC))}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
