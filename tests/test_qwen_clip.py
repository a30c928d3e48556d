"""The CLIP recipe and what comes of it, run as users run them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import recipe_command
from PIL import Image
from safetensors.torch import load_file
from tiny import CPU, settings_for
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from qvl import scenes
from qvl.adapters import load_adapter
from qvl.chat import main
from qvl.collators import CompletionCollator
from qvl.errors import FailedCheckError, UserError
from qvl.export import main as export
from qvl.files import read_jsonl
from qvl.models import load_base, load_processing_class
from qvl.recipe import run
from qvl.trained_model import load_trained
from recipes.qwen_clip import DEFAULTS, RECIPE, SMOKE

ROOT = Path(__file__).parents[1]
SMOKE_LIMIT_SECONDS = 180
# Measured: BLEU-4 0.639 of pictures, 0.244 of noise.
LEAST_ABOVE_NOISE = 0.3
# What the stage check measures of answers.
OF_ANSWERS = {
    "blanking_the_text_changes_the_answer",
    "another_image_changes_the_answer",
    "own_image_margin_before_training",
    "own_image_margin_after_training",
    "answers_without_end",
    "repetition_rate",
}
SHORT = {
    "smoke": True,
    "num_train_examples": 16,
    "num_eval_examples": 4,
    "captions_per_image": 1,
    "per_device_train_batch_size": 4,
    "max_new_tokens": 4,
    "logging_steps": 1,
}


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def checks_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in json.loads((folder / "checks.json").read_text(encoding="utf-8"))}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def smoke(outputs: Path) -> tuple[Path, str, float]:
    """The smoke run's folder, what it printed, and the processor time it took: others may be using the cores."""
    folder = outputs / "smoke"
    flags = ["--output_dir", str(folder), "--vision_cache_dir", str(outputs / "features")]
    screen, seconds = recipe_command("qwen_clip", "--smoke", *flags)
    return folder, screen, seconds


