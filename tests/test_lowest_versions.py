"""The oldest supported versions run the whole recipe (`make test` installs them into .lowest)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NUM_EVAL_EXAMPLES = 4


@pytest.fixture(scope="module")
def lowest_environment(project: Path) -> dict[str, str]:
    overlay = project / ".lowest"
    if not (overlay / "trl").is_dir():
        pytest.skip("no .lowest folder: `make test` installs it")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(overlay), str(project)]),
        # TRL 1.15 computes its loss by a Triton kernel on every device; 1.16 has a way without for CPUs.
        "TRITON_INTERPRET": "1",
    }


def pinned(requirements: Path) -> dict[str, str]:
    lines = requirements.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.slow
def test_the_smoke_runs_with_the_lowest_versions(
    project: Path, lowest_environment: dict[str, str], tmp_path: Path
) -> None:
    wanted = pinned(project / "environments" / "lowest.txt")
    del wanted["huggingface_hub"], wanted["fsspec"]
    run_folder = tmp_path / "run"
    options = f"--smoke --max_steps 2 --per_device_train_batch_size 2 --num_train_examples 8 --output_dir {run_folder}"
    options += f" --num_eval_examples {NUM_EVAL_EXAMPLES}"
    # The versions are asked of the process that ran the recipe, after it ran.
    code = (
        "import json, runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "try:\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stopped:\n"
        "    assert not stopped.code, stopped.code\n"
        "import datasets, transformers, trl\n"
        "print(json.dumps({module.__name__: module.__version__ for module in (trl, transformers, datasets)}))\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code, str(project / "recipes" / "flickr8k.py"), *options.split()],
        env={**lowest_environment, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert json.loads(finished.stdout.splitlines()[-1]) == wanted
    metrics = json.loads((run_folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["finetuned"]["num_examples"] == NUM_EVAL_EXAMPLES


def test_a_decoding_step_can_be_captured_with_the_lowest_versions(
    project: Path, lowest_environment: dict[str, str]
) -> None:
    """A GPU's way of decoding, whose condition shows here: it works on the same memory again."""
    words = "-m pytest -q -p no:cacheprovider tests/test_generate.py -k replayed_step"
    finished = subprocess.run(
        [sys.executable, *words.split()],
        env=lowest_environment,
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-3000:]
    assert "4 passed" in finished.stdout
