"""Vision features on disk: one memory-mapped file an image, shared by processes and runs, under a size limit."""

import contextlib
import itertools
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import get_worker_info

from qvl.errors import UserError
from qvl.files import write_json_atomically
from qvl.image_refs import cache_folder

# What safetensors writes around the numbers of one image, rounded up.
_HEADER_BYTES = 256
_SPARE_DISK_GIB = 1.0


@dataclass(frozen=True)
class ImageFeatures:
    """One image's features: small enough for a table cell and a worker's queue, read when a batch is made.

    Attributes:
        path: the file, absolute.
        num_tokens: visual tokens, which is how many placeholders it takes in the text.
        grid_thw: patches in time, height and width, for families that place tokens by it; None for the others.
    """

    path: str
    num_tokens: int
    grid_thw: tuple[int, int, int] | None

    def load(self) -> torch.Tensor:
        """The features as they lie in the file, memory-mapped: (num_tokens, (1 + num_deepstack) * hidden_size).

        Raises:
            UserError: the file is gone or damaged since the run began.
        """
        try:
            with safe_open(self.path, "pt") as file:
                return file.get_tensor("features")
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"The cached vision features {self.path} cannot be read ({error}). Start the run again: what is "
                "missing is computed anew."
            ) from error


def default_folder() -> Path:
    """Where features are kept if nobody says otherwise."""
    return cache_folder() / "vision_features"


def dump_features(handles: Sequence[ImageFeatures]) -> str:
    """Handles as one JSON string, for a table column."""
    return json.dumps([(handle.path, handle.num_tokens, handle.grid_thw) for handle in handles])


def load_features(text: str) -> list[ImageFeatures]:
    """The inverse of `dump_features`; reads no features yet."""
    return [_handle(*fields) for fields in json.loads(text)]


def join_features(handles: Sequence[ImageFeatures]) -> torch.Tensor:
    """Reads the features of several images, one below the other.

    Returns:
        Shape (sum of num_tokens, (1 + num_deepstack) * hidden_size), in the dtype they were computed in.
    """
    parts = [handle.load() for handle in handles]
    joined = torch.empty((sum(handle.num_tokens for handle in handles), parts[0].shape[1]), dtype=parts[0].dtype)
    if get_worker_info() is not None:
        # A worker hands tensors on in shared memory: filling that at once saves copying 6 MB an image once more.
        joined = joined.share_memory_()
    torch.cat(parts, out=joined)
    return joined


class Claim:
    """The entries that a run uses. They are not evicted before `release`, or before the process ends."""

    # A claim that is forgotten must go on protecting its entries: data sets refer to them by path.
    _held: ClassVar[set["Claim"]] = set()

    def __init__(self, path: Path, sizes: Mapping[str, int]) -> None:
        """Writes the claim; whoever holds its lock is alive."""
        self._path = path
        self._lock = FileLock(_lock_path(path))
        self._lock.acquire()
        write_json_atomically(path, dict(sizes))
        self._held.add(self)

    def release(self) -> None:
        """Lets the entries be evicted by whoever needs the room."""
        self._held.discard(self)
        self._path.unlink(missing_ok=True)
        self._lock.release()
        _lock_path(self._path).unlink(missing_ok=True)


