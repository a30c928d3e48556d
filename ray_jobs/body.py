"""The worker's side of a Ray job: a recipe as a process of its own, its output passed on while it runs."""

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ray_jobs.environment import python_path

_LOOK_SECONDS = 0.2


class Body:
    """Runs one recipe on the GPU that Ray has given to this worker. Made an actor by `ray_jobs.task`."""

    def __init__(self, file: str, driver_folder: str, travels: bool) -> None:
        """Finds the recipe on this node.

        Args:
            file: the recipe's file, relative to the driver's folder where it lies below it, else absolute.
            driver_folder: where the driver runs.
            travels: whether Ray has brought that folder here as the job's working directory.

        Raises:
            FileNotFoundError: it is not here.
        """
        self._folder = Path.cwd() if travels else Path(driver_folder)
        self._file = self._folder / file
        if not self._file.is_file():
            raise FileNotFoundError(
                f"{self._file} is not on node {os.uname().nodename}: run the job from the repository with "
                "`ray job submit --working-dir . -- ...`, which brings it to every node."
            )
        self._keeper: subprocess.Popen[bytes] | None = None
        self._is_stopped = False

    def node(self) -> str:
        """The node's name; answers once Ray has placed this actor."""
        return os.uname().nodename

    def run(self, words: Sequence[str], environment: Mapping[str, str]) -> Iterator[str | int]:
        """Runs the recipe.

        Args:
            words: its command line.
            environment: variables that go above this worker's own.

        Yields:
            What it prints, as it comes; at last its exit status.
        """
        variables = {**os.environ, **environment, "PYTHONUNBUFFERED": "1"}
        # With it a recipe asks Ray for a GPU, and this is the GPU.
        variables.pop("RAY_JOB_CONFIG_JSON_ENV_VAR", None)
        variables["PYTHONPATH"] = python_path(self._file.resolve().parents[1], variables)
        handle, log = tempfile.mkstemp(prefix="qvl-job-", suffix=".log")
        os.close(handle)
        command = [sys.executable, "-m", "ray_jobs.keeper", log, sys.executable, str(self._file), *words]
        self._keeper = subprocess.Popen(
            command, cwd=self._folder, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        if self._is_stopped:
            self.stop()
        status: list[bytes] = []
        waiting = threading.Thread(target=lambda: status.append(_read_all(self._keeper)), daemon=True)
        waiting.start()
        with open(log, encoding="utf-8", errors="replace", newline="") as file:
            while waiting.is_alive():
                waiting.join(_LOOK_SECONDS)
                if text := file.read():
                    yield text
            if text := file.read():
                yield text
        os.unlink(log)
        # Nothing to read: the keeper itself was killed.
        yield int(status[0] or 137)

    def stop(self) -> None:
        """Sends the recipe SIGTERM, upon which it saves a checkpoint and closes its records."""
        self._is_stopped = True
        if self._keeper is not None and self._keeper.stdin is not None:
            self._keeper.stdin.close()


def _read_all(process: "subprocess.Popen[bytes] | None") -> bytes:
    assert process is not None and process.stdout is not None
    process.wait()  # the keeper's first half, which only leaves the second one alone
    return process.stdout.read().strip()
