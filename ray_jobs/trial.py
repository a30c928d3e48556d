"""A trial of a sweep as Ray Tune runs it: an actor that keeps the base model from trial to trial."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.result import DONE, SHOULD_CHECKPOINT

from qvl.kept_base import KeptBase
from ray_jobs.children import as_recorded, find_or_make_child, open_store, use_child, with_patience
from ray_jobs.learning_rate import set_learning_rate
from ray_jobs.trial_run import Report, TrialRun

# Before the sweep's command line, which may name others.
DEFAULT_STAGES = ("--stages", "train", "evaluate")


# On a worker that is Ray's copy of the repository, where there is one.
_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Plan:
    """What all trials of a sweep have in common.

    Attributes:
        file: the recipe's file, from the root of the repository.
        recipe: its name.
        words: its command line.
        folder: where the driver runs; None where Ray has brought the repository, which then is the place.
        parent_id: MLflow run of the sweep.
        changes_learning_rate: population based training changes it in the course of a trial.
    """

    file: str
    recipe: str
    words: tuple[str, ...]
    folder: str | None
    parent_id: str
    changes_learning_rate: bool = False

    def enter(self) -> Path:
        """Goes where relative paths of the command line begin; returns the recipe's file on this node."""
        os.chdir(self.folder or _ROOT)
        return _ROOT / self.file


class RecipeTrial(tune.Trainable):
    """Runs a recipe with one point of the space above its command line."""

    def setup(self, config: dict[str, Any], plan: Plan, environment: Mapping[str, str]) -> None:
        """Called once an actor.

        Args:
            config: flags by name.
            plan: what the trials have in common.
            environment: of the driver, see `ray_jobs.environment`.
        """
        os.environ.update(environment)
        self._plan = plan
        self._file = plan.enter()
        self._kept = KeptBase()
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial on this GPU."""
        self._run.stop()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Trains up to the next report.

        Raises:
            RuntimeError: MLflow does not answer, or this process is of no more use; Ray takes the trial up again in
                another one, `--max_failures` times.
        """
        report = self._already_finished() if not self._is_prepared else None
        report = report or self._run.next_report()
        if report.may_go_well_again:
            raise RuntimeError(report.failure)
        return {
            **report.numbers,
            "failure": report.failure,
            "is_finished": report.is_last and not report.failure,
            DONE: report.is_last,
            SHOULD_CHECKPOINT: report.has_checkpoint,
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """The run folder as it is: small files, and the newest checkpoint or the adapter."""
        if self._folder.is_dir():
            shutil.copytree(self._folder, checkpoint_dir, dirs_exist_ok=True)

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """A run folder to go on with, of this trial or of a better one of the population."""
        shutil.rmtree(self._folder, ignore_errors=True)
        shutil.copytree(checkpoint_dir, self._folder)
        if self._plan.changes_learning_rate:
            set_learning_rate(self._folder / "checkpoints", self._axes["learning_rate"])

    def cleanup(self) -> None:
        """The actor ends."""
        self._run.stop()

    def _begin(self, config: Mapping[str, Any]) -> None:
        self._axes = dict(config)
        self._folder = Path(self.logdir) / "run"
        shutil.rmtree(self._folder, ignore_errors=True)
        self._is_prepared = False
        self._run = self._new_run({})

    def _already_finished(self) -> Report | None:
        """Finds or makes the trial's MLflow run; what it says if the trial has ended well before.

        A driver that is killed may not have noted yet what had finished; MLflow has the numbers and the adapter.
        """
        store = with_patience(open_store)
        child = with_patience(
            lambda: find_or_make_child(store, self._plan.recipe, self._plan.parent_id, self.trial_id, self._axes)
        )
        axes = as_recorded(child, self._axes) if self._plan.changes_learning_rate else self._axes
        use_child(child)
        self._folder.mkdir(exist_ok=True)
        self._run = self._new_run(axes)
        self._is_prepared = True
        if child.info.status != "FINISHED":
            return None
        store.client.download_artifacts(child.info.run_id, "", str(self._folder))
        return Report(dict(child.data.metrics), is_last=True)

    def _new_run(self, axes: Mapping[str, Any]) -> TrialRun:
        overrides = {**axes, "output_dir": str(self._folder)}
        if any((self._folder / "checkpoints").glob("checkpoint-*")):
            overrides["resume_from_checkpoint"] = "true"
        words = [*DEFAULT_STAGES, *self._plan.words]
        return TrialRun(self._file, words, overrides, self._kept, self._folder / "trial.txt")
