"""The best trial's baseline, report and adapter: run once, after the sweep, and put on the sweep's MLflow run."""

import os
import runpy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvl.recipe import run
from ray_jobs.children import as_recorded, find_or_make_child, open_store, use_child
from ray_jobs.trial import Plan


def report_winner(
    plan: Plan, trial_id: str, axes: Mapping[str, Any], checkpoint: Any, environment: Mapping[str, str]
) -> None:
    """Compares the best trial with the base model. Runs as a Ray task on a GPU.

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
    use_child(child)
    if plan.changes_learning_rate:
        axes = as_recorded(child, axes)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "winner")
        checkpoint.to_directory(str(folder))
        recipe = runpy.run_path(str(file))["RECIPE"]
        words = [*plan.words, "--stages", "baseline", "report"]
        run(recipe, {**axes, "output_dir": str(folder)}, words)
        for name in ("adapter", "report.html", "metrics.json", "settings.yaml"):
            path = folder / name
            if path.is_dir():
                store.client.log_artifacts(plan.parent_id, str(path), name)
            elif path.is_file():
                store.client.log_artifact(plan.parent_id, str(path))
