"""Parts that are trained whole beside LoRA: they move at their own rates, and all that is read from the list agrees."""

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from tiny import CHAT, CPU, LLAVA, VISION, answered, base, message, picture, processing_class, settings_for

from qvl.active_run import Run
from qvl.adapter_checks import check_lora_placement
from qvl.adapters import add_adapter, load_adapter, report_parameters, require_adapter_in_language_model
from qvl.answer_distributions import answer_distributions
from qvl.bench_cases import Case, open_run, prepare
from qvl.checks import check_frozen, check_parts_trained, failed, hash_parameters
from qvl.collators import CompletionCollator
from qvl.errors import UserError
from qvl.files import read_jsonl
from qvl.models import load_base, skeleton
from qvl.recipe import run
from qvl.train_stage import trainer_arguments
from qvl.trained_model import load_trained
from qvl.trained_parts import (
    TrainedPart,
    optimizer_groups,
    round_to_base,
    rounded_to_base,
    take_off,
    trained_parts,
    whole_parts,
)
from qvl.trainer import CompletionTrainer, build_trainer, train
from qvl.training_rows import prepare_training_rows
from recipes import flickr8k, qwen2_5_vl

RECIPES = {VISION[0]: flickr8k.RECIPE, VISION[1]: qwen2_5_vl.RECIPE}
BOTH = ["--train_merger", "--train_vision_tower"]
SMALL = ["--num_train_examples", "8", "--num_eval_examples", "2", "--captions_per_image", "1", "--lora_dropout", "0"]
SMALL += ["--per_device_train_batch_size", "2"]
NAMES = pytest.mark.parametrize("name", VISION)


def adapted(name: str, *flags: str) -> PeftModel:
    return add_adapter(copy.deepcopy(base(name)), settings_for(name, *flags))


def distributions(model: Any, name: str) -> list[torch.Tensor]:
    rows = [answered("What is this?", "a red circle", [picture(96, 64, seed)]) for seed in range(2)]
    return answer_distributions(model, rows, CompletionCollator(processing_class(name), None))


def prepared(name: str, folder: Path, *flags: str) -> tuple[Run, CompletionTrainer, Dataset]:
    """A trainer as the stage train makes it."""
    folder.mkdir(exist_ok=True)
    case = prepare(Case("parts"), RECIPES[name], ["--smoke", *SMALL, "--max_steps", "2", *flags], 1, folder, False)
    trial = open_run(case, case.settings)
    rows, collator = prepare_training_rows(trial)
    parts = trained_parts(trial.load_base(), trial.settings)
    model = add_adapter(trial.load_base(), trial.settings)
    arguments = trainer_arguments(trial)
    trainer = build_trainer(model, trial.processing_class, rows, None, arguments, collator, parts=parts)
    return trial, trainer, rows


def moved(before: dict[str, int], after: dict[str, int]) -> set[str]:
    """Kinds of what changed: a part's name, or lora."""
    parts = {"merger": ("merger.", "merger_list."), "vision_tower": ("blocks.", "patch_embed.", "pos_embed.")}
    changed = {name for name in after if after[name] != before[name]}
    return {
        "lora"
        if ".lora_" in name
        else next(p for p, keys in parts.items() if any(f"visual.{key}" in name or f"_{key}" in name for key in keys))
        for name in changed
    }


# --- where the parts lie


@NAMES
def test_merger_and_tower_are_the_whole_vision_model(name: str) -> None:
    parts = [TrainedPart(part, paths) for part, paths in whole_parts(base(name)).items()]
    assert [part.name for part in parts] == ["merger", "vision_tower"]
    for key, _ in base(name).named_parameters():
        holders = [part.name for part in parts if part.holds(key)]
        assert len(holders) == (".visual." in key), f"{key}: {holders}"
        assert (holders == ["merger"]) == ("merger" in key), "DeepStack's mergers map to the language model too"
    assert whole_parts(skeleton(base(name).config)) == whole_parts(base(name)), "no weights are needed to know"


@pytest.mark.parametrize("name", [CHAT, LLAVA])
def test_a_model_without_the_part_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"--train_merger: .* has none"):
        trained_parts(base(name), settings_for(CHAT, "--train_merger"))


