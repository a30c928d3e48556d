"""The MLflow run record: one run per invocation, opened and closed here, with a truthful status.

Everything goes through `MlflowClient` with the run's id, never through MLflow's global active run: a run that was not
opened here is neither written to nor ended, and several runs of one process (a sweep) cannot mix.
"""

import json
import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvl.errors import Terminated, UserError, first_line
from qvl.mlflow_store import Store, upload_timeout
from qvl.processes import is_main
from qvl.provenance import provenance_tags
from qvl.redaction import redact, redact_known_secrets

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run
    from PIL.Image import Image

# MLflow's own limits are 6000 for a parameter and 8000 for a tag (5000 before 2.12).
_MAX_PARAM_CHARACTERS = 6000
_MAX_TAG_CHARACTERS = 5000
_MAX_ENTITIES_PER_BATCH = 100
_MAX_METRICS_PER_BATCH = 1000
# After a failed write the server is left alone this long: one that hangs must not stall every training step.
_PAUSE_AFTER_FAILURE_SECONDS = 60.0
_FORBIDDEN_IN_METRIC_NAME = re.compile(r"[^\w\-. :/]")
_TEXT_SUFFIXES = {".json", ".jsonl", ".yaml", ".yml", ".txt", ".md", ".html", ".csv", ".jinja"}
_PREDICTIONS_TABLE = "predictions.json"


class RunRecord:
    """A running MLflow run. What does not reach the store while training is warned of once and never raised.

    Attributes:
        run_id: MLflow's id of the run.
        run_url: address of the run's page, None for a store without a server.
        ui_command: what to type (or, with a server, the address to open) to see the run.
    """

    def __init__(self, store: Store, run: "Run") -> None:
        """Wraps a run that `store` has started."""
        self._store = store
        self._pending_metrics: list[Metric] = []
        self._uploaded: dict[Path, tuple[int, int]] = {}
        self._retry_at_seconds = 0.0
        self._has_warned = False
        self.run_id: str = run.info.run_id
        self.run_url: str | None = store.run_url(run)
        self.ui_command: str = store.where_to_look(run)

    def log_metrics(self, metrics: Mapping[str, float | None], step: int | None = None) -> None:
        """Logs numbers; None is dropped, NaN and infinities are logged as MLflow shows them.

        While the store does not answer, the numbers are kept and sent with a later call or at the end of the run.

        Args:
            metrics: name to value, anything that `float()` takes; MLflow's forbidden characters in names become "_".
            step: training step; 0 for numbers of the whole run.
        """
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        for name, value in metrics.items():
            if value is not None:
                safe_name = _FORBIDDEN_IN_METRIC_NAME.sub("_", name)
                self._pending_metrics.append(Metric(safe_name, float(value), now_ms, step or 0))
        if time.monotonic() >= self._retry_at_seconds:
            self._send_metrics()

    def log_files(self, run_dir: Path) -> None:
        """Uploads the files of the run folder, `checkpoints/` and hidden (half-written) ones left out.

        A file that was uploaded before and has not changed since is not sent again.
        """
        for path in sorted(run_dir.absolute().rglob("*")):
            relative = path.relative_to(run_dir.absolute())
            is_hidden = any(part.startswith(".") for part in relative.parts)
            if not path.is_file() or is_hidden or relative.parts[0] == "checkpoints" or self._store.holds(path):
                continue
            state = (path.stat().st_mtime_ns, path.stat().st_size)
            if self._uploaded.get(path) == state:
                continue
            if not self._upload(path, relative.parent):
                return  # a server that hangs would hang at each file
            self._uploaded[path] = state

    def log_predictions(self, rows: list[dict[str, Any]]) -> None:
        """Logs the predictions as the table `predictions.json`, which MLflow's UI shows and compares between runs.

        Args:
            rows: one mapping per example, all with the keys of the first, such as id, references, baseline, finetuned.
        """
        if not rows:
            return
        columns = list(rows[0])
        table = {"columns": columns, "data": [[_clean(row[name]) for name in columns] for row in rows]}
        # What `log_table` writes, which would import pandas and append to the table of a continued run.
        marker = json.dumps([{"path": _PREDICTIONS_TABLE, "type": "table"}])
        with self._tolerating_failure():
            self._store.client.log_dict(self.run_id, table, _PREDICTIONS_TABLE)
            self._store.client.set_tag(self.run_id, "mlflow.loggedArtifacts", marker)

    def log_picture(self, picture: "Image", key: str, step: int) -> None:
        """Logs a picture of a training step; MLflow's UI shows those of one key behind a slider."""
        with self._tolerating_failure():
            self._store.client.log_image(self.run_id, picture, key=key, step=step, synchronous=True)

    def _describe(self, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        client = self._store.client
        recorded = client.get_run(self.run_id).data.params
        new_params = [Param(name, text) for name, text in params.items() if name not in recorded]
        for start in range(0, len(new_params), _MAX_ENTITIES_PER_BATCH):
            client.log_batch(self.run_id, params=new_params[start : start + _MAX_ENTITIES_PER_BATCH])
        texts = {name: _shortened(redact(text), _MAX_TAG_CHARACTERS) for name, text in tags.items()}
        client.log_batch(self.run_id, tags=[RunTag(name, text) for name, text in texts.items()])

    def _close(self, status: str, error: str | None = None) -> None:
        self._send_metrics()
        with self._tolerating_failure():
            if error is not None:
                self._store.client.set_tag(self.run_id, "error", _shortened(redact(error), _MAX_TAG_CHARACTERS))
            self._store.client.set_terminated(self.run_id, status)

    def _send_metrics(self) -> None:
        while self._pending_metrics:
            batch = self._pending_metrics[:_MAX_METRICS_PER_BATCH]
            with self._tolerating_failure():
                self._store.client.log_batch(self.run_id, metrics=batch)
                del self._pending_metrics[: len(batch)]
                continue
            return

    def _upload(self, path: Path, folder: Path) -> bool:
        artifact_path = None if folder == Path(".") else folder.as_posix()
        with self._tolerating_failure(), tempfile.TemporaryDirectory() as scratch, upload_timeout():
            source = _without_secrets(path, Path(scratch))
            self._store.client.log_artifact(self.run_id, str(source), artifact_path)
            return True
        return False

    @contextmanager
    def _tolerating_failure(self) -> Iterator[None]:
        """A tracking server that stumbles must not end hours of training: the run folder has the same numbers."""
        try:
            yield
        except Exception as error:
            self._retry_at_seconds = time.monotonic() + _PAUSE_AFTER_FAILURE_SECONDS
            if not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    f"MLflow did not take a record of this run ({redact(first_line(error))}). The run goes on, its "
                    "folder has every number; MLflow gets those that are missing if it answers again.",
                    stacklevel=4,
                )


