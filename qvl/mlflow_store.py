"""Reaching MLflow: which store, is it there, which experiment, a new run or one to continue."""

import logging
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from qvl.errors import StoreError, UserError, first_line
from qvl.redaction import redact, redact_known_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_REQUEST_TIMEOUT_SECONDS = "10"
_UPLOAD_TIMEOUT_SECONDS = "300"
_TIMEOUT_VARIABLE = "MLFLOW_HTTP_REQUEST_TIMEOUT"


class Store:
    """A tracking store: the one of MLFLOW_TRACKING_URI, else a SQLite file.

    Attributes:
        uri: as MLflow takes it.
        folder: absolute folder of a SQLite store, its artifacts and its lock; None for any other store.
        client: connected and tried.
    """

    def __init__(self, default_folder: Path) -> None:
        """Connects; a SQLite store is made if it is missing.

        Args:
            default_folder: folder of the SQLite store that is used without MLFLOW_TRACKING_URI.

        Raises:
            StoreError: the store cannot be read, or its server does not answer within about 20 seconds.
        """
        self.uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{default_folder.absolute() / 'mlflow.db'}"
        is_sqlite = self.uri.startswith("sqlite:///")
        self.folder = Path(self.uri.removeprefix("sqlite:///")).absolute().parent if is_sqlite else None
        _set_environment()
        try:
            self.client = self._connect()
        except Exception as error:
            raise self.unusable(error) from error

    def _connect(self) -> "MlflowClient":
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        with self.lock():
            client = MlflowClient(tracking_uri=self.uri)
            client.search_experiments(max_results=1)
        return client

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One process at a time creates a SQLite store or an experiment in it."""
        if self.folder is None:
            yield
            return
        from filelock import FileLock

        with FileLock(self.folder / ".mlflow.lock"):
            yield

    def unusable(self, error: Exception) -> StoreError:
        """Says in one line that this store cannot be used, and why."""
        uri, reason = redact_known_secrets(self.uri), redact(_reason(error))
        if os.environ.get("MLFLOW_TRACKING_URI"):
            return StoreError(
                f"the MLflow store at MLFLOW_TRACKING_URI={uri} cannot be used: {reason}. Start or correct it, or "
                "unset MLFLOW_TRACKING_URI to record into a local SQLite file."
            )
        return StoreError(f"the MLflow store {uri} cannot be used: {reason}.")

    def run_url(self, run: "Run") -> str | None:
        """Address of the run's page on a tracking server, None without one."""
        if urlsplit(self.uri).scheme not in ("http", "https"):
            return None
        page = f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
        return redact_known_secrets(f"{self.uri.rstrip('/')}/{page}")

    def where_to_look(self, run: "Run") -> str:
        """The page of a run where there is a server, else the command that shows the store in MLflow's UI."""
        return self.run_url(run) or self.ui_command()

    def ui_command(self) -> str:
        """The command that shows a store without a server in MLflow's UI."""
        own_mlflow = Path(sys.executable).parent / "mlflow"
        found = shutil.which("mlflow")
        is_on_path = found is not None and Path(found).absolute() == own_mlflow.absolute()
        program = "mlflow" if is_on_path else os.path.relpath(own_mlflow)
        return shlex.join([program, "ui", "--backend-store-uri", redact_known_secrets(self.uri)])

    def holds(self, path: Path) -> bool:
        """True if `path` is a file of the SQLite store itself."""
        if self.folder is None:
            return False
        return path.is_relative_to(self.folder / "mlartifacts") or (
            path.parent == self.folder and path.name.startswith("mlflow.db")
        )

    def start_run(self, recipe: str, run_name: str, params: Mapping[str, str]) -> "Run":
        """Creates a run, or continues that of MLFLOW_RUN_ID, as a process started by `mlflow run` has to.

        Args:
            recipe: names the experiment unless MLFLOW_EXPERIMENT_NAME or MLFLOW_EXPERIMENT_ID do.
            run_name: of a new run.
            params: what the run is going to record, to be compared with what a continued run has recorded.

        Raises:
            UserError: the experiment was deleted, or the run to continue is missing or had other parameters.
        """
        run_id = os.environ.get("MLFLOW_RUN_ID")
        if not run_id:
            with self.lock():
                experiment_id = self.experiment_id(recipe)
            return self.client.create_run(experiment_id, run_name=run_name)
        run = self.recorded_run(run_id, params)
        self.client.update_run(run_id, status="RUNNING")
        return run

    def recorded_run(self, run_id: str, params: Mapping[str, str]) -> "Run":
        """A run that is there, to go on with or to add to.

        Raises:
            UserError: it is missing or had other parameters.
        """
        try:
            run = self.client.get_run(run_id)
        except Exception as error:
            raise UserError(
                f"MLFLOW_RUN_ID={run_id} cannot be continued: {redact(_reason(error))}. Unset it to get a new run."
            ) from error
        _check_continued_params(run, params)
        return run

    def experiment_id(self, recipe: str) -> str:
        """The experiment that runs of a recipe go to; made if it is missing. To be called under `lock`."""
        from mlflow.exceptions import MlflowException

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME")
        if not name and os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return os.environ["MLFLOW_EXPERIMENT_ID"]
        name = name or recipe
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            location = None if self.folder is None else (self.folder / "mlartifacts" / name).as_uri()
            try:
                return self.client.create_experiment(name, artifact_location=location)
            except MlflowException:
                # On a server, which has no lock, another process may have made it between the two calls.
                experiment = self.client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        if experiment.lifecycle_stage == "deleted":
            raise UserError(
                f"the MLflow experiment {name!r} was deleted; restore it (mlflow experiments restore --experiment-id "
                f"{experiment.experiment_id}) or set MLFLOW_EXPERIMENT_NAME to another name."
            )
        return experiment.experiment_id