def test_the_refusal_comes_before_anything_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="--train_vision_tower: Qwen3ForCausalLM has none"):
        run(
            flickr8k.RECIPE,
            {
                "smoke": True,
                "model_name_or_path": CHAT,
                "train_vision_tower": True,
                "output_dir": str(tmp_path / "run"),
            },
        )
    assert "Loading qvl/" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--merger_learning_rate", "1e-5"], "no effect without --train_merger"),
        (["--train_merger", "--merger_learning_rate", "-1"], "cannot be below 0"),
        (["--train_merger", "--cache_vision_features"], "--train_merger changes what --cache_vision_features"),
        (["--train_vision_tower", "--cache_vision_features"], "--train_vision_tower changes what"),
    ],
)
def test_flags_that_do_not_go_together(flags: Sequence[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings_for(VISION[0], *flags)


# --- what may move


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        (VISION[0], ["--train_merger"], {"lora", "merger"}),
        (VISION[1], ["--train_vision_tower", "--vision_tower_learning_rate", "1e-4"], {"lora", "vision_tower"}),
        (VISION[0], [*BOTH, "--merger_learning_rate", "0"], {"lora", "vision_tower"}),
        (VISION[1], [*BOTH, "--vision_tower_learning_rate", "0"], {"lora", "merger"}),
    ],
)
def test_what_was_asked_for_moves_at_its_own_rate(
    name: str, flags: list[str], expected: set[str], tmp_path: Path
) -> None:
    _, trainer, _ = prepared(name, tmp_path, *flags)
    before = hash_parameters(trainer.model)
    trainable = {key for key, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    train(trainer, lambda logs, step: None, None)
    after = hash_parameters(trainer.model)
    assert moved(before, after) == expected
    assert check_frozen(before, after, trainable).passed


def test_groups_hold_every_trained_parameter_once() -> None:
    model = adapted(VISION[0], *BOTH)
    there = whole_parts(base(VISION[0]))
    parts = [TrainedPart("merger", there["merger"], 1e-5), TrainedPart("vision_tower", there["vision_tower"], None)]
    decaying = {name for name, _ in model.named_parameters() if "norm" not in name and not name.endswith("bias")}
    groups = optimizer_groups(model, parts, decaying, 2e-4, 0.1)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (2e-4, 0.1),
        (2e-4, 0.0),
        (1e-5, 0.1),
        (1e-5, 0.0),
    ]
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    assert all("merger" in names[id(p)] for group in groups[2:] for p in group["params"])


@NAMES
def test_the_schedule_shapes_every_rate(name: str, tmp_path: Path) -> None:
    flags = ["--learning_rate", "1e-3", "--lr_scheduler_type", "linear", "--merger_learning_rate", "1e-4", "--optim"]
    _, trainer, _ = prepared(name, tmp_path, *BOTH, *flags, "adamw_torch", "--weight_decay", "0.1")
    trainer.create_optimizer_and_scheduler(num_training_steps=4)
    optimizer, schedule = trainer.optimizer, trainer.lr_scheduler
    assert type(optimizer) is torch.optim.AdamW
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3, 1e-4, 1e-4]
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([7.5e-4, 7.5e-4, 7.5e-5, 7.5e-5])


# --- what the checks say


@NAMES
def test_the_checks_know_what_was_asked_for(name: str) -> None:
    settings = settings_for(name, *BOTH)
    model, parts = adapted(name, *BOTH), trained_parts(base(name), settings)
    require_adapter_in_language_model(report_parameters(model, parts))
    targets, rank = settings.model.lora_target_modules, settings.model.lora_r
    assert failed(check_lora_placement(model, targets, rank, parts)) == []
    assert failed(check_parts_trained(model, parts)) == []
    # Asked for less: what is trained beyond that stands out.
    with pytest.raises(UserError, match=r"outside the language model, .*--train_merger"):
        require_adapter_in_language_model(report_parameters(model, parts[:1]))
    assert [c.name for c in failed(check_lora_placement(model, targets, rank, parts[1:]))] == [
        "no_adapter_on_frozen_parts"
    ]


@NAMES
def test_a_part_that_is_asked_for_and_frozen_fails(name: str) -> None:
    model, parts = adapted(name, *BOTH), trained_parts(base(name), settings_for(name, *BOTH))
    copies = [key for key, _ in model.named_parameters() if "blocks.1.modules_to_save" in key]
    model.get_parameter(copies[0]).requires_grad = False
    assert [check.name for check in failed(check_parts_trained(model, parts))] == ["vision_tower_is_trained_whole"]
    assert [c.name for c in failed(check_parts_trained(adapted(name), parts[:1]))] == ["merger_is_trained_whole"]


@pytest.mark.slow
def test_the_check_stage_passes_with_both_parts(tmp_path: Path) -> None:
    """With checkpointing, as the real runs have it: gradients have to find their way into the tower."""
    flags = ["--vision_tower_learning_rate", "1e-3", "--load_in_4bit", "false", "--gradient_checkpointing"]
    arguments = ["--smoke", "--stages", "check", *BOTH, *flags]
    run(qwen2_5_vl.RECIPE, {"output_dir": str(tmp_path / "run"), "num_train_examples": 16}, arguments)
    checks = (tmp_path / "run" / "checks.json").read_text(encoding="utf-8")
    for check in ("merger_is_trained_whole", "every_group_had_a_gradient", "saved_and_loaded_gives_the_same"):
        assert check in checks


