"""MLflow runs of a sweep: one parent, one child a trial, each made once and found again after a retry or a resume."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qvl.errors import UserError
from qvl.mlflow_store import Store

if TYPE_CHECKING:
    from mlflow.entities import Run

PARENT_TAG = "mlflow.parentRunId"
TRIAL_TAG = "ray_trial"
# Together about a minute, in which a server restarts.
_PAUSES_SECONDS = (1, 2, 4, 8, 16, 32)
T = TypeVar("T")


def with_patience(call: Callable[[], T]) -> T:
    """Calls again, with growing pauses, while MLflow does not answer; then lets the error through."""
    for seconds in _PAUSES_SECONDS:
        try:
            return call()
        except Exception as error:
            print(f"MLflow does not answer ({type(error).__name__}); trying again in {seconds} s.", flush=True)
            time.sleep(seconds)
    return call()


def open_store() -> Store:
    """The store of MLFLOW_TRACKING_URI, which a sweep sets for its trials."""
    return Store(Path("outputs"))


def find_or_make_child(store: Store, recipe: str, parent_id: str, trial_id: str, axes: Mapping[str, Any]) -> "Run":
    """The MLflow run of a trial, in the experiment of its recipe.

    Args:
        store: where.
        recipe: the recipe's name.
        parent_id: of the sweep's run.
        trial_id: Ray's name of the trial, which its retries share.
        axes: what the trial varies; they make the name of a new run.
    """
    with store.lock():
        experiment_id = store.experiment_id(recipe)
    found = children(store, experiment_id, parent_id, trial_id)
    if found:
        return found[0]
    name = " ".join(
        f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in axes.items()
    )
    tags = {PARENT_TAG: parent_id, TRIAL_TAG: trial_id}
    return store.client.create_run(experiment_id, run_name=name, tags=tags)


def as_recorded(child: "Run", axes: Mapping[str, float]) -> dict[str, float]:
    """The axes that a trial of a population began with, where they are recorded.

    A parameter of MLflow cannot change. What a population changes later shows in the metric learning_rate.
    """
    return {name: float(child.data.params.get(name, value)) for name, value in axes.items()}


def children(store: Store, experiment_id: str, parent_id: str, trial_id: str | None = None) -> list["Run"]:
    """The runs of a sweep's trials, or of one trial."""
    wanted = f"tags.`{PARENT_TAG}` = '{parent_id}'"
    if trial_id is not None:
        wanted += f" and tags.{TRIAL_TAG} = '{trial_id}'"
    found, token = [], None
    while True:
        page = store.client.search_runs([experiment_id], wanted, max_results=500, page_token=token)
        found += list(page)
        token = page.token
        if not token:
            return found


def require_reachable_by_all(store: Store, machines: set[str]) -> None:
    """Stops a sweep over several machines that would record into a file of one.

    Raises:
        UserError: with the command that starts a server.
    """
    if len(machines) < 2 or store.uri.startswith(("http://", "https://", "databricks")):
        return
    if not store.uri.startswith(("sqlite:", "file:", "/", ".")):
        return  # a database server
    host = sorted(machines)[0]
    backend = store.uri if store.uri.startswith("sqlite:") else "sqlite:///mlflow.db"
    raise UserError(
        f"{store.uri} is a file of one machine, and this cluster has {len(machines)}: {', '.join(sorted(machines))}. "
        f"Start a server where all of them reach it, for one on {host}:\n\n"
        f"  mlflow server --host 0.0.0.0 --port 5000 --allowed-hosts {host}:5000,localhost:5000 "
        f"--backend-store-uri {backend}\n  export MLFLOW_TRACKING_URI=http://{host}:5000\n\n"
        "and start the sweep again."
    )


def use_child(run: "Run") -> None:
    """Makes the next run of this process continue a child instead of making an MLflow run of its own."""
    os.environ["MLFLOW_RUN_ID"] = run.info.run_id
