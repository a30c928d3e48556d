"""Answers while training: what is logged and kept, the best checkpoint, and a training that does not feel them."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import load_file

from qvl.errors import UserError
from qvl.files import read_jsonl, write_jsonl_atomically
from qvl.recipe import run
from qvl.text_scores import TextScore
from recipes.flickr8k import RECIPE

pytestmark = pytest.mark.slow

FLAGS = {
    "smoke": True,
    "num_train_examples": 24,
    "num_eval_examples": 4,
    "captions_per_image": 1,
    "max_steps": 4,
    "per_device_train_batch_size": 6,
    "logging_steps": 1,
    "max_new_tokens": 12,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_steps": 1,
    "save_total_limit": 4,
    "eval_generations": 3,
    "keep_checkpoints": True,
    "scores": ["terse", "bleu4"],
}


def terse(prediction: str, references: Sequence[str]) -> float:
    """The embedded model answers in a terse style until it has learned the captions': training makes this worse."""
    return -float(len(prediction))


TERSE = dataclasses.replace(RECIPE, scores={"terse": TextScore(terse, "terseness")})


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_jsonl(folder / "training_log.jsonl") if "loss" in row]


def answers(folder: Path, step: int) -> dict[str, str]:
    rows = read_jsonl(folder / "training_samples.jsonl")
    return {row["id"]: row["prediction"] for row in rows if row["step"] == step}


