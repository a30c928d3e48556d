"""A recipe as a user starts it."""

import resource
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_LIMIT_SECONDS = 600


def recipe_command(recipe: str, *flags: str) -> tuple[str, float]:
    """Runs a recipe's file to its good end.

    Returns:
        What it printed, and the processor seconds it took: others may be using the cores.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, f"recipes/{recipe}.py", *flags],
        cwd=_ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=_LIMIT_SECONDS,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
