"""Settings and fixtures for all tests."""

import os
from pathlib import Path

import pytest

# Before any test module imports a library that reads them: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Seconds in which a node of Ray has to be up; its own 30 are too few where all cores are busy with other tests.
os.environ["RAY_raylet_start_wait_time_s"] = "150"  # noqa: SIM112 (Ray spells it so)
# `make test` runs several processes: more threads than cores wait for each other (tiny models gain nothing by them).
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_PROJECT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, and all tests of a file in one process, which share what it trains.

    Without it the processes of `pytest -n` would each train a file's models, and end with one of them busy alone. The
    tests of Ray, which are one group and the longest, begin.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, item.get_closest_marker("xdist_group") is None))
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


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
