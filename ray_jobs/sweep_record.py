"""The MLflow run of a sweep, above those of its trials; and that theirs say the truth in the end."""

import csv
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qvl.mlflow_store import Store
from qvl.provenance import provenance_tags
from qvl.redaction import redact
from ray_jobs.children import TRIAL_TAG, children, with_patience
from ray_jobs.outcome import FAILED, FINISHED, STATES, Outcome, draw_trials

_STATUS = {FINISHED: "FINISHED", FAILED: "FAILED"}


class SweepRecord:
    """The parent run.

    Attributes:
        run_id: MLflow's id of it.
        store: where it is.
        where_to_look: its page, or the command that shows it.
    """

    def __init__(self, store: Store, recipe: str, name: str, run_id: str | None, params: Mapping[str, Any]) -> None:
        """Opens it, or with `run_id` continues it.

        Args:
            store: reached already.
            recipe: names the experiment.
            name: of the sweep.
            run_id: of a sweep that is resumed.
            params: what defines the sweep; secrets are redacted.
        """
        self.store = store
        with store.lock():
            self._experiment_id = store.experiment_id(recipe)
        if run_id is None:
            tags = {"recipe": recipe, "sweep": name, **provenance_tags()}
            run = store.client.create_run(self._experiment_id, run_name=name, tags=redact(tags))
            for key, value in redact({key: str(value) for key, value in params.items()}).items():
                store.client.log_param(run.info.run_id, key, value)
        else:
            store.client.update_run(run_id, status="RUNNING")
            run = store.client.get_run(run_id)
        self.run_id = str(run.info.run_id)
        self.where_to_look = store.where_to_look(run)

    def settle(self, trials: Sequence[Outcome], metric: str) -> None:
        """Makes the trials' runs say what became of them, sends numbers that are missing, and adds table and plot.

        Raises:
            Exception: MLflow's, after a minute without an answer.
        """
        with_patience(lambda: self._settle(trials, metric))

    def _settle(self, trials: Sequence[Outcome], metric: str) -> None:
        client = self.store.client
        runs = {run.data.tags[TRIAL_TAG]: run for run in children(self.store, self._experiment_id, self.run_id)}
        for trial in trials:
            run = runs.get(trial.trial_id)
            if run is None:
                continue  # it never started
            run_id, wanted = run.info.run_id, _STATUS.get(trial.state, "KILLED")
            numbers = {name: value for name, value in _numbers(trial).items() if name not in run.data.metrics}
            for name, value in numbers.items():
                client.log_metric(run_id, name, value)
            client.set_tag(run_id, "trial_state", trial.state)
            if trial.reason:
                client.set_tag(run_id, "error", redact(trial.reason))
            elif "error" in run.data.tags:
                client.delete_tag(run_id, "error")  # of a try before this one
            if run.info.status != wanted:
                client.set_terminated(run_id, wanted)
        rows = [trial.row(metric) for trial in trials]
        client.log_dict(self.run_id, {"trials": rows}, "trials.json")
        client.log_text(self.run_id, _csv(rows), "trials.csv")
        with tempfile.TemporaryDirectory() as scratch:
            picture = Path(scratch, "trials.png")
            picture.write_bytes(draw_trials(trials, metric))
            client.log_artifact(self.run_id, str(picture))
        scores = [trial.score for trial in trials if trial.score is not None]
        if scores:
            client.log_metric(self.run_id, f"best_{metric}", scores[0])
        for state in STATES:
            count = sum(trial.state == state for trial in trials)
            client.log_metric(self.run_id, f"num_{state.replace(' ', '_')}", count)

    def end(self, status: str) -> None:
        """Closes the parent: FINISHED, FAILED or KILLED."""
        with_patience(lambda: self.store.client.set_terminated(self.run_id, status))

    def kill_running_children(self) -> None:
        """The sweep was stopped from outside, and its trials with it."""
        for run in children(self.store, self._experiment_id, self.run_id):
            if run.info.status == "RUNNING":
                self.store.client.set_terminated(run.info.run_id, "KILLED")


def _numbers(trial: Outcome) -> dict[str, float]:
    """The run's metrics as Ray has them, without Ray's own; of a trial that ended well."""
    if trial.state != FINISHED or trial.result is None:
        return {}
    parts = ("baseline_", "finetuned_", "difference_", "train_", "cost_")
    found = {name: value for name, value in (trial.result.metrics or {}).items() if name.startswith(parts)}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names)
    writer.writeheader()
    writer.writerows({name: json.dumps(v) if isinstance(v, list) else v for name, v in row.items()} for row in rows)
    return buffer.getvalue()
