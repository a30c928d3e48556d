"""Commands under a time limit: their output goes to a file, and no process of theirs is left behind."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
_TAIL_LINES = 30
_MOST_SECONDS_TO_DIE = 20


def run_limited(
    command: Sequence[str], log: Path, seconds: float, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Runs a command in the root of the checkout, its output behind what `log` holds; kills all of it at the limit.

    Returns:
        `status` ("done", "failed with CODE" or "stopped"), `seconds`, and the `tail` of what it said where not done.
    """
    start = time.monotonic()
    with log.open("ab") as file:
        file.write(f"\n$ {shlex.join(command)}\n".encode())
        file.flush()
        begin = file.tell()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {}), "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            # Never a pipe: torch's compile workers would hold it open when the rest is gone.
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=max(0.0, seconds))
            status = "done" if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            status = "stopped"
        finally:
            _kill_family(process)
    record: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - start, 1)}
    if status != "done":
        record["tail"] = _tail(log, begin)
    return record


def end_on_sigterm() -> None:
    """Has SIGTERM end this process as Ctrl-C does, so that the command it waits for is killed too."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def _kill_family(process: subprocess.Popen[bytes]) -> None:
    """Its process group and all descendants: launchers give their workers sessions of their own."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    # Killed is not gone yet: the next command wants their memory.
    psutil.wait_procs(family, timeout=_MOST_SECONDS_TO_DIE)


def _tail(log: Path, begin: int) -> list[str]:
    with log.open("rb") as file:
        file.seek(begin)
        return [line[-400:] for line in file.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]]
