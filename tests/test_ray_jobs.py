"""`ray job submit` with a recipe, against a real head with one GPU (which need not exist)."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from local_ray import BIN, ROOT, Head, local_head
from mlflow import MlflowClient
from ray.job_submission import JobStatus, JobSubmissionClient

from ray_jobs.environment import travelling_variables

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow]

TINY = (
    "--smoke --num_train_examples 16 --num_eval_examples 3 --captions_per_image 2 --max_steps 2 --logging_steps 1 "
    "--per_device_train_batch_size 4 --max_new_tokens 6 --scores rouge_l"
)
TOKEN = "hf_" + "a1B2c3D4" * 4
PATIENCE_SECONDS = 400


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Started in the repository, as the bare command needs it, with a token in its environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        with local_head(num_gpus=1) as started:
            yield started


@pytest.fixture(scope="module")
def client(head: Head) -> JobSubmissionClient:
    return JobSubmissionClient(head.dashboard)


def wait_until(happened: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.5)


def wait_for_end(client: JobSubmissionClient, job: str) -> JobStatus:
    wait_until(lambda: client.get_job_status(job).is_terminal(), f"end of {job}: {client.get_job_logs(job)}")
    return client.get_job_status(job)


def recorded_status(store: Path) -> str:
    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return run.info.status


def test_two_jobs_share_the_one_gpu_in_turns_and_a_stopped_one_saves(
    head: Head, client: JobSubmissionClient, tmp_path: Path
) -> None:
    long = f"{TINY} --max_steps 100000 --stages train --output_dir {tmp_path / 'first' / 'run'}"
    first = client.submit_job(entrypoint=f"python recipes/flickr8k.py {long}")
    wait_until(lambda: "Running on" in client.get_job_logs(first), "start of the first job")
    # The command as it is written, with RAY_ADDRESS set.
    words = ["--", "python", "recipes/flickr8k.py", *TINY.split(), "--output_dir", str(tmp_path / "second" / "run")]
    second = subprocess.Popen(
        [str(BIN / "ray"), "job", "submit", *words],
        cwd=tmp_path,
        env=head.environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    wait_until(lambda: "'loss'" in client.get_job_logs(first), "training of the first job")
    (waiting,) = [job.submission_id for job in client.list_jobs() if job.submission_id != first]
    wait_until(lambda: "Waiting for 1 GPU" in client.get_job_logs(waiting), "word of the second job")
    assert "Running on" not in client.get_job_logs(waiting)

    client.stop_job(first)
    assert wait_for_end(client, first) == JobStatus.STOPPED
    folder = tmp_path / "first" / "run"
    wait_until(lambda: list(folder.glob("checkpoints/checkpoint-*/trainer_state.json")), "checkpoint")
    wait_until(lambda: recorded_status(tmp_path / "first") == "KILLED", "closed MLflow run")
    assert not (folder / "adapter").exists()

    screen, _ = second.communicate(timeout=PATIENCE_SECONDS)
    assert second.returncode == 0, screen
    for promised in ("Running on", "== evaluate ==", "ROUGE-L", "Took "):
        assert promised in screen
    assert (tmp_path / "second" / "run" / "report.html").is_file()
    assert recorded_status(tmp_path / "second") == "FINISHED"


def test_a_job_with_a_gpu_of_its_own_runs_in_place(client: JobSubmissionClient, tmp_path: Path) -> None:
    # A second GPU would never come: this one would wait for ever.
    command = f"python recipes/flickr8k.py {TINY} --stages train --output_dir {tmp_path / 'run'}"
    job = client.submit_job(entrypoint=command, entrypoint_num_gpus=1)
    assert wait_for_end(client, job) == JobStatus.SUCCEEDED
    log = client.get_job_logs(job)
    assert "Running on" not in log and "Waiting for" not in log
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_mistyped_flag_stops_before_a_gpu_is_asked_for(client: JobSubmissionClient) -> None:
    job = client.submit_job(entrypoint=f"python recipes/flickr8k.py {TINY} --learning_rat 1e-4")
    assert wait_for_end(client, job) == JobStatus.FAILED
    assert "Did you mean --learning_rate?" in client.get_job_logs(job)
    info = client.get_job_info(job)
    assert "exit code 2" in info.message
    assert "Running on" not in client.get_job_logs(job)


def test_a_part_of_the_repository_is_not_enough(client: JobSubmissionClient) -> None:
    recipes = str(ROOT / "recipes")
    job = client.submit_job(entrypoint="python flickr8k.py --smoke", runtime_env={"working_dir": recipes})
    assert wait_for_end(client, job) == JobStatus.FAILED
    assert "--working-dir ." in client.get_job_logs(job)


def test_no_token_stands_in_rays_logs(head: Head, client: JobSubmissionClient) -> None:
    assert client.list_jobs()
    logs = list(head.scratch.glob("session_2*/logs/**/*"))
    assert len(logs) > 10
    assert [path for path in logs if path.is_file() and TOKEN.encode() in path.read_bytes()] == []


def test_what_travels_to_workers() -> None:
    environment = {
        "HF_TOKEN": "t",
        "HF_ENDPOINT": "e",
        "MLFLOW_TRACKING_URI": "u",
        "MLFLOW_TRACKING_PASSWORD": "p",
        "MLFLOW_RUN_ID": "r",
        "PATH": "x",
        "AWS_SECRET_ACCESS_KEY": "s",
    }
    assert set(travelling_variables(environment)) == {
        "HF_TOKEN",
        "HF_ENDPOINT",
        "MLFLOW_TRACKING_URI",
        "MLFLOW_TRACKING_PASSWORD",
    }


def test_locally_nothing_changes_and_ray_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['recipes/flickr8k.py', '--smoke', '--dry_run', '--output_dir', sys.argv[1]]\n"
        "try:\n    runpy.run_path('recipes/flickr8k.py', run_name='__main__')\n"
        "except SystemExit as end:\n    print('ray' in sys.modules, end.code)\n"
    )
    command = [str(BIN / "python"), "-c", code, str(tmp_path)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert finished.stdout.strip().endswith("False 0")


def test_the_runtime_environment_leaves_out_what_should_stay() -> None:
    import yaml

    settings = yaml.safe_load((ROOT / "environments" / "ray_runtime_env.yaml").read_text(encoding="utf-8"))
    assert {"outputs", "data", ".venv"} <= {name.strip("/") for name in settings["excludes"]}
    assert "TOKEN" not in json.dumps(settings).upper().replace("TOKENIZERS", "")
    assert os.access(ROOT / "environments" / "ray_cluster.yaml", os.R_OK)