class FeatureStore:
    """A folder of features.

    Keys look like "namespace/image", where the namespace stands for the tower and the processing, and the image for
    the picture's bytes. Several processes may use one folder.

    Args:
        folder: made where it is missing.
        max_gib: most that the entries may fill.

    Raises:
        UserError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, max_gib: float) -> None:
        self.folder = folder.resolve()
        self.max_gib = max_gib
        self._claims = self.folder / "in-use"
        try:
            self._claims.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"The folder for vision features {folder} cannot be made ({error}): name another --vision_cache_dir."
            ) from error

    def claim(self, sizes: Mapping[str, int]) -> Claim:
        """Makes room for entries, which may be there already, and keeps them from being evicted.

        The entries that were not used for the longest time go first; those that a living process has claimed never.

        Args:
            sizes: bytes of features by key.

        Raises:
            UserError: they do not fit below the limit or on the disk.
        """
        wanted = {key: num_bytes + _HEADER_BYTES for key, num_bytes in sizes.items()}
        with FileLock(self.folder / ".lock"):
            claimed_elsewhere = self._claimed()
            present = self._present()
            needed = {**claimed_elsewhere, **wanted}
            self._require_limit(wanted, needed)
            self._evict({key: entry for key, entry in present.items() if key not in needed}, _gib(needed.values()))
            self._require_disk([num_bytes for key, num_bytes in needed.items() if key not in present])
            for key in wanted.keys() & present.keys():
                os.utime(self._path(key))
            return Claim(self._claims / f"{uuid.uuid4().hex}.json", wanted)

    @contextlib.contextmanager
    def writing(self, namespace: str) -> Iterator[Path]:
        """The right to compute a namespace's entries: a second process waits, then finds what the first one wrote.

        Yields:
            The namespace's folder.
        """
        folder = self.folder / namespace
        folder.mkdir(exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0.5)
        except Timeout:
            print("Vision features: waiting for another process that is computing them.", flush=True)
            lock.acquire()
        try:
            for half_written in folder.glob("*/.*"):
                half_written.unlink()
            yield folder
        finally:
            lock.release()

    def get(self, key: str) -> ImageFeatures | None:
        """An entry, or None where there is none or it is damaged."""
        path = self._path(key)
        try:
            with safe_open(path, "pt") as file:
                num_tokens, _ = file.get_slice("features").get_shape()
                return _handle(str(path), num_tokens, json.loads(file.metadata()["grid_thw"]))
        except (OSError, SafetensorError):
            return None

    def put(self, key: str, features: torch.Tensor, grid_thw: Sequence[int] | None) -> None:
        """Adds an entry, whole or not at all.

        Args:
            key: its key.
            features: (num_tokens, (1 + num_deepstack) * hidden_size), on the CPU.
            grid_thw: see `ImageFeatures`.

        Raises:
            UserError: the disk is full or refuses.
        """
        path = self._path(key)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(exist_ok=True)
            save_file({"features": features}, temporary, metadata={"grid_thw": json.dumps(grid_thw)})
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise UserError(
                f"Vision features cannot be written to {self.folder} ({error}): make room, or name another "
                "--vision_cache_dir."
            ) from error

    def _path(self, key: str) -> Path:
        namespace, image = key.split("/")
        return self.folder / namespace / image[:2] / f"{image}.safetensors"

    def _claimed(self) -> dict[str, int]:
        """Bytes by key of all that living processes use; what dead ones left behind is removed.

        A claim may be released at any moment, since that waits for nobody: then its files are gone.
        """
        claimed: dict[str, int] = {}
        for path in self._claims.glob("*.json"):
            lock = FileLock(_lock_path(path))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                with contextlib.suppress(FileNotFoundError):
                    claimed |= json.loads(path.read_text(encoding="utf-8"))
            else:
                path.unlink(missing_ok=True)
                lock.release()
                _lock_path(path).unlink(missing_ok=True)
        return claimed

    def _present(self) -> dict[str, tuple[int, float]]:
        """Bytes and time of the last use, by key."""
        return {
            f"{path.parts[-3]}/{path.stem}": (status.st_size, status.st_mtime)
            for path in self.folder.glob("*/*/[!.]*.safetensors")
            for status in [path.stat()]
        }

    def _require_limit(self, wanted: Mapping[str, int], needed: Mapping[str, int]) -> None:
        if _gib(needed.values()) <= self.max_gib:
            return
        others_gib = _gib(needed.values()) - _gib(wanted.values())
        others = f", and other running processes use {others_gib:.2f} GiB" if others_gib > 0 else ""
        raise UserError(
            f"The vision features of {len(wanted):,} images need {_gib(wanted.values()):.2f} GiB{others}; "
            f"--vision_cache_gib allows {self.max_gib:g}. Raise it, lower --max_pixels, use fewer images, or leave out "
            "--cache_vision_features."
        )

    def _require_disk(self, missing_bytes: Sequence[int]) -> None:
        free_gib = shutil.disk_usage(self.folder).free / 2**30
        if missing_bytes and _gib(missing_bytes) + _SPARE_DISK_GIB > free_gib:
            raise UserError(
                f"The vision features to compute need {_gib(missing_bytes):.2f} GiB, and {self.folder} has "
                f"{free_gib:.2f} GiB free ({_SPARE_DISK_GIB:g} is left untouched): make room, or name another "
                "--vision_cache_dir."
            )

    def _evict(self, unused: Mapping[str, tuple[int, float]], needed_gib: float) -> None:
        """Removes what was not used for the longest time until the rest fits."""
        oldest_first = sorted(unused, key=lambda key: unused[key][1])
        freed = list(itertools.accumulate((unused[key][0] / 2**30 for key in oldest_first), initial=0.0))
        # freed[n]: GiB that the n oldest hold.
        num_evicted = next(n for n, gib in enumerate(freed) if needed_gib + freed[-1] - gib <= self.max_gib)
        for key in oldest_first[:num_evicted]:
            self._path(key).unlink()
        if num_evicted:
            last_used = time.strftime("%Y-%m-%d %H:%M", time.localtime(unused[oldest_first[num_evicted - 1]][1]))
            print(
                f"Vision features: evicted those of {num_evicted:,} images ({freed[num_evicted]:.2f} GiB, last used "
                f"until {last_used}) to stay below --vision_cache_gib {self.max_gib:g}.",
                flush=True,
            )


def _handle(path: str, num_tokens: int, grid_thw: Sequence[int] | None) -> ImageFeatures:
    grid = None if grid_thw is None else (grid_thw[0], grid_thw[1], grid_thw[2])
    return ImageFeatures(path, num_tokens, grid)


def _lock_path(path: Path) -> Path:
    return path.with_suffix(".lock")


def _gib(num_bytes: Iterable[int]) -> float:
    return sum(num_bytes) / 2**30
