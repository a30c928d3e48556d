"""Settings and fixtures for all tests."""

import os
from pathlib import Path

import pytest

# Before any test module imports a library that reads them: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

_PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def project() -> Path:
    """The root of the checkout."""
    return _PROJECT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photos and reference numbers that is not part of the project."""
    folder = Path(os.environ.get("QVL_SHARED", _PROJECT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no folder {folder} (environment variable QVL_SHARED)")
    return folder
