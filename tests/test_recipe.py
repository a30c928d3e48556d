"""The whole recipe, end to end, on the embedded model: what a user sees, and what a run promises."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import recipe_command
from mlflow import MlflowClient

import qvl.examples
from qvl.errors import UserError
from qvl.files import read_jsonl
from qvl.recipe import run
from recipes.flickr8k import RECIPE

ROOT = Path(__file__).parents[1]
# A run of seconds: what it learns does not matter, that it is the same each time does.
SHORT = {
    "smoke": True,
    "num_train_examples": 24,
    "num_eval_examples": 6,
    "captions_per_image": 2,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "max_new_tokens": 12,
}
FILES = (
    "settings.yaml adapter/adapter_config.json adapter/adapter_model.safetensors adapter/chat_template.jinja "
    "adapter/trained_with.json baseline_predictions.jsonl finetuned_predictions.jsonl metrics.json checks.json "
    "report.html training_log.jsonl training_examples.json"
).split()


def recipe_process(*flags: str, **kwargs: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "recipes/flickr8k.py", *flags]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs
    )


def recorded_run(folder: Path) -> Any:
    """The newest MLflow run of a run folder."""
    client = MlflowClient(f"sqlite:///{folder.parent / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return client.search_runs(experiments, f"tags.mlflow.runName = '{folder.name}'", max_results=1)[0]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_jsonl(folder / "training_log.jsonl") if "loss" in row]


def predictions(folder: Path, part: str = "finetuned") -> list[str]:
    return [row["prediction"] for row in read_jsonl(folder / f"{part}_predictions.jsonl")]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def finished(outputs: Path) -> Path:
    """A short run through all stages."""
    folder = outputs / "finished"
    run(RECIPE, {**SHORT, "output_dir": str(folder)})
    return folder


def smoke_run(folder: Path, *flags: str) -> tuple[Path, str]:
    """The run folder of a smoke run, and what it printed."""
    screen, _ = recipe_command("flickr8k", "--smoke", "--output_dir", str(folder), *flags)
    return folder, screen


@pytest.fixture(scope="module")
def smoke(outputs: Path) -> tuple[Path, str]:
    return smoke_run(outputs / "smoke")


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "least"), [((), 0.60), (("--load_in_4bit",), 0.55)], ids=["fp32", "4bit"])
def test_smoke_shows_a_true_gain_on_unseen_scenes(
    flags: tuple[str, ...], least: float, outputs: Path, smoke: tuple[Path, str]
) -> None:
    folder, screen = smoke_run(outputs / "smoke_4bit", *flags) if flags else smoke
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["baseline"]["bleu4"] <= 0.20
    assert metrics["finetuned"]["bleu4"] >= least
    assert metrics["difference"]["bleu4"]["low"] > 0
    assert metrics["baseline"]["num_examples"] == metrics["finetuned"]["num_examples"] >= 50
    for file in FILES:
        assert (folder / file).is_file(), file
    assert not (folder / "checkpoints").exists()
    checked = {check["name"]: check["passed"] for check in json.loads((folder / "checks.json").read_text())}
    assert all(checked.values())
    assert {"lora_where_asked", "trainable_share_as_computed", "no_adapter_on_frozen_parts"} <= checked.keys()
    for promised in ("BLEU-4", str(folder), "report.html", "mlflow ui --backend-store-uri", "[["):
        assert promised in screen
    assert "Warning" not in screen


@pytest.mark.slow
def test_the_smokes_bleu4_in_fp8_is_that_of_full_precision(smoke: tuple[Path, str], outputs: Path) -> None:
    folder = outputs / "smoke_fp8"
    found = run(
        RECIPE,
        {"smoke": True, "stages": ["train", "evaluate"], "base_precision": "fp8", "output_dir": str(folder)},
    )["finetuned_bleu4"]
    plain = json.loads((smoke[0] / "metrics.json").read_text())["finetuned"]["bleu4"]
    assert found == pytest.approx(plain, abs=0.03)
    assert predictions(folder) != predictions(smoke[0])


def test_the_run_record_is_complete_and_readable(finished: Path) -> None:
    record = recorded_run(finished)
    assert record.info.status == "FINISHED"
    assert 20 <= len(record.data.params) <= 45
    for name in ("model_name_or_path", "learning_rate", "lora_r", "max_steps", "data_fingerprint", "trl_version"):
        assert name in record.data.params
    assert record.data.tags["recipe"] == "flickr8k"
    for name in ("baseline_bleu4", "finetuned_bleu4", "difference_bleu4_mean", "train_seconds", "data_wait_share"):
        assert name in record.data.metrics
    for part in ("train", "cost_baseline", "cost_finetuned"):
        assert record.data.metrics[f"{part}_peak_gib"] > 0
        assert record.data.metrics[f"{part}_predicted_peak_gib"] > 0
    client = MlflowClient(f"sqlite:///{finished.parent / 'mlflow.db'}")
    history = client.get_metric_history(record.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == list(enumerate(losses(finished), start=1))
    names = {file.path for file in client.list_artifacts(record.info.run_id)}
    assert {"adapter", "report.html", "settings.yaml", "metrics.json", "predictions.json"} <= names


def test_one_seed_gives_one_result_and_another_seed_another(finished: Path, outputs: Path) -> None:
    again, other = outputs / "again", outputs / "other"
    run(RECIPE, {**SHORT, "output_dir": str(again)})
    run(RECIPE, {**SHORT, "output_dir": str(other), "seed": 7})
    assert losses(again) == losses(finished)
    assert predictions(again) == predictions(finished)
    assert losses(other) != losses(finished)


def test_settings_yaml_repeats_the_run(finished: Path, outputs: Path) -> None:
    folder = outputs / "repeated"
    run(RECIPE, {}, ["--config", str(finished / "settings.yaml"), "--output_dir", str(folder)])
    assert losses(folder) == losses(finished)
    assert predictions(folder) == predictions(finished)


def test_stages_run_alone_and_find_what_earlier_ones_left(finished: Path, outputs: Path) -> None:
    folder = outputs / "alone"
    flags = [word for key, value in SHORT.items() for word in (f"--{key}", str(value))]
    run(RECIPE, {}, ["--stages", "baseline", "train", "--output_dir", str(folder), *flags])
    assert not (folder / "finetuned_predictions.jsonl").exists()
    # No other flag: the folder's own settings count.
    run(RECIPE, {}, ["--stages", "evaluate", "--output_dir", str(folder)])
    run(RECIPE, {}, ["--stages", "report", "--output_dir", str(folder)])
    assert predictions(folder) == predictions(finished)
    parts = ("baseline", "finetuned", "difference")
    alone, whole = (json.loads((path / "metrics.json").read_text()) for path in (folder, finished))
    assert [alone[part] for part in parts] == [whole[part] for part in parts]
    assert (folder / "report.html").is_file()


def test_an_adapter_can_be_evaluated_and_trained_further(finished: Path, outputs: Path) -> None:
    scored = outputs / "scored"
    adapter = str(finished / "adapter")
    run(RECIPE, {**SHORT, "output_dir": str(scored), "adapter": adapter, "stages": ["evaluate"]})
    assert predictions(scored) == predictions(finished)
    # Also where the folder holds an adapter of its own: the one that is named is the one that is scored.
    other = outputs / "other_adapter"
    run(RECIPE, {**SHORT, "output_dir": str(other), "seed": 7, "stages": ["train"]})
    run(RECIPE, {**SHORT, "output_dir": str(other), "adapter": adapter, "stages": ["evaluate"]})
    assert predictions(other) == predictions(finished)
    further = outputs / "further"
    run(RECIPE, {**SHORT, "output_dir": str(further), "adapter": adapter, "stages": ["train"]})
    assert losses(further)[0] < losses(finished)[0]


# 96 rows: 24 steps an epoch, so that an early SIGTERM leaves much of the first one to skip.
LONG = {**SHORT, "captions_per_image": 4, "max_steps": 30}


@pytest.fixture(scope="module")
def terminated(outputs: Path) -> Path:
    """A run that got SIGTERM in the middle of its training."""
    folder = outputs / "terminated"
    flags = [word for key, value in LONG.items() for word in (f"--{key}", str(value))]
    process = recipe_process(*flags, "--stages", "train", "--output_dir", str(folder))
    assert process.stdout is not None
    screen = ""
    for line in process.stdout:
        screen += line
        if screen.count("'loss'") == 10:
            process.send_signal(signal.SIGTERM)
            break
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 143, screen + rest
    return folder


def test_sigterm_saves_a_checkpoint_and_marks_the_run_killed(terminated: Path) -> None:
    assert recorded_run(terminated).info.status == "KILLED"
    (checkpoint,) = (terminated / "checkpoints").glob("checkpoint-*")
    assert (checkpoint / "optimizer.pt").is_file()
    assert not (terminated / "adapter").exists()


def test_resumed_equals_uninterrupted_and_reads_no_image_twice(
    terminated: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = outputs / "uninterrupted"
    run(RECIPE, {**LONG, "stages": ["train"], "output_dir": str(whole)})
    (checkpoint,) = (terminated / "checkpoints").glob("checkpoint-*")
    num_done = int(checkpoint.name.rpartition("-")[2])
    decode, decoded = qvl.examples.decode_rgb, []
    monkeypatch.setattr(qvl.examples, "decode_rgb", lambda data: decoded.append(1) or decode(data))
    run(RECIPE, {"resume_from_checkpoint": "true", "output_dir": str(terminated)})
    assert losses(terminated) == pytest.approx(losses(whole), abs=1e-6)
    assert 10 <= num_done < 24
    # The batches checked before step 0 and the trainer's look at the first row come on top of the steps left.
    size = SHORT["per_device_train_batch_size"]
    assert len(decoded) <= (30 - num_done) * size + 4 * size + 2 * size


def test_a_failing_run_is_recorded_as_failed_and_names_the_step(outputs: Path) -> None:
    folder = outputs / "diverged"
    with pytest.raises(UserError, match=r"Step \d+: the loss is not a number"):
        run(
            RECIPE, {**SHORT, "output_dir": str(folder), "learning_rate": 1e30, "max_grad_norm": 0, "stages": ["train"]}
        )
    record = recorded_run(folder)
    assert record.info.status == "FAILED"
    assert "not a number" in record.data.tags["error"]


def test_dry_run_needs_no_weights_and_writes_settings_to_feed_back(
    outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "no_weights"
    model.mkdir()
    for file in (ROOT / "qvl/assets/tiny-qwen3-vl").iterdir():
        if file.suffix != ".safetensors":
            (model / file.name).write_bytes(file.read_bytes())
    flags = [
        "--smoke",
        "--model_name_or_path",
        str(model),
        "--max_pixels",
        "12544",
        "--output_dir",
        str(tmp_path / "dry"),
    ]
    assert run(RECIPE, {}, [*flags, "--dry_run"]) == {}
    screen = capsys.readouterr().out
    for shown in (
        "tokens a training row",
        "visual tokens",
        "12544",
        "language model at model.language_model",
        "learning_rate",
    ):
        assert shown in screen
    assert not (tmp_path / "dry" / "metrics.json").exists()
    assert "max_pixels: 12544" in (tmp_path / "dry" / "settings.yaml").read_text()


def test_a_dry_run_does_not_pass_over_a_mistake(tmp_path: Path) -> None:
    flags = ["--smoke", "--dry_run", "--lora_target_modules", "no_such_proj", "--output_dir", str(tmp_path)]
    with pytest.raises(UserError, match="no_such_proj"):
        run(RECIPE, {}, flags)


def test_unwritable_folder_stops_before_anything_is_loaded(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with pytest.raises(UserError, match="--output_dir"):
        run(RECIPE, {**SHORT, "output_dir": str(in_the_way / "run")})


def test_user_errors_print_one_message_and_no_traceback() -> None:
    process = recipe_process("--smoke", "--max_seq_length", "5")
    screen, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "--max_seq_length is now called --max_length." in screen
    assert "Traceback" not in screen


def test_held_out_loss_during_training_and_wandb_beside_mlflow(
    outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = outputs / "wandb"
    flags = {"report_to": "wandb", "eval_strategy": "steps", "eval_steps": 2, "stages": ["train"]}
    run(RECIPE, {**SHORT, **flags, "output_dir": str(folder)})
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert "eval_loss" in recorded_run(folder).data.metrics
