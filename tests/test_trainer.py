"""The training promises that do not need a whole run to be seen."""

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from qvl.adapters import add_adapter
from qvl.bench_cases import Case, open_run, prepare
from qvl.errors import FailedCheckError, UserError
from qvl.files import read_jsonl
from qvl.recipe import run
from qvl.train_stage import trainer_arguments
from qvl.trainer import build_trainer
from qvl.trainer_callbacks import DivergenceWatchdog, SaveOnTermination
from qvl.training_rows import prepare_training_rows
from recipes import qwen_chat
from recipes.flickr8k import RECIPE

TRAINING = {
    "smoke": True,
    "stages": ["train"],
    "num_train_examples": 16,
    "num_eval_examples": 2,
    "captions_per_image": 1,
    "max_steps": 3,
    "logging_steps": 1,
    "lora_dropout": 0.0,
}


def step_end(watchdog: DivergenceWatchdog, step: int, folder: Path, **wanted: bool) -> None:
    state = TrainerState(global_step=step)
    watchdog.on_step_end(TrainingArguments(output_dir=str(folder), use_cpu=True), state, TrainerControl(**wanted))


class Outputs(dict[str, torch.Tensor]):
    """What SFTTrainer's model returns: per-token log-probabilities, by key and by attribute."""

    @property
    def log_probs(self) -> torch.Tensor:
        return self["log_probs"]


