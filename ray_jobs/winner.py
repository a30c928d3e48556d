"""The best trial's baseline, report and adapter: run once, after the sweep, and put on the sweep's MLflow run."""

import os
import runpy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvl.mlflow_store import Store
from qvl.recipe import run
from ray_jobs.children import as_recorded, find_or_make_child, open_store
from ray_jobs.trial import Plan


def report_winner(
    plan: Plan, trial_id: str, axes: Mapping[str, Any], checkpoint: Any, environment: Mapping[str, str]
) -> None:
    """Compares the best trial with the base model. Runs as a Ray task on a GPU.

    The trial's MLflow run gets numbers and files in addition, and goes on to say of itself what the trial did. The
    adapter is on the sweep's run before the comparison, which may fail.

    Args:
        plan: of the sweep.
        trial_id: the best trial's.
        axes: its flags.
        checkpoint: Ray's, of its finished run folder.
        environment: of the driver.
    """
    os.environ.update(environment)
    file = plan.enter()
    store = open_store()
    child = find_or_make_child(store, plan.recipe, plan.parent_id, trial_id, axes)
    if plan.changes_learning_rate:
        axes = as_recorded(child, axes)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "winner")
        checkpoint.to_directory(str(folder))
        _put_on_run(store, plan.parent_id, folder, "adapter", "metrics.json", "settings.yaml")
        recipe = runpy.run_path(str(file))["RECIPE"]
        words = [*plan.words, "--stages", "baseline", "report"]
        run(recipe, {**axes, "output_dir": str(folder)}, words, adds_to_run=child.info.run_id)
        _put_on_run(store, plan.parent_id, folder, "metrics.json", "report.html")


def _put_on_run(store: Store, run_id: str, folder: Path, *names: str) -> None:
    """Uploads what there is of these files and folders of a run folder."""
    for name in names:
        path = folder / name
        if path.is_dir():
            store.client.log_artifacts(run_id, str(path), name)
        elif path.is_file():
            store.client.log_artifact(run_id, str(path))