# --- formats, saving, loading, going on


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        (VISION[0], ["--dtype", "bfloat16", "--bf16"]),
        (VISION[1], []),
        (VISION[1], ["--dtype", "bfloat16", "--bf16", "false"]),
        (VISION[1], ["--load_in_4bit"]),
    ],
)
def test_what_is_saved_is_what_is_loaded(name: str, flags: list[str], tmp_path: Path) -> None:
    """Mixed precision trains in fp32 and saves in the base's format, which a fresh base then gives exactly."""
    trial, trainer, _ = prepared(name, tmp_path / "trial", *BOTH, "--load_in_4bit", "false", *flags)
    model, fresh = trainer.model, load_base(trial.settings, CPU)
    copies = {key: p for key, p in model.named_parameters() if ".modules_to_save." in key}
    for key, parameter in copies.items():
        original = fresh.get_parameter(key.removeprefix("base_model.model.").replace("modules_to_save.default.", ""))
        assert torch.equal(parameter.detach().float(), original.float()), f"{key} does not start from the base's values"
    formats = {parameter.dtype for parameter in copies.values()}
    assert formats == {torch.bfloat16 if "false" in flags else torch.float32}
    train(trainer, lambda logs, step: None, None)
    masters = {key: parameter.detach().clone() for key, parameter in copies.items()}
    with rounded_to_base(model):
        while_training = distributions(model, name)
    assert all(torch.equal(masters[key], parameter) for key, parameter in copies.items())
    round_to_base(model)
    assert {parameter.dtype for parameter in copies.values()} == {fresh.dtype}
    expected = distributions(model, name)
    before = distributions(fresh, name)
    model.save_pretrained(tmp_path / "adapter")
    loaded = distributions(load_adapter(fresh, tmp_path / "adapter"), name)
    for found, other, wanted, at_first in zip(loaded, while_training, expected, before, strict=True):
        assert torch.equal(found, wanted) and torch.equal(other, wanted)
        assert not torch.equal(found, at_first)


@NAMES
def test_the_base_is_left_as_it_was(name: str) -> None:
    before = distributions(base(name), name)
    model = adapted(name, *BOTH)
    for key, parameter in model.named_parameters():
        if ".modules_to_save." in key:
            parameter.data += 0.1
    assert not torch.equal(distributions(model, name)[0], before[0])
    alone = take_off(model)
    assert {key for key, _ in alone.named_parameters()} == {key for key, _ in base(name).named_parameters()}
    assert all(map(torch.equal, distributions(alone, name), before))


@pytest.mark.slow
def test_a_run_and_one_that_was_resumed_are_the_same_and_can_be_talked_to(tmp_path: Path) -> None:
    name = VISION[0]
    rates = ["--merger_learning_rate", "2e-3", "--vision_tower_learning_rate", "3e-4"]
    flags = ["--smoke", *SMALL, *BOTH, *rates, "--max_steps", "4", "--save_steps", "2", "--save_total_limit", "4"]
    flags += ["--load_in_4bit", "false", "--keep_checkpoints"]
    folder = tmp_path / "run"
    run(RECIPES[name], {"output_dir": str(folder), "stages": ["train", "evaluate"]}, flags)
    through = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert any("merger" in key for key in through) and any("blocks.2" in key for key in through)

    trained = load_trained(folder / "adapter", base_only=False, flags={"use_cpu": True, "max_new_tokens": 40})
    recorded = read_jsonl(folder / "finetuned_predictions.jsonl")[0]
    data = prepare(Case("parts"), RECIPES[name], ["--smoke", *SMALL], 1, tmp_path, False).data
    answer = trained.answer([message("user", recorded["prompt"], 1)], data.evaluation[0]["images"])
    assert answer == recorded["prediction"]

    checkpoint = folder / "checkpoints" / "checkpoint-2"
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    run(RECIPES[name], {"resume_from_checkpoint": str(checkpoint), "stages": ["train"]})
    again = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert again.keys() == through.keys()
    for key, expected in through.items():
        torch.testing.assert_close(again[key], expected, rtol=1e-5, atol=1e-7)


def test_an_adapter_without_the_part_cannot_go_on_with_it(tmp_path: Path) -> None:
    adapted(VISION[1], "--train_merger").save_pretrained(tmp_path / "merger")
    flags = ["--adapter", str(tmp_path / "merger")]
    assert (
        failed(
            check_parts_trained(
                adapted(VISION[1], *flags, "--train_merger"),
                trained_parts(base(VISION[1]), settings_for(VISION[1], "--train_merger")),
            )
        )
        == []
    )
    with pytest.raises(UserError, match="holds no vision_tower to train further"):
        adapted(VISION[1], *flags, *BOTH)
    with pytest.raises(UserError, match="--train_merger"):
        require_adapter_in_language_model(report_parameters(adapted(VISION[1], *flags)))
