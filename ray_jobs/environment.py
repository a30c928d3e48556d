"""What workers get of the driver: its variables, as arguments, and its code.

Ray writes runtime environments into its logs and shows them in its dashboard; a token would stand there.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HOME")
# MLFLOW_RUN_ID names the one run of a process, which is not a worker's.
_LEFT_HERE = ("MLFLOW_RUN_ID", "MLFLOW_RUN_NAME")


def travelling_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that models, data and the run record are reached by, as far as they are set."""
    return {
        name: value
        for name, value in environment.items()
        if name in _NAMES or (name.startswith("MLFLOW_") and name not in _LEFT_HERE)
    }


def has_travelled() -> bool:
    """Whether Ray brings this checkout to every node: `ray job submit --working-dir`."""
    return "working_dir" in _job_runtime_env()


def code_for_workers(root: Path) -> dict[str, Any] | None:
    """A runtime environment by which workers of this machine find ray_jobs.

    None where the job brings it: its checkout, or a PYTHONPATH of its own, beside which Ray takes no other.
    """
    job = _job_runtime_env()
    if "working_dir" in job or "PYTHONPATH" in job.get("env_vars", {}):
        return None
    return {"env_vars": {"PYTHONPATH": python_path(root, os.environ)}}


def python_path(root: Path, environment: Mapping[str, str]) -> str:
    """PYTHONPATH with the repository's root in front."""
    return os.pathsep.join(filter(None, [str(root), environment.get("PYTHONPATH")]))


def _job_runtime_env() -> dict[str, Any]:
    """Of the job that this driver is; empty for one that `ray job submit` did not start."""
    return json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env", {})
