"""What became of each trial, as rows of a table and as a plot."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure
from ray.tune import Result, ResultGrid

from ray_jobs.search import RUNG_METRIC, STEP

STATES = FINISHED, FAILED, PRUNED, NOT_STARTED = "finished", "failed", "pruned", "not started"


@dataclass(frozen=True)
class Outcome:
    """One trial.

    Attributes:
        trial_id: Ray's name of it.
        axes: its flags by name.
        state: finished, failed, pruned (by the scheduler, or at the end of the time budget) or not started.
        score: the sweep's metric; None unless finished, and where it is no number.
        step: the last training step that was reported.
        loss: the last training loss that was reported.
        seconds: it took, retries counted in.
        reason: of a failure.
        losses: (step, loss) at each report.
        result: Ray's.
    """

    trial_id: str
    axes: dict[str, Any]
    state: str
    score: float | None
    step: int | None
    loss: float | None
    seconds: float
    reason: str = ""
    losses: list[tuple[int, float]] = field(default_factory=list)
    result: Result | None = None

    def row(self, metric: str) -> dict[str, Any]:
        """The trial as a row of the table."""
        numbers = {
            metric: self.score,
            "last_step": self.step,
            "last_loss": self.loss,
            "seconds": round(self.seconds, 1),
        }
        return {"trial": self.trial_id, "state": self.state, **self.axes, **numbers, "reason": self.reason}


def outcomes(grid: ResultGrid, metric: str, mode: str) -> list[Outcome]:
    """All trials of a sweep, the best first, the unfinished last."""
    found = [_outcome(grid[index], metric) for index in range(len(grid))]
    sign = -1 if mode == "max" else 1
    return sorted(found, key=lambda trial: (trial.score is None, sign * (trial.score or 0.0), trial.trial_id))


def _outcome(result: Result, metric: str) -> Outcome:
    last = result.metrics or {}
    losses = _losses(result)
    state, reason = PRUNED, ""
    if result.error is not None:
        state, reason = FAILED, str(result.error).strip().splitlines()[-1]
    elif last.get("failure"):
        state, reason = FAILED, last["failure"]
    elif last.get("is_finished"):
        state = FINISHED
    elif "config" not in last:  # which Ray asks a trial's actor for, also before there is a report
        state = NOT_STARTED
    score = last.get(metric) if state == FINISHED else None
    if score is not None and math.isnan(score):
        score = None  # neither better nor worse than any other
    step, loss = losses[-1] if losses else (None, None)
    seconds = float(last.get("time_total_s", 0.0))
    trial_id = last.get("trial_id") or str(result.path).rpartition("/")[2].split("_")[1]
    return Outcome(trial_id, dict(result.config or {}), state, score, step, loss, seconds, reason, losses, result)


def _losses(result: Result) -> list[tuple[int, float]]:
    frame = result.metrics_dataframe
    if frame is None or STEP not in frame or RUNG_METRIC not in frame:
        return []
    rows = frame[[STEP, RUNG_METRIC]].dropna().itertuples(index=False)
    return [(int(step), float(loss)) for step, loss in rows]


def table_lines(trials: Sequence[Outcome], metric: str) -> list[str]:
    """The table for the screen."""
    rows = [trial.row(metric) for trial in trials]
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names] + [[_text(row.get(name)) for name in names] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw_trials(trials: Sequence[Outcome], metric: str) -> bytes:
    """A PNG: the training loss of each trial, and the score over each axis that is a number."""
    numeric = [
        name
        for name in (trials[0].axes if trials else {})
        if all(isinstance(trial.axes.get(name), int | float) for trial in trials)
    ]
    figure = Figure(figsize=(4.5 * (1 + len(numeric)), 3.6), layout="constrained")
    plots = figure.subplots(1, 1 + len(numeric), squeeze=False)[0]
    for trial in trials:
        style = {FINISHED: "-", PRUNED: ":"}.get(trial.state, "--")
        if trial.losses:
            plots[0].plot(*zip(*trial.losses, strict=True), style, label=trial.trial_id)
    plots[0].set(xlabel="training step", ylabel="training loss", title="dotted: pruned, dashed: failed")
    scored = [trial for trial in trials if trial.score is not None]
    for name, plot in zip(numeric, plots[1:], strict=True):
        values = [trial.axes[name] for trial in scored]
        plot.plot(values, [trial.score for trial in scored], "o")
        if values and min(values) > 0 and max(values) / min(values) > math.e**2:
            plot.set_xscale("log")
        plot.set(xlabel=name, ylabel=metric, title="finished trials")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