@pytest.mark.slow
def test_it_learns_to_see(smoke: tuple[Path, str, float], outputs: Path) -> None:
    """Far above the start, and above the same model shown noise, which makes up captions in the right style."""
    folder, screen, seconds = smoke
    assert "Warning" not in screen and "UNEXPECTED" not in screen
    assert seconds <= SMOKE_LIMIT_SECONDS
    metrics = metrics_of(folder)
    seen = metrics["finetuned"]["bleu4"]
    noise = scenes.write_scenes(outputs / "noise", 4, SMOKE["num_eval_examples"], DEFAULTS["seed"])
    for number, path in enumerate(sorted((noise / "images").iterdir())):
        pixels = np.random.default_rng(number).integers(0, 256, (128, 128, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    flags = {
        "smoke": True,
        "stages": ["evaluate"],
        "adapter": str(folder / "adapter"),
        "dataset_name": str(noise),
        "output_dir": str(outputs / "on_noise"),
        "vision_cache_dir": str(outputs / "features"),
    }
    blind = run(RECIPE, flags)["finetuned_bleu4"]
    assert seen >= blind + LEAST_ABOVE_NOISE
    assert seen >= metrics["baseline"]["bleu4"] + 0.3


@pytest.mark.slow
def test_the_projector_moves_in_both_phases_and_lora_in_the_second(smoke: tuple[Path, str, float]) -> None:
    folder, screen, _ = smoke
    checks = checks_of(folder)
    assert all(check["passed"] for check in checks.values())
    expected = {
        "projector_moved_in_align",
        "lora_still_in_align",
        "projector_moved_in_instruct",
        "lora_moved_in_instruct",
        "projector_is_trained_whole",
        "image_placeholders_equal_features",
        "adapter_off_gives_the_base_exactly",
    }
    assert expected <= checks.keys()
    assert f"Step {SMOKE['max_steps'] // 4}: the projector is aligned" in screen


@pytest.mark.slow
def test_one_folder_holds_both_and_gives_equal_logits_on_a_fresh_base(smoke: tuple[Path, str, float]) -> None:
    adapter = smoke[0] / "adapter"
    names = load_file(adapter / "adapter_model.safetensors").keys()
    assert any(".lora_A." in name for name in names)
    assert "base_model.model.model.multi_modal_projector.linear_1.weight" in names
    trained = json.loads((adapter / "trained_with.json").read_text(encoding="utf-8"))
    known = {key: trained[key] for key in ("base_model_name_or_path", "vision_encoder", "num_image_tokens")}
    assert known == {
        "base_model_name_or_path": SMOKE["model_name_or_path"],
        "vision_encoder": SMOKE["vision_encoder"],
        "num_image_tokens": 64,
    }
    assert trained["image_token_row"] == load_processing_class(settings_of(), adapter).image_token_id
    assert "transformers" in trained["serving"]
    scene = scenes.make_scene(3, seed=11, split="test")
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": scenes.PROMPT}]}]
    example = {
        "where": "here",
        "images": [scenes.draw(scene)],
        "prompt": prompt,
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": scenes.captions(scene)[0]}]}],
    }
    batch = CompletionCollator(load_processing_class(settings_of(), adapter), None)([example])
    logits = []
    for _ in range(2):
        model = load_adapter(load_base(settings_of(), CPU), adapter).eval()
        with torch.no_grad():
            logits.append(model(**batch).logits)
    assert torch.equal(*logits)
    with torch.no_grad(), model.disable_adapter():
        assert not torch.allclose(model(**batch).logits, logits[0], atol=0.1)


def settings_of(*argv: str) -> Any:
    return settings_for(SMOKE["model_name_or_path"], "--vision_encoder", SMOKE["vision_encoder"], *argv)


@pytest.mark.slow
def test_chat_looks_at_a_picture_with_the_adapter_and_with_the_model_merged_from_it(
    smoke: tuple[Path, str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, merged = smoke[0] / "adapter", tmp_path / "merged"
    row = read_jsonl(smoke[0] / "finetuned_predictions.jsonl")[0]
    scene = scenes.make_scene(0, DEFAULTS["seed"], "test")
    scenes.draw(scene).save(tmp_path / "scene.png")
    flags = ["--image", str(tmp_path / "scene.png"), "--prompt", scenes.PROMPT, "--max_new_tokens", "40"]
    with pytest.raises(SystemExit) as stopped:
        export(["--adapter", str(adapter), "--format", "merged", "--out", str(merged)])
    assert stopped.value.code == 0
    assert type(AutoModelForImageTextToText.from_pretrained(merged)) is LlavaForConditionalGeneration
    assert "Serving it" not in (merged / "README.md").read_text(encoding="utf-8"), "which is what an adapter needs"
    capsys.readouterr()
    for folder in (adapter, merged):
        with pytest.raises(SystemExit) as stopped:
            main(["--adapter", str(folder), *flags])
        assert (stopped.value.code, capsys.readouterr().out) == (0, row["prediction"] + "\n")


@pytest.mark.slow
def test_an_adapter_for_other_image_tokens_is_refused(smoke: tuple[Path, str, float]) -> None:
    base = load_base(settings_of("--num_image_tokens", "16"), CPU)
    with pytest.raises(UserError, match=r"num_image_tokens 64, and this base has 16: .*--num_image_tokens"):
        load_adapter(base, smoke[0] / "adapter")


@pytest.mark.slow
def test_a_resumed_training_is_the_uninterrupted_one_across_the_phases(outputs: Path) -> None:
    flags = {
        **SHORT,
        "stages": ["train"],
        "max_steps": 4,
        "align_share": 0.5,
        "num_image_tokens": 16,
        "save_steps": 1,
        "save_total_limit": 5,
        "keep_checkpoints": True,
        "vision_cache_dir": str(outputs / "features"),
        "output_dir": str(outputs / "whole"),
    }
    run(RECIPE, flags)
    folder = outputs / "whole"
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    trained = json.loads((folder / "adapter" / "trained_with.json").read_text(encoding="utf-8"))
    assert trained["num_image_tokens"] == 16 and "needs qvl" in trained["serving"]
    partner = load_trained(folder / "adapter", False, {"max_new_tokens": 2})
    assert partner.model.get_base_model().model.multi_modal_projector.original_module.num_image_tokens == 16
    checkpoint = folder / "checkpoints" / "checkpoint-1"
    aligned = load_file(checkpoint / "adapter_model.safetensors")
    assert not any(tensor.any() for name, tensor in aligned.items() if ".lora_B." in name), "align has no LoRA"
    run(RECIPE, {**flags, "resume_from_checkpoint": str(checkpoint)})
    again = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(torch.allclose(again[name], tensor, atol=1e-6) for name, tensor in weights.items())
    assert any(tensor.any() for name, tensor in again.items() if ".lora_B." in name)


@pytest.mark.slow
def test_align_alone_trains_no_lora_and_its_adapter_goes_on(outputs: Path) -> None:
    common = {**SHORT, "stages": ["train"], "max_steps": 2, "vision_cache_dir": str(outputs / "features")}
    run(RECIPE, {**common, "phase": ["align"], "output_dir": str(outputs / "align")})
    assert checks_of(outputs / "align")["lora_still_in_align"]["passed"]
    adapter = outputs / "align" / "adapter"
    run(RECIPE, {**common, "phase": ["instruct"], "adapter": str(adapter), "output_dir": str(outputs / "instruct")})
    checks = checks_of(outputs / "instruct")
    assert checks["lora_moved_in_instruct"]["passed"] and checks["projector_moved_in_instruct"]["passed"]
    assert "lora_still_in_align" not in checks


@pytest.mark.slow
def test_a_projector_as_it_was_drawn_is_not_asked_for_answers(
    outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(RECIPE, {"smoke": True, "stages": ["check"], "output_dir": str(outputs / "check")})
    checks, screen = checks_of(outputs / "check"), capsys.readouterr().out
    assert all(check["passed"] for check in checks.values()) and "overfit_loss_ratio" in checks
    assert checks.keys().isdisjoint(OF_ANSWERS)
    assert "--adapter RUN/adapter checks a trained one" in screen and "free photos" not in screen


@pytest.mark.slow
def test_answers_are_checked_with_the_adapter(
    smoke: tuple[Path, str, float], outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"smoke": True, "stages": ["check"], "adapter": str(smoke[0] / "adapter")}
    # Trained on one instruction alone it looks at the picture and hardly at the words.
    with pytest.raises(FailedCheckError, match="blanking_the_text_changes_the_answer"):
        run(RECIPE, {**flags, "output_dir": str(outputs / "check_adapter")})
    checks = checks_of(outputs / "check_adapter")
    assert checks.keys() >= OF_ANSWERS
    failed = {name for name, check in checks.items() if not check["passed"]}
    assert failed == {"blanking_the_text_changes_the_answer"}
    assert "The free photos, as the model with the adapter sees them" in capsys.readouterr().out


def test_rows_without_images_cannot_teach_a_projector(outputs: Path) -> None:
    turns = [("user", "Say it again : {} stars ."), ("assistant", "{} stars .")]
    rows = [{"messages": [{"role": role, "content": text.format(n)} for role, text in turns]} for n in range(24)]
    data = outputs / "text.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = {**SHORT, "dataset_name": str(data), "stages": ["train"], "output_dir": str(outputs / "text")}
    with pytest.raises(UserError, match=r"no training row .* has an image.*--train_projector false --phase instruct"):
        run(RECIPE, flags)


@pytest.mark.slow
def test_images_as_words_take_the_same_path(outputs: Path) -> None:
    flags = {**SHORT, "vision_mode": "text", "max_steps": 2}
    run(RECIPE, {**flags, "output_dir": str(outputs / "words")})
    rows = read_jsonl(outputs / "words" / "finetuned_predictions.jsonl")
    assert all(row["prompt"].startswith("[Image: ") and row["image"] for row in rows)
    page = (outputs / "words" / "report.html").read_text(encoding="utf-8")
    assert "data:image/" in page, "the report shows the pictures"
    config = json.loads((outputs / "words" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["modules_to_save"] is None


def test_defaults_are_those_of_the_issue() -> None:
    expected = {
        "model_name_or_path": "Qwen/Qwen3-14B",
        "vision_encoder": "openai/clip-vit-large-patch14",
        "load_in_4bit": True,
        "num_image_tokens": 256,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 12,
        "max_length": 2048,
        "max_steps": 2000,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "phase": ["align", "instruct"],
    }
    assert {key: DEFAULTS[key] for key in expected} == expected
