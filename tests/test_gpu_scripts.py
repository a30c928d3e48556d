"""What of the scripts in tests/gpu needs no GPU: their flags, their commands, and the arithmetic of their tables."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "tests" / "gpu"
LOSSES = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.5, 2.0]


@pytest.fixture
def summary_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    import two_gpus_summary

    return two_gpus_summary


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    import two_gpus

    return two_gpus


def write_training(folder: Path, losses: Sequence[float], rates: Sequence[float], peak_gib: float = 1.0) -> None:
    """The files that a training leaves, with a loss and a rate for each step."""
    folder.mkdir(parents=True)
    rows = [
        {"step": step, "loss": loss, "samples_per_second": rate, "data_wait_share": 0.01, "num_tokens": 100.0 * step}
        for step, (loss, rate) in enumerate(zip(losses, rates, strict=True), start=1)
    ]
    ending = {"step": len(rows), "train_loss": 1.0}
    (folder / "training_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, ending]))
    (folder / "metrics.json").write_text(json.dumps({"train": {"peak_gib": peak_gib}}))
    (folder / "checks.json").write_text(json.dumps([{"name": "frozen", "passed": True}]))


def write_answers(folder: Path, answers: Mapping[str, str], loss: float, seconds: float) -> None:
    """The files that an evaluation of an adapter leaves."""
    folder.mkdir(parents=True)
    rows = [{"id": name, "prediction": text, "answer_loss": loss} for name, text in answers.items()]
    (folder / "finetuned_predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "metrics.json").write_text(json.dumps({"cost": {"finetuned": {"seconds": seconds}}}))


@pytest.mark.parametrize("script", ["two_gpus.py", "loaders.py", "one_loader.py"])
def test_scripts_explain_themselves(script: str) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), "--help"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--model MODEL" in done.stdout
    assert f"python tests/gpu/{script}" in done.stdout


def test_steps_that_wait_are_not_timed(summary_module: ModuleType) -> None:
    published = summary_module.Shape(batch=32, num_steps=14)
    assert published.saved_at == 10
    assert published.steady_steps == [5, 6, 7, 8, 9, 10, 12, 13, 14]
    assert published.captions_per_step == 320
    assert summary_module.Shape(batch=1, num_steps=4).steady_steps == [2, 3]


def test_the_summary_of_run_folders(summary_module: ModuleType, tmp_path: Path) -> None:
    shape = summary_module.Shape(batch=2, num_steps=8)
    assert (shape.steady_steps, shape.captions_per_step) == ([3, 4, 5, 6, 8], 20)
    # 20 captions in 10 s, and in steady steps 2 s but for one of 4 s; step 7 waits for a checkpoint.
    write_training(tmp_path / "one", LOSSES, [2, 5, 10, 10, 5, 10, 1, 10], peak_gib=40.0)
    ddp = [*LOSSES[:3], LOSSES[3] * 1.01, *LOSSES[4:]]
    write_training(tmp_path / "ddp", ddp, [20.0] * 8)
    # What stands in front of the checkpoint of step 6 is not told apart.
    write_training(tmp_path / "ddp_resumed", [9.9, *ddp[1:7], ddp[7] * 0.995], [1.0] * 8)
    write_training(tmp_path / "qlora_zero2", [12.0, 10.5], [1.0, 1.0], peak_gib=10.0)
    write_answers(tmp_path / "eval_one", {"a": "A dog.", "b": "A cat.", "c": "A dog."}, loss=4.0, seconds=4.4)
    write_answers(tmp_path / "eval_two", {"a": "A dog.", "b": "A cow.", "c": "A dog."}, loss=4.1, seconds=3.2)

    found = summary_module.summarize(tmp_path, shape)

    assert found["captions_per_second"] == pytest.approx({"one": 100 / 12, "ddp": 20.0})
    assert found["ratios"] == pytest.approx({"ddp/one": 2.4})
    assert found["runs"]["one"]["first_step_seconds"] == 10
    assert found["runs"]["one"]["peak_gib"] == 40.0
    apart = found["loss_apart"]["ddp from one"]
    assert apart["most"] == pytest.approx(0.01)
    assert [step for step, value in apart["by_step"].items() if value] == [4]
    assert apart["same_tokens"]
    resumed = found["resumed_loss_apart"]["ddp_resumed"]
    assert resumed["by_step"] == pytest.approx({7: 0.0, 8: 0.005})
    assert found["answers"]["finetuned"] == {
        "num_prompts": 3,
        "num_same": 2,
        "num_different_answers": 2,
        "loss_apart": pytest.approx(0.025),
        "seconds": [4.4, 3.2],
    }

    done = {"status": "done", "seconds": 61.2}
    names = ("one", "ddp", "ddp_resumed", "eval_two", "qlora_zero2")
    lines = summary_module.table(found, {**dict.fromkeys(names, done), "zero3": {"status": "not begun: no time"}})
    rows = {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:])}
    assert rows["one"] == ["done", "61", "8.333", "", "40.0", "10.0", "", ""]
    assert rows["ddp"] == ["done", "61", "20", "2.40", "1.0", "1.0", "1.00%", ""]
    assert rows["ddp_resumed"][-2:] == ["0.50%", "loss 9.9 to 1.99"]
    assert rows["eval_two"][-1] == "finetuned: 2 of 3 answers the same, losses 0.025 apart, 4.4 and 3.2 s"
    assert rows["qlora_zero2"][-1] == "loss 12 to 10.5"
    assert rows["zero3"] == ["not begun: no time", "0", "", "", "", "", "", ""]


def test_a_summary_of_nothing_is_empty(summary_module: ModuleType, tmp_path: Path) -> None:
    found = summary_module.summarize(tmp_path, summary_module.Shape(batch=2, num_steps=8))
    assert (found["runs"], found["ratios"], found["answers"]) == ({}, {}, {})


def test_commands_are_those_that_a_user_types(two_gpus: ModuleType, tmp_path: Path) -> None:
    shape = two_gpus.Shape(2, 8)
    cases = {case.name: case for case in two_gpus.cases("MODEL", tmp_path, Path("runs"), shape)}
    for case in cases.values():
        assert case.launch_file is None or (ROOT / "environments" / "accelerate" / case.launch_file).is_file()
    start = two_gpus.command(cases["zero3"], Path("runs/zero3"), ["--seed", "7"])
    assert start[:5] == ["accelerate", "launch", "--config_file", "environments/accelerate/zero3.yaml", two_gpus.RECIPE]
    assert start[-4:] == ["--output_dir", "runs/zero3", "--seed", "7"]
    alone = two_gpus.command(cases["one_plain"], Path("runs/one_plain"), [])
    assert alone[:2] == ["python", two_gpus.RECIPE]
    words: dict[str, Any] = dict(zip(alone[2::2], alone[3::2], strict=True))
    # The same rows a step as two GPUs.
    assert (words["--per_device_train_batch_size"], words["--gradient_accumulation_steps"]) == ("2", "2")
    assert words["--compile_layers"] == "false"


def test_a_run_is_resumed_from_its_middle(two_gpus: ModuleType, tmp_path: Path) -> None:
    for name in ("checkpoints/checkpoint-6", "checkpoints/checkpoint-8", "adapter"):
        (tmp_path / "ddp" / name).mkdir(parents=True)
    (tmp_path / "ddp" / "settings.yaml").write_text("seed: 42\n")
    two_gpus.copy_run_at_its_checkpoint(tmp_path / "ddp", tmp_path / "ddp_resumed", "checkpoint-6")
    left = {str(path.relative_to(tmp_path / "ddp_resumed")) for path in (tmp_path / "ddp_resumed").rglob("*")}
    assert left == {"settings.yaml", "checkpoints", "checkpoints/checkpoint-6"}


def test_a_command_ends_at_its_limit_with_all_of_its_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    import limited
    import psutil

    # As launchers do it, the child has a session of its own.
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    # Time enough for a busy machine to start both.
    record = limited.run_limited([sys.executable, "-c", code], tmp_path / "log.txt", seconds=8.0)
    assert record["status"] == "stopped"
    (line,) = record["tail"]
    assert not psutil.pid_exists(int(line)) or psutil.Process(int(line)).status() == psutil.STATUS_ZOMBIE
    assert limited.run_limited([sys.executable, "-c", "exit(3)"], tmp_path / "log.txt", 20)["status"] == "failed with 3"
