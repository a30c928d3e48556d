"""Where a run comes from: commit, GPU, command, user. Tags of the run record, free of secrets."""

import getpass
import os
import shlex
import subprocess
import sys
from pathlib import Path

from qvl.redaction import REDACTED, is_secret_key, redact


def provenance_tags() -> dict[str, str]:
    """Facts about this process.

    Returns:
        `gpu` (the device's name, or "cpu"), `command`, MLflow's own names for script and user, and, if the script (in
        an interactive session the working directory) lies in a git repository, `git_commit` and `git_dirty`
        ("true" where tracked files were changed or new ones were not added).
    """
    script = Path(sys.argv[0]).absolute()
    tags = {
        "gpu": _gpu_name(),
        "command": command_line(),
        "mlflow.source.name": str(script),
        "mlflow.source.type": "LOCAL",
        "mlflow.user": _user_name(),
    }
    folder = script.parent if script.is_file() else Path.cwd()
    commit = _git(folder, "rev-parse", "HEAD")
    if commit:
        changes = _git(folder, "status", "--porcelain")
        tags |= {"git_commit": commit, "git_dirty": "true" if changes else "false", "mlflow.source.git.commit": commit}
    return tags


def command_line() -> str:
    """The command that started this process, quoted for a shell, without secrets."""
    words = list(sys.argv)
    for index, word in enumerate(words[:-1]):
        # The value as one word, whatever it holds: in the joined text it would end at the first blank.
        if word.startswith("-") and is_secret_key(word.lstrip("-")):
            words[index + 1] = REDACTED
    return redact(shlex.join([Path(sys.executable).name, *words]))


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _gpu_name() -> str:
    # Slow to import, and loaded already by whoever has a run to record.
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's numeric user without an entry in passwd
        return str(os.getuid())
