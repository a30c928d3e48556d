"""Which variables of the driver's environment its workers get, and how: as arguments, never in a runtime environment.

Ray writes runtime environments into its logs and shows them in its dashboard; a token would stand there.
"""

import os
from collections.abc import Mapping

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