def test_answers_outlast_a_score_that_fails_on_them(tmp_path: Path) -> None:
    def fails(prediction: str, references: Sequence[str]) -> float:
        raise ValueError("no brackets")

    recipe = dataclasses.replace(RECIPE, scores={"brackets": TextScore(fails, "brackets")})
    folder = tmp_path / "outputs" / "run"
    flags = {"smoke": True, "num_train_examples": 8, "num_eval_examples": 2, "max_new_tokens": 4}
    flags["output_dir"] = str(folder)
    with pytest.raises(UserError, match=r"`brackets` fails for .*ValueError: no brackets.*--stages report"):
        run(recipe, {**flags, "stages": ["baseline"], "scores": ["brackets"]})
    path = folder / "baseline_predictions.jsonl"
    rows = read_jsonl(path)
    assert len(rows) == 2 and all(row["decoding"] == "greedy, at most 4 new tokens" for row in rows)
    run(RECIPE, {**flags, "stages": ["report"], "scores": ["bleu4"]})
    assert "bleu4" in read_json(folder / "metrics.json")["baseline"]
    # What the other model was asked with other flags does not compare.
    write_jsonl_atomically(folder / "finetuned_predictions.jsonl", [{**row, "decoding": "greedy"} for row in rows])
    with pytest.raises(UserError, match="are of different flags of decoding, so their scores do not compare"):
        run(RECIPE, {**flags, "stages": ["report"], "scores": ["bleu4"]})


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose chosen metric is best at its first evaluation."""
    folder = tmp_path_factory.mktemp("outputs") / "stopped"
    flags = {
        **FLAGS,
        "stages": ["train", "evaluate", "report"],
        "load_best_model_at_end": True,
        "metric_for_best_model": "terse",
        "early_stopping_patience": 2,
        "gradient_checkpointing": True,
        "output_dir": str(folder),
    }
    run(TERSE, flags)
    return folder


def test_the_run_stops_early_and_keeps_the_best_adapter(stopped: Path) -> None:
    evaluations = {
        row["step"]: row["eval_terse"] for row in read_jsonl(stopped / "training_log.jsonl") if "eval_terse" in row
    }
    best = max(evaluations, key=lambda step: evaluations[step])
    last = max(evaluations)
    train = read_json(stopped / "metrics.json")["train"]
    assert best < last
    assert train["best_step"] == best
    assert train["best_metric"] == evaluations[best]
    assert train["num_steps"] == last == min(4, best + 2)
    kept = load_file(stopped / "adapter" / "adapter_model.safetensors")
    of_best, of_last = (
        load_file(stopped / "checkpoints" / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (best, last)
    )
    assert kept.keys() == of_best.keys()
    assert all((kept[name] == of_best[name]).all() for name in kept)
    assert any((kept[name] != of_last[name]).any() for name in kept)


def test_answers_while_training_are_those_of_the_stage_evaluate(stopped: Path) -> None:
    final = {row["id"]: row["prediction"] for row in read_jsonl(stopped / "finetuned_predictions.jsonl")}
    best = answers(stopped, int(read_json(stopped / "metrics.json")["train"]["best_step"]))
    assert len(best) == FLAGS["eval_generations"]
    assert best == {key: final[key] for key in best}


def test_each_evaluation_logs_scores_pictures_and_their_cost(stopped: Path) -> None:
    rows = [row for row in read_jsonl(stopped / "training_log.jsonl") if "eval_loss" in row]
    for row in rows:
        assert {"eval_terse", "eval_bleu4", "eval_perplexity", "eval_generation_seconds"} <= row.keys()
        with Image.open(stopped / "samples" / f"step-{row['step']:06d}.png") as picture:
            assert picture.width > 800
        assert answers(stopped, row["step"]).keys() == answers(stopped, rows[0]["step"]).keys()
    train = read_json(stopped / "metrics.json")["train"]
    assert train["eval_generations_seconds"] == pytest.approx(sum(row["eval_generation_seconds"] for row in rows))
    assert 0 < train["eval_generations_share"] < 1
    client = MlflowClient(f"sqlite:///{stopped.parent / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'flickr8k'")
    (record,) = client.search_runs([experiment.experiment_id])
    logged = client.get_metric_history(record.info.run_id, "eval_bleu4")
    assert [(point.step, point.value) for point in logged] == [(row["step"], row["eval_bleu4"]) for row in rows]
    names = [file.path for file in client.list_artifacts(record.info.run_id, "images")]
    assert sum(name.startswith("images/samples") and name.endswith(".png") for name in names) == len(rows)


def test_the_report_shows_how_the_answers_changed(stopped: Path) -> None:
    page = (stopped / "report.html").read_text(encoding="utf-8")
    assert 'id="samples-title"' in page
    assert page.count("<span>step 1</span>") == FLAGS["eval_generations"]
    assert "terseness" in page


def test_training_goes_the_same_with_and_without_and_answers_are_dropped_when_it_resumes(
    stopped: Path, tmp_path: Path
) -> None:
    without = tmp_path / "without"
    flags = {**FLAGS, "gradient_checkpointing": True, "stages": ["train"], "output_dir": str(without)}
    run(TERSE, {**flags, "eval_strategy": "no", "eval_generations": 0})
    expected = losses(without)
    done = losses(stopped)
    assert done == expected[: len(done)]
    # From the first checkpoint of the stopped run to the end: later answers are given again, earlier ones stay.
    resumed = tmp_path / "resumed"
    shutil.copytree(stopped, resumed)
    checkpoint = resumed / "checkpoints" / "checkpoint-1"
    patient = {"early_stopping_patience": 9, "output_dir": str(resumed), "resume_from_checkpoint": str(checkpoint)}
    run(TERSE, {**flags, **patient})
    assert losses(resumed) == pytest.approx(expected, abs=1e-6)
    steps = [row["step"] for row in read_jsonl(resumed / "training_samples.jsonl")]
    assert steps == sorted([1, 2, 3, 4] * FLAGS["eval_generations"])  # type: ignore[operator]
    assert answers(resumed, 1) == answers(stopped, 1)


def test_a_quantized_base_and_a_score_of_the_captions(tmp_path: Path) -> None:
    flags = {
        **FLAGS,
        "scores": ["cider"],
        "load_in_4bit": True,
        "stages": ["train", "evaluate"],
        "max_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_cider",
        "output_dir": str(tmp_path / "run"),
    }
    run(RECIPE, flags)
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert metrics["train"]["best_step"] in (1, 2)
    final = {row["id"]: row["prediction"] for row in read_jsonl(tmp_path / "run" / "finetuned_predictions.jsonl")}
    best = answers(tmp_path / "run", int(metrics["train"]["best_step"]))
    assert best == {key: final[key] for key in best}
