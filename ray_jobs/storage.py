"""Where a sweep lies, on a disk or in a bucket, and what its driver notes there for a later one."""

import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qvl.errors import UserError, first_line

_SWEEP_FILE = "sweep.json"
_STATE_FILE = re.compile(r"experiment_state-.*\.json")


def storage_address(path: str) -> str:
    """A `--storage_path` as Ray takes it: an address such as s3://..., or an absolute folder, which is made.

    Raises:
        UserError: it cannot be made.
    """
    if "://" in path:
        return path
    folder = Path(path).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--storage_path {path} cannot be made: {error.strerror}.") from error
    return str(folder)


def _file_system(storage: str) -> tuple[Any, str]:
    from pyarrow.fs import FileSystem

    return FileSystem.from_uri(storage)


@contextmanager
def _refusing(storage: str) -> Iterator[None]:
    """Says of a storage that gives or takes no file what is to be mended."""
    from pyarrow import ArrowException

    try:
        yield
    except (OSError, ArrowException) as error:
        raise UserError(
            f"--storage_path {storage} cannot be used ({first_line(error)}): correct it, or name a folder or a "
            "bucket that is there and has room."
        ) from error


def sweep_folder(storage: str, name: str, resume: str | None) -> tuple[str, dict[str, Any]]:
    """The name of the sweep's folder in the storage, and what an earlier driver has noted there.

    Args:
        storage: from `storage_address`.
        name: begins the folder's name.
        resume: None for a new sweep, "newest", or the name of a folder.

    Raises:
        UserError: there is nothing to resume, or the storage or what Ray kept there cannot be read.
    """
    if resume is None:
        return f"{name}_{time.strftime('%Y-%m-%d_%H-%M-%S')}", {}
    from pyarrow.fs import FileSelector

    with _refusing(storage):
        files, root = _file_system(storage)
        found = sorted(info.base_name for info in files.get_file_info(FileSelector(root, allow_not_found=True)))
    wanted = [folder for folder in found if folder == resume or (resume == "newest" and folder.startswith(f"{name}_"))]
    if not wanted:
        raise UserError(f"--resume {resume}: {storage} holds {', '.join(found) or 'no sweep'}.")
    try:
        with files.open_input_stream(f"{root}/{wanted[-1]}/{_SWEEP_FILE}") as file:
            noted = json.loads(file.read())
    except FileNotFoundError as error:
        raise UserError(f"{storage}/{wanted[-1]} has no {_SWEEP_FILE}: start the sweep again.") from error
    _require_state(files, f"{root}/{wanted[-1]}", noted["parent_id"])
    return wanted[-1], noted


def _require_state(files: Any, folder: str, parent_id: str) -> None:
    """Stops a resumption for which Ray would know of no trials: it would begin one without any axis."""
    from pyarrow.fs import FileSelector

    names = [info.base_name for info in files.get_file_info(FileSelector(folder))]
    newest = max((name for name in names if _STATE_FILE.fullmatch(name)), default=None)
    try:
        if newest is None:
            raise FileNotFoundError("it is missing")
        with files.open_input_stream(f"{folder}/{newest}") as file:
            json.loads(file.read())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: Ray's record of the trials cannot be read ({error}). Either the sweep ended before one was "
            f"written, or the disk was full. What has finished is below MLflow's run {parent_id}, adapters too; start "
            "the sweep again for the rest."
        ) from error


def make_sweep_folder(storage: str, folder: str) -> None:
    """Makes the folder of a new sweep, which shows whether the storage can be written to.

    Raises:
        UserError: it cannot.
    """
    with _refusing(storage):
        files, root = _file_system(storage)
        files.create_dir(f"{root}/{folder}", recursive=True)


def note_sweep(storage: str, folder: str, content: Mapping[str, Any]) -> None:
    """Leaves in a sweep's folder what a resumed sweep begins with.

    Raises:
        UserError: there is no room for it.
    """
    with _refusing(storage):
        files, root = _file_system(storage)
        with files.open_output_stream(f"{root}/{folder}/{_SWEEP_FILE}") as file:
            file.write(json.dumps(content).encode())