class Model(nn.Module):
    def forward(self, log_probs: torch.Tensor) -> Outputs:
        return Outputs(log_probs=log_probs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_watchdog_names_the_step_of_a_loss_that_is_no_number(bad: float, tmp_path: Path) -> None:
    model = Model()
    watchdog = DivergenceWatchdog(model, loss_scale=lambda: None)
    model(torch.tensor([-1.0, -2.0]))
    step_end(watchdog, 6, tmp_path)
    model(torch.tensor([-1.0, bad]))
    step_end(watchdog, 7, tmp_path)  # a GPU would still be at it
    model(torch.tensor([-1.0, -2.0]))
    with pytest.raises(UserError, match="Step 7: the loss is not a number"):
        step_end(watchdog, 8, tmp_path)


@pytest.mark.parametrize("wanted", ["should_log", "should_save", "should_evaluate", "should_training_stop"])
def test_the_watchdog_looks_at_once_before_anything_of_a_step_is_kept(wanted: str, tmp_path: Path) -> None:
    model = Model()
    watchdog = DivergenceWatchdog(model, loss_scale=lambda: None)
    model(torch.tensor([float("nan")]))
    with pytest.raises(UserError, match="Step 7: the loss is not a number"):
        step_end(watchdog, 7, tmp_path, **{wanted: True})


def test_the_watchdog_names_the_step_of_a_collapsed_loss_scale(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    watchdog = DivergenceWatchdog(Model(), loss_scale=scaler.get_scale)
    for step in range(1, 10):
        # A gradient that overflows at every step, as a diverged fp16 run has it: the real scaler halves each time.
        scaler.scale((weight * float("inf")).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if scaler.get_scale() < 1:
            break
        step_end(watchdog, step, tmp_path)
    with pytest.raises(UserError, match=rf"Step {step}: the fp16 loss scale has collapsed to 0.5"):
        step_end(watchdog, step, tmp_path)


def test_the_watchdog_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = Model()
    watchdog = DivergenceWatchdog(model, loss_scale=lambda: None)
    watchdog.on_train_end(TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerState(), TrainerControl())
    assert not model._forward_hooks


def test_termination_is_only_asked_for_by_the_signal(tmp_path: Path) -> None:
    arguments, control = TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerControl()
    termination = SaveOnTermination()
    termination.on_step_end(arguments, TrainerState(), control)
    assert not control.should_training_stop
    termination.requested = True
    termination.on_step_end(arguments, TrainerState(), control)
    assert control.should_training_stop
    assert control.should_save


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_jsonl(folder / "training_log.jsonl") if "loss" in row]


def test_one_times_four_equals_four_times_one(tmp_path: Path) -> None:
    """Qwen-VL models switch upstream's token weighting off; unless it is switched on, updates differ by a third."""
    shapes: list[dict[str, Any]] = [
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    ]
    for number, shape in enumerate(shapes):
        run(RECIPE, {**TRAINING, **shape, "output_dir": str(tmp_path / str(number))})
    # The second and third losses feel the first update.
    assert losses(tmp_path / "0") == pytest.approx(losses(tmp_path / "1"), rel=1e-4)


def test_checkpointing_changes_memory_and_not_the_losses(tmp_path: Path) -> None:
    for flag in (True, False):
        run(RECIPE, {**TRAINING, "gradient_checkpointing": flag, "output_dir": str(tmp_path / str(flag))})
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-5)


def test_rows_of_like_length_are_grouped_the_longest_first(tmp_path: Path) -> None:
    """Lengths count visual tokens and all answers to an image."""
    flags = ["--smoke", "--num_train_examples", "64", "--num_eval_examples", "2", "--per_device_train_batch_size", "4"]
    prepared = prepare(
        Case("grouped"), RECIPE, [*flags, "--train_sampling_strategy", "group_by_length"], 1, tmp_path, False
    )
    trial = open_run(prepared, prepared.settings)
    rows, collator = prepare_training_rows(trial)
    model = add_adapter(trial.load_base(), trial.settings)
    trainer = build_trainer(model, trial.processing_class, rows, None, trainer_arguments(trial), collator)
    order = [int(index) for index in trainer._get_train_sampler()]
    lengths = [int(collator([rows[index]])["attention_mask"].sum()) for index in order]
    assert sorted(order) == list(range(64))
    assert lengths[0] == max(lengths)
    spreads = [max(batch) - min(batch) for start in range(0, 64, 4) if (batch := lengths[start : start + 4])]
    assert statistics.median(spreads) < (max(lengths) - min(lengths)) / 4


def test_throughput_is_logged_with_every_loss(tmp_path: Path) -> None:
    run(RECIPE, {**TRAINING, "output_dir": str(tmp_path / "run")})
    rows = [row for row in read_jsonl(tmp_path / "run" / "training_log.jsonl") if "loss" in row]
    for row in rows:
        assert row["samples_per_second"] > 0
        assert row["tokens_per_second"] > row["samples_per_second"]
        assert 0 <= row["data_wait_share"] < 1
        assert row["peak_gib"] > 0.1
        assert row["grad_norm"] > 0


def training_metrics(folder: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["train"]
    return metrics


def num_answers_of(folder: Path) -> float:
    """Those that the rate of a whole training stands for."""
    ending = read_jsonl(folder / "training_log.jsonl")[-1]
    rate = training_metrics(folder)["samples_per_second"]
    assert rate == ending["train_samples_per_second"]
    return rate * ending["train_runtime"]


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_the_rate_of_a_training_counts_answers_as_its_log_does(shared_prefix: bool, tmp_path: Path) -> None:
    """With five captions of an image in a row or in rows of their own; upstream counts rows."""
    flags = {"captions_per_image": 5, "shared_prefix": shared_prefix, "per_device_train_batch_size": 2}
    run(RECIPE, {**TRAINING, **flags, "gradient_accumulation_steps": 1, "output_dir": str(tmp_path)})
    assert num_answers_of(tmp_path) == pytest.approx(3 * 2 * (5 if shared_prefix else 1), rel=1e-3)


def test_the_rate_of_a_training_counts_the_conversations_of_packed_rows(tmp_path: Path) -> None:
    flags = {"num_train_examples": 40, "num_eval_examples": 2, "num_train_epochs": 1, "max_steps": -1}
    run(qwen_chat.RECIPE, {"smoke": True, "stages": ["train"], **flags, "output_dir": str(tmp_path)})
    assert training_metrics(tmp_path)["num_steps"] < 20
    assert num_answers_of(tmp_path) == pytest.approx(40, rel=1e-3)


def test_a_resumed_training_has_all_tokens_and_its_own_rate(tmp_path: Path) -> None:
    # The checkpoint lies between two logs.
    flags = {**TRAINING, "max_steps": 5, "save_steps": 3, "save_total_limit": 2, "logging_steps": 2}
    flags |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "keep_checkpoints": True}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(RECIPE, {**flags, "output_dir": str(whole)})
    shutil.copytree(whole, resumed)
    checkpoint = resumed / "checkpoints" / "checkpoint-3"
    run(RECIPE, {"resume_from_checkpoint": str(checkpoint), "output_dir": str(resumed)})
    tokens = [
        [row["num_tokens"] for row in read_jsonl(folder / "training_log.jsonl") if "num_tokens" in row]
        for folder in (whole, resumed)
    ]
    assert len(tokens[0]) == 3  # the last with the end of the training
    assert tokens[0] == tokens[1]
    trained = [training_metrics(folder) for folder in (whole, resumed)]
    assert trained[0]["num_tokens"] == trained[1]["num_tokens"]
    assert [round(num_answers_of(folder)) for folder in (whole, resumed)] == [10, 4]


# Nothing is learned: no evaluation is better than the first one, of step 2.
STOPPING = {
    **TRAINING,
    "max_steps": 14,
    "learning_rate": 0.0,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
    "save_total_limit": 7,
    "load_best_model_at_end": True,
    "keep_checkpoints": True,
}


@pytest.fixture(scope="module")
def stopped_early(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is left of a training with a patience of three evaluations: its checks miss what should have moved."""
    folder = tmp_path_factory.mktemp("stopped") / "whole"
    with pytest.raises(FailedCheckError):
        run(RECIPE, {**STOPPING, "early_stopping_patience": 3, "output_dir": str(folder)})
    assert training_metrics(folder)["num_steps"] == 8
    return folder


@pytest.mark.parametrize("flags", [{}, {"eval_on_start": True}], ids=["", "eval_on_start"])
@pytest.mark.parametrize("saved_at", [4, 6])
def test_a_resumed_training_stops_as_early(
    saved_at: int, flags: dict[str, Any], stopped_early: Path, tmp_path: Path
) -> None:
    resumed = tmp_path / "resumed"
    shutil.copytree(stopped_early, resumed)
    checkpoint = str(resumed / "checkpoints" / f"checkpoint-{saved_at}")
    with pytest.raises(FailedCheckError):
        run(RECIPE, {"resume_from_checkpoint": checkpoint, "output_dir": str(resumed), **flags})
    assert training_metrics(resumed)["num_steps"] == 8


def test_a_patience_may_come_with_the_resuming(tmp_path: Path) -> None:
    with pytest.raises(FailedCheckError):
        run(RECIPE, {**STOPPING, "max_steps": 4, "output_dir": str(tmp_path)})
    flags = {"resume_from_checkpoint": str(tmp_path / "checkpoints" / "checkpoint-4"), "max_steps": 14}
    with pytest.raises(FailedCheckError):
        run(RECIPE, {**flags, "early_stopping_patience": 2, "output_dir": str(tmp_path)})
    assert training_metrics(tmp_path)["num_steps"] == 8