class _Unrecorded(RunRecord):
    """What a process has that is not the main one of its run: takes everything and keeps nothing."""

    def __init__(self) -> None:
        self.run_id, self.run_url, self.ui_command = "", None, ""

    def log_metrics(self, metrics: Mapping[str, float | None], step: int | None = None) -> None:
        """Nothing."""

    def log_files(self, run_dir: Path) -> None:
        """Nothing."""

    def log_predictions(self, rows: list[dict[str, Any]]) -> None:
        """Nothing."""

    def log_picture(self, picture: "Image", key: str, step: int) -> None:
        """Nothing."""


@contextmanager
def open_run(
    recipe: str, run_dir: Path, params: Mapping[str, Any], store_dir: Path, tags: Mapping[str, str] | None = None
) -> Iterator[RunRecord]:
    """Opens the MLflow run of this invocation and closes it with the status that it deserves.

    FINISHED for a normal end (`SystemExit(0)` too), KILLED when interrupted (Ctrl-C, `qvl.errors.Terminated`), FAILED
    for any other exception, whose first line becomes the tag `error`. The exception goes on.

    MLflow's variables are honoured: MLFLOW_TRACKING_URI (default: SQLite `store_dir/mlflow.db` with the artifacts in
    `store_dir/mlartifacts`), MLFLOW_EXPERIMENT_NAME or _ID (default: the recipe's name), MLFLOW_RUN_NAME (default: the
    run folder's name). With MLFLOW_RUN_ID, as `mlflow run` sets it, that run is continued instead of a new one.

    Args:
        recipe: the recipe's name.
        run_dir: the run folder.
        params: what defines the experiment; secrets are redacted, values over 6000 characters cut.
        store_dir: folder of the default store, made if missing.
        tags: further tags, beside recipe, run_dir and those of `qvl.provenance`.

    Of several processes the main one alone has a run; the others get a record that keeps nothing.

    Raises:
        StoreError: the store or server cannot be used; raised before anything is yielded.
    """
    if not is_main():
        yield _Unrecorded()
        return
    texts = _param_texts(params)
    all_tags = {"recipe": recipe, "run_dir": str(run_dir.absolute()), **provenance_tags(), **(tags or {})}
    store = Store(store_dir)
    try:
        run = store.start_run(recipe, os.environ.get("MLFLOW_RUN_NAME") or run_dir.name, texts)
    except UserError:
        raise
    except Exception as error:
        raise store.unusable(error) from error
    record = RunRecord(store, run)
    try:
        _describe_or_refuse(store, record, texts, all_tags)
        yield record
    except (KeyboardInterrupt, Terminated):
        record._close("KILLED")
        raise
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (None, 0):
            record._close("FINISHED")
        else:
            record._close("FAILED", f"{type(error).__name__}: {first_line(error)}")
        raise
    record._close("FINISHED")


@contextmanager
def add_to_run(run_id: str, params: Mapping[str, Any], store_dir: Path) -> Iterator[RunRecord]:
    """Takes numbers and files into a run that has ended and stays as it ended: status, times, parameters and tags.

    Args:
        run_id: MLflow's id of the run.
        params: of what is added, which have to be those of the run where both have them.
        store_dir: as for `open_run`.

    Raises:
        StoreError: the store or server cannot be used.
        UserError: the run is missing or had other parameters.
    """
    if not is_main():
        yield _Unrecorded()
        return
    store = Store(store_dir)
    record = RunRecord(store, store.recorded_run(run_id, _param_texts(params)))
    try:
        yield record
    finally:
        record._send_metrics()


def _param_texts(params: Mapping[str, Any]) -> dict[str, str]:
    return {name: _shortened(str(value), _MAX_PARAM_CHARACTERS) for name, value in _clean(params).items()}


def _describe_or_refuse(store: Store, record: RunRecord, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
    try:
        record._describe(params, tags)
    except Exception as error:
        raise store.unusable(error) from error


def _clean(value: Any) -> Any:
    """Parameters go by their keys, prediction texts (data) only by the secrets known to this process."""
    if isinstance(value, Mapping):
        return redact(value)
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return redact_known_secrets(value) if isinstance(value, str) else value


def _without_secrets(path: Path, scratch: Path) -> Path:
    """`path` itself, or a copy without the secrets if it is a text file that holds any."""
    if path.suffix.lower() not in _TEXT_SUFFIXES:
        return path
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return path
    clean = redact_known_secrets(text)
    if clean == text:
        return path
    copy = scratch / path.name
    copy.write_text(clean, encoding="utf-8")
    return copy


def _shortened(text: str, max_characters: int) -> str:
    return text if len(text) <= max_characters else text[: max_characters - 1] + "…"
