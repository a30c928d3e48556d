"""Commands that go on with a run: they score what it trained, change nothing that is done, and leave one story."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from qvl.ending_signals import give_back, take_over
from qvl.errors import UserError
from qvl.files import read_jsonl
from qvl.recipe import run
from recipes.flickr8k import RECIPE

ROOT = Path(__file__).parents[1]
SHORT = {
    "smoke": True,
    "num_train_examples": 16,
    "num_eval_examples": 4,
    "captions_per_image": 1,
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "max_new_tokens": 8,
}
WEIGHTS = Path("adapter/adapter_model.safetensors")


def short_run(folder: Path, **flags: Any) -> None:
    run(RECIPE, {**SHORT, "output_dir": str(folder), **flags}, [])


def go_on(folder: Path, *argv: str) -> None:
    """As on a command line: a sweep's overrides are another matter."""
    run(RECIPE, {"output_dir": str(folder)}, list(argv))


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def settings_of(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "settings.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("continued") / "whole"
    short_run(folder)
    return folder


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all stages that has a checkpoint, and no adapter: its second command found no room, say."""
    folder = tmp_path_factory.mktemp("continued") / "interrupted"
    short_run(folder, save_steps=2, save_total_limit=2, keep_checkpoints=True)
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoints/checkpoint-3")
    return folder


@pytest.fixture
def copy(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return Path(shutil.copytree(request.getfixturevalue(request.param), tmp_path / "copy"))


@pytest.mark.parametrize("copy", ["whole"], indirect=True)
def test_a_run_trained_further_is_scored_with_what_came_of_it(copy: Path, tmp_path: Path) -> None:
    further = tmp_path / "further"
    short_run(further, stages=["train"], adapter=str(copy / "adapter"), learning_rate=2e-2)
    assert (further / WEIGHTS).read_bytes() != (copy / WEIGHTS).read_bytes()
    go_on(further, "--stages", "evaluate")
    before, after = metrics_of(copy)["finetuned"], metrics_of(further)["finetuned"]
    assert after["loss"] != pytest.approx(before["loss"], rel=1e-3)
    # Fed back, the file trains further from there again.
    assert settings_of(further)["adapter"] == str(copy / "adapter")
    assert settings_of(further)["stages"] == ["train", "evaluate"]


@pytest.mark.parametrize("copy", ["whole"], indirect=True)
def test_a_new_training_takes_the_old_scores_away(copy: Path) -> None:
    (copy / "samples").mkdir()
    (copy / "training_samples.jsonl").write_text("{}\n", encoding="utf-8")
    baseline = metrics_of(copy)["baseline"]
    short_run(copy, stages=["train"], learning_rate=1e-7)
    left = metrics_of(copy)
    assert left["baseline"] == baseline and left["finetuned"] is None and left["difference"] == {}
    assert "finetuned" not in left["cost"]
    for name in ("finetuned_predictions.jsonl", "report.html", "training_samples.jsonl", "samples"):
        assert not (copy / name).exists(), name
    go_on(copy, "--stages", "evaluate")
    assert metrics_of(copy)["finetuned"]["loss"] == pytest.approx(baseline["loss"], rel=1e-2)
    assert metrics_of(copy)["difference"] == {}
    go_on(copy, "--stages", "report")
    assert abs(metrics_of(copy)["difference"]["loss"]["mean"]) < 0.1


@pytest.mark.parametrize("copy", ["whole"], indirect=True)
def test_a_second_look_at_one_side_takes_the_comparison_away(copy: Path) -> None:
    assert metrics_of(copy)["difference"]
    go_on(copy, "--stages", "evaluate", "--max_new_tokens", "4")
    assert metrics_of(copy)["difference"] == {} and not (copy / "report.html").exists()


@pytest.mark.parametrize("copy", ["interrupted"], indirect=True)
def test_another_trainings_checkpoints_are_not_taken_over(copy: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint-2 is of an earlier training: .*--resume_from_checkpoint true"):
        short_run(copy, stages=["train"], learning_rate=1e-6)
    assert (copy / "checkpoints/checkpoint-2/trainer_state.json").is_file()


@pytest.mark.parametrize("copy", ["interrupted"], indirect=True)
def test_a_report_in_between_does_not_keep_a_run_from_being_resumed(copy: Path) -> None:
    go_on(copy, "--stages", "report")
    assert settings_of(copy)["stages"] == ["baseline", "train", "evaluate", "report"]
    go_on(copy, "--resume_from_checkpoint", "true")
    assert (copy / WEIGHTS).is_file()
    assert [row["step"] for row in read_jsonl(copy / "training_log.jsonl") if "loss" in row] == [1, 2, 3]


@pytest.mark.parametrize("copy", ["interrupted"], indirect=True)
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning_rate", "1e-6"], r"--learning_rate 1e-06: .* was trained with .* up to its checkpoint"),
        (["--per_device_train_batch_size", "2"], "--per_device_train_batch_size 2"),
        (["--gradient_accumulation_steps", "2"], "--gradient_accumulation_steps 2"),
        (["--lora_r", "64"], "--lora_r 64"),
        (["--seed", "7"], "--seed 7"),
        (["--captions_per_image", "2"], "--captions_per_image 2"),
        (["--stages", "evaluate"], "--resume_from_checkpoint goes on with a training, and the stages evaluate have"),
    ],
)
def test_what_a_resumed_training_would_not_do_is_refused(argv: list[str], message: str, copy: Path) -> None:
    before = (copy / "settings.yaml").read_bytes()
    with pytest.raises(UserError, match=message):
        go_on(copy, "--resume_from_checkpoint", "true", *argv)
    assert (copy / "settings.yaml").read_bytes() == before


@pytest.mark.parametrize("copy", ["interrupted"], indirect=True)
def test_a_training_is_not_resumed_on_other_rows(copy: Path) -> None:
    path = copy / "token_lengths.json"
    lengths = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**lengths, "data_fingerprint": "0" * 64}), encoding="utf-8")
    with pytest.raises(UserError, match=r"rows of qvl/scenes are not those that .* was trained on"):
        go_on(copy, "--resume_from_checkpoint", "true", "--stages", "train")


@pytest.mark.parametrize("copy", ["interrupted"], indirect=True)
def test_a_resumed_training_may_be_longer(copy: Path) -> None:
    go_on(copy, "--resume_from_checkpoint", "true", "--stages", "train", "--max_steps", "4")
    assert [row["step"] for row in read_jsonl(copy / "training_log.jsonl") if "loss" in row] == [1, 2, 3, 4]


@pytest.mark.parametrize("argv", [["--learning_rate", "0.9"], ["--lora_r", "64"], ["--max_steps", "50"]])
def test_a_report_cannot_change_what_was_trained(argv: list[str], whole: Path) -> None:
    before = (whole / "settings.yaml").read_bytes()
    with pytest.raises(UserError, match=f"{argv[0]} {argv[1]}: the adapter of .* was trained with"):
        go_on(whole, "--stages", "report", *argv)
    assert (whole / "settings.yaml").read_bytes() == before


@pytest.mark.slow
def test_a_terminal_that_is_closed_ends_a_training_as_sigterm_does(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    flags = "--smoke --stages train --num_train_examples 64 --num_eval_examples 4 --logging_steps 1 --max_steps 500"
    ours, its = os.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        # Tests may have been started by nohup.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, "recipes/flickr8k.py", *flags.split(), "--output_dir", str(folder)],
        cwd=ROOT,
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(its)
    os.set_blocking(ours, False)
    log = folder / "training_log.jsonl"
    deadline = time.monotonic() + 240
    try:
        while not (log.is_file() and len(read_jsonl(log)) >= 2):
            assert process.poll() is None and time.monotonic() < deadline
            with contextlib.suppress(BlockingIOError):
                os.read(ours, 65536)
            time.sleep(0.1)
        os.close(ours)
        assert process.wait(timeout=240) == 143
    finally:
        process.kill()
        process.wait()
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (recorded,) = client.search_runs([item.experiment_id for item in client.search_experiments()])
    assert recorded.info.status == "KILLED"
    assert list(folder.glob("checkpoints/checkpoint-*/trainer_state.json"))


@pytest.mark.parametrize(("before", "number"), [(signal.SIG_DFL, 2), (signal.SIG_IGN, 1)])
def test_who_ignores_a_closed_terminal_goes_on(before: Any, number: int) -> None:
    """As nohup does."""
    own = signal.signal(signal.SIGHUP, before)
    try:
        previous = take_over(lambda number, frame: None)
        assert len(previous) == number and (signal.SIGHUP in previous) is (before is signal.SIG_DFL)
        give_back(previous)
        assert signal.getsignal(signal.SIGHUP) == before
    finally:
        signal.signal(signal.SIGHUP, own)


@pytest.mark.parametrize("outlives", [True, False])
def test_a_terminal_that_is_gone_takes_every_line(outlives: bool) -> None:
    code = (
        "import signal, sys, time\n"
        "from qvl.ending_signals import outlive_terminal\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        f"outlive_terminal() if {outlives} else None\n"
        "assert sys.stdout.isatty() and sys.stderr.isatty()\n"
        "print('ready', flush=True)\n"
        "for _ in range(20):\n"
        "    time.sleep(0.1)\n"
        "    print('a line', flush=True)\n"
        "    print('another', file=sys.stderr)\n"
    )
    ours, its = os.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=its, stderr=its)
    os.close(its)
    assert os.read(ours, 5) == b"ready"
    os.close(ours)
    assert (process.wait(timeout=60) == 0) is outlives