@contextmanager
def upload_timeout() -> Iterator[None]:
    """Gives a server time to pass an adapter of some hundred MB on to its own storage before it answers."""
    if os.environ.get(_TIMEOUT_VARIABLE) != _REQUEST_TIMEOUT_SECONDS:
        yield  # the user's own setting
        return
    os.environ[_TIMEOUT_VARIABLE] = _UPLOAD_TIMEOUT_SECONDS
    try:
        yield
    finally:
        os.environ[_TIMEOUT_VARIABLE] = _REQUEST_TIMEOUT_SECONDS


def _set_environment() -> None:
    """Sets what MLflow reads from the environment at each request, unless the user has."""
    # MLflow's defaults (120 s, 7 retries with growing pauses) would stall the first call, and later each training
    # step, for minutes.
    os.environ.setdefault(_TIMEOUT_VARIABLE, _REQUEST_TIMEOUT_SECONDS)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    # Runs need no network; MLflow's usage reports would.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # The recipe prints where the run is, once; MLflow would at the end of every run.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")


def _reason(error: Exception) -> str:
    text = first_line(error)
    # requests nests four classes' names and object addresses around the one thing that matters.
    refused = re.search(r"(?:\[Errno -?\d+\] |timed out|Failed to resolve)[^()'\"]*", text)
    return (refused[0] if refused else text).strip(" .:")


def _check_continued_params(run: "Run", params: Mapping[str, str]) -> None:
    """MLflow's parameters cannot change: a run continued with other settings would lie about one of the two."""
    for name, text in params.items():
        recorded = run.data.params.get(name, text)
        if recorded != text and not _are_equal_numbers(recorded, text):
            raise UserError(
                f"MLFLOW_RUN_ID={run.info.run_id} names a run with {name}={recorded}, this one has {name}={text}. "
                "Unset MLFLOW_RUN_ID to get a new run, or use the same settings."
            )


def _are_equal_numbers(left: str, right: str) -> bool:
    try:
        return float(left) == float(right)
    except ValueError:
        return False
