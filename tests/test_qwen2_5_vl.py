"""The Qwen2.5-VL recipe and the stage check, run as users run them."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import recipe_command
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import CPU, processing_class, settings_for

from qvl import check_stage, training_form
from qvl.check_stage import free_bytes
from qvl.errors import UserError
from qvl.flags import DEFAULT_STAGES, STAGES
from qvl.free_photos import PHOTOS, photo_paths
from qvl.kept_base import KeptBase
from qvl.model_names import ASSETS
from qvl.models import load_base
from qvl.recipe import main, run
from qvl.seeded_dropout import SeededDropout
from qvl.settings import parse_settings
from recipes import flickr8k, qwen2_5_vl, qwen_chat

ROOT = Path(__file__).parents[1]
SMOKE_LIMIT_SECONDS = 150
ALWAYS = {
    "vision_and_head_not_quantized",
    "lora_where_asked",
    "trainable_share_as_computed",
    "no_adapter_on_frozen_parts",
    "image_placeholders_equal_features_drawn",
    "another_image_changes_the_answer",
    "swapping_two_images_changes_the_answer",
    "blanking_the_text_changes_the_answer",
    "other_rows_of_the_batch_do_not_matter",
    "padding_does_not_matter_left",
    "own_image_likelier_share_before_training",
    "own_image_margin_after_training",
    "no_nan_or_infinity_in_any_output",
    "no_nan_or_infinity_in_any_gradient",
    "answers_that_differ_when_repeated",
    "answers_without_end",
    "share_of_answers_that_differ_in_a_batch",
    "repetition_rate",
    "frozen_tensors_unchanged",
    "every_adapter_pair_moved",
    "every_group_had_a_gradient",
    "adapter_off_gives_the_base_exactly",
    "saved_and_loaded_gives_the_same",
    "overfit_loss_ratio",
    # From the training itself.
    "image_placeholders_equal_features",
    "no_image_token_is_a_label",
}
OF_4_BIT = {
    "language_model_linears_4bit",
    "memory_footprint_as_computed",
    "4bit_divergence_from_full_weights",
    "own_image_share_lost_to_4bit_before_training",
    "own_image_margin_lost_to_4bit_after_training",
    "merge_divergence_4bit_base",
}


def checks_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in json.loads((folder / "checks.json").read_text(encoding="utf-8"))}


@pytest.mark.slow
@pytest.mark.parametrize("is_4bit", [True, False], ids=["4bit", "fp32"])
def test_smoke_runs_all_stages_and_checks(is_4bit: bool, tmp_path: Path) -> None:
    flags = [] if is_4bit else ["--load_in_4bit", "false"]
    screen, seconds = recipe_command("qwen2_5_vl", "--smoke", "--output_dir", str(tmp_path / "run"), *flags)
    assert seconds <= SMOKE_LIMIT_SECONDS
    found = checks_of(tmp_path / "run")
    assert all(check["passed"] for check in found.values())
    missing = (ALWAYS | (OF_4_BIT if is_4bit else {"merge_divergence_full_base"})) - found.keys()
    # Full weights are loaded beside only where they fit.
    assert missing <= (set() if "Not compared" not in screen else OF_4_BIT)
    for name in ("overfit_loss_ratio", "repetition_rate"):
        assert f"ok   {name}: " in screen
    for photo in photo_paths():
        assert f"\n  {photo.stem}: " in screen
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["finetuned"]["bleu4"] >= 0.4
    assert (tmp_path / "run" / "report.html").is_file()
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (record,) = client.search_runs(experiments)
    assert record.data.metrics["num_checks_failed"] == 0
    assert record.data.metrics["check_overfit_loss_ratio"] == pytest.approx(found["overfit_loss_ratio"]["value"])


@pytest.mark.slow
def test_a_failed_check_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model whose merger gives zeros for every image."""
    model = tmp_path / "blind"
    shutil.copytree(ASSETS / "tiny-qwen2.5-vl", model)
    weights = load_file(model / "model.safetensors")
    for name in [name for name in weights if "merger.mlp.2" in name]:
        weights[name].zero_()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit) as ended:
        main(qwen2_5_vl.RECIPE, ["--smoke", "--output_dir", str(tmp_path / "run"), "--model_name_or_path", str(model)])
    assert ended.value.code == 1
    screen, errors = capsys.readouterr()
    assert "Traceback" not in screen + errors
    assert "== train ==" not in screen, "nothing is trained on what cannot be trusted"
    assert "FAIL another_image_changes_the_answer" in screen
    found = checks_of(tmp_path / "run")
    failed = {name for name, check in found.items() if not check["passed"]}
    assert {"another_image_changes_the_answer", "own_image_margin_before_training"} <= failed
    assert found["saved_and_loaded_gives_the_same"]["passed"], "the others are still checked"
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (record,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert record.info.status == "FAILED"
    assert record.data.metrics["num_checks_failed"] == len(failed)


@pytest.mark.slow
def test_the_stage_checks_a_text_only_recipe_too(tmp_path: Path) -> None:
    run(qwen_chat.RECIPE, {"smoke": True, "stages": ["check"], "output_dir": str(tmp_path / "run")})
    found = checks_of(tmp_path / "run")
    assert all(check["passed"] for check in found.values())
    assert {"overfit_loss_ratio", "padding_does_not_matter_left", "repetition_rate"} <= found.keys()
    assert not [name for name in found if "image" in name]


def test_too_few_rows_to_compare_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--num_eval_examples"):
        run(
            flickr8k.RECIPE,
            {"smoke": True, "stages": ["check"], "num_eval_examples": 1, "output_dir": str(tmp_path / "run")},
        )


def test_the_stage_check_is_no_default_of_other_recipes() -> None:
    assert STAGES[0] == "check" and "check" not in DEFAULT_STAGES
    for recipe in (flickr8k.RECIPE, qwen_chat.RECIPE):
        assert "check" not in parse_settings(recipe.defaults, recipe.smoke, []).recipe.stages
    settings = parse_settings(qwen2_5_vl.DEFAULTS, qwen2_5_vl.SMOKE, [])
    assert settings.recipe.stages == ["check", "train", "evaluate", "report"]
    assert settings.model.load_in_4bit and settings.model.bnb_4bit_quant_type == "nf4"


def test_the_photos_are_small_and_their_licences_named() -> None:
    names = {line.split("\t")[0] for line in (PHOTOS / "LICENSES.tsv").read_text(encoding="utf-8").splitlines()[1:]}
    assert names == {path.name for path in photo_paths()}
    assert len(names) == 15
    assert sum(path.stat().st_size for path in photo_paths()) < 600_000
    for path in photo_paths():
        with Image.open(path) as photo:
            assert max(photo.size) == 384


def test_free_memory_is_a_sensible_number() -> None:
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**46


@pytest.mark.slow
def test_a_checkpoint_that_comes_in_4_bits_is_no_full_precision_and_no_base_for_the_next_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe's own flags ask for 4 bits with nested scales; the checkpoint has them, without."""
    four_bit = load_base(settings_for("qvl/tiny-qwen2.5-vl", "--load_in_4bit"), CPU)
    four_bit.save_pretrained(tmp_path / "model")
    processing_class("qvl/tiny-qwen2.5-vl").save_pretrained(tmp_path / "model")
    kept = KeptBase()
    flags = {"smoke": True, "stages": ["check"], "model_name_or_path": str(tmp_path / "model")}
    run(qwen2_5_vl.RECIPE, {**flags, "output_dir": str(tmp_path / "run")}, kept=kept)
    found = checks_of(tmp_path / "run")
    assert all(check["passed"] for check in found.values())
    assert {"merge_divergence_4bit_base", "memory_footprint_as_computed"} <= found.keys()
    assert not {"merge_divergence_full_base", "4bit_divergence_from_full_weights"} & found.keys()
    assert "this checkpoint comes quantized" in capsys.readouterr().out
    settings = parse_settings(qwen2_5_vl.DEFAULTS, qwen2_5_vl.SMOKE, [], flags)
    kept.load(settings, CPU)
    assert kept.num_loaded == 2, "the first one holds a merged adapter now"


@pytest.mark.slow
def test_the_check_trains_with_the_dropout_that_compiled_layers_can_compute_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where a compiled layer would draw other numbers in its backward pass; nothing is compiled here."""
    seen: list[type[torch.nn.Module]] = []
    rates: list[float] = []

    class FarEnoughError(Exception):
        pass

    def built(model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        seen.extend(type(module) for module in model.modules())
        rates.append(args[3].learning_rate)
        raise FarEnoughError

    monkeypatch.setattr(training_form, "trains_compiled", lambda settings: True)
    monkeypatch.setattr(training_form, "compiled_layers", lambda base, **kwargs: nullcontext())
    monkeypatch.setattr(check_stage, "build_trainer", built)
    flags = {"smoke": True, "stages": ["check"], "lora_dropout": 0.05, "output_dir": str(tmp_path / "run")}
    with pytest.raises(FarEnoughError):
        run(qwen_chat.RECIPE, {**flags, "learning_rate": 2e-5})
    assert rates == [2e-4], "with its own rate the run would not learn its rows in sixty steps"
    assert SeededDropout in seen and torch.nn.Dropout not in seen
