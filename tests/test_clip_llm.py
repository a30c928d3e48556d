"""A CLIP and a text-only Qwen as one model: put together, taught in phases, saved, loaded, asked."""

import contextlib
import functools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from tiny import CPU, answered, conversation, message, picture, settings_for
from transformers import (
    CLIPVisionConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from qvl.adapters import lora_config, report_parameters, require_adapter_in_language_model
from qvl.clip_llm import IMAGE_TOKEN, add_image_token, composition_record
from qvl.collators import CompletionCollator
from qvl.data import DataConfig, load_examples
from qvl.dry_run import dry_run
from qvl.encode import segments, tokenize
from qvl.errors import UserError
from qvl.examples import undecoded_examples
from qvl.features import encoder_inputs, require_frozen_vision
from qvl.generate import PromptCollator
from qvl.held_out import token_sums
from qvl.image_projector import ImageProjector, image_token_counts, pooled, projector_inputs
from qvl.image_template import with_images
from qvl.image_words import answer_words, images_as_words, zero_shot_tags
from qvl.model_card import Exported, model_card
from qvl.model_names import model_source
from qvl.models import load_base, load_config, load_processing_class, quantization, skeleton
from qvl.pretrain_clip import make_clip_processor
from qvl.settings import Settings
from qvl.trained_parts import trained_parts
from qvl.training_phases import PhaseSwitch, switch_lora

CLIP, TEXT = "qvl/tiny-clip", "qvl/tiny-qwen3-text"
SHARED_MODELS = Path(os.environ.get("QVL_SHARED", Path(__file__).parents[2] / "shared")) / "models"
REAL = ["Qwen3-14B", "Qwen2.5-14B-Instruct"]
needs_shapes = pytest.mark.skipif(not SHARED_MODELS.is_dir(), reason="needs the real models' shapes")
needs_features = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"), reason="models take no features before transformers 5.18"
)
QUESTION = "Describe the image in one sentence."


def composed(*argv: str, name: str = TEXT, encoder: str = CLIP) -> Settings:
    return settings_for(name, "--vision_encoder", encoder, "--train_projector", *argv)


@functools.cache
def base(*argv: str) -> Any:
    """A composition that no test may change."""
    return load_base(composed(*argv), CPU)


@functools.cache
def processor(*argv: str) -> Any:
    return load_processing_class(composed(*argv))


def batch_of(*argv: str, num_images: int = 2) -> dict[str, torch.Tensor]:
    rows = [answered(QUESTION, "A small red circle .", [picture(96, 128, seed)]) for seed in range(num_images)]
    return CompletionCollator(processor(*argv), None)(rows)


# --- put together


def test_a_composition_is_plain_llava(tmp_path: Path) -> None:
    model = base()
    assert type(model) is LlavaForConditionalGeneration and type(processor()) is LlavaProcessor
    batch = batch_of()
    assert int((batch["input_ids"] == model.config.image_token_id).sum()) == 2 * 64
    with torch.no_grad():
        logits = model(**batch).logits
        swapped = model(**{**batch, "pixel_values": batch["pixel_values"].flip(0)}).logits
    assert (logits - swapped).abs().max() > 1e-3, "it looks at its images"
    model.save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert type(plain.model.multi_modal_projector) is LlavaMultiModalProjector
    with torch.no_grad():
        assert torch.equal(plain(**batch).logits, logits), "transformers alone computes the same"
    again = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert (
        tokenize([IMAGE_TOKEN], [picture(30, 50)], again)[0]
        == tokenize([IMAGE_TOKEN], [picture(30, 50)], processor())[0]
    )


def test_parts_are_those_of_the_checkpoints_and_no_embedding_is_resized() -> None:
    text = load_base(settings_for(TEXT), CPU)
    model = base()
    assert model.get_input_embeddings().weight.shape == text.get_input_embeddings().weight.shape
    for name, tensor in text.model.state_dict().items():
        assert torch.equal(model.model.language_model.state_dict()[name], tensor), name
    assert model.lm_head.weight is model.get_input_embeddings().weight, "tied as in the checkpoint"
    prompt = [message("user", "Say it in other words : A red star .")]
    ids = processor().apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    ids = torch.tensor(tokenize([processor().apply_chat_template(prompt, tokenize=False)], [], processor())[0])
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, text(input_ids=ids).logits, atol=1e-5)


@pytest.mark.parametrize("count", [64, 16, 4, 1])
def test_every_count_of_image_tokens_answers_and_repeats(count: int) -> None:
    flags = ("--num_image_tokens", str(count))
    batch = batch_of(*flags)
    assert int((batch["input_ids"] == processor().image_token_id).sum()) == 2 * count
    prompt = {key: value for key, value in batch.items() if key != "labels"}
    tokens = base(*flags).generate(**prompt, max_new_tokens=2, do_sample=False)
    assert tokens.shape[1] > batch["input_ids"].shape[1]


@pytest.mark.parametrize(("flag", "kind"), [("--load_in_4bit", "Linear4bit"), ("--load_in_8bit", "Linear8bitLt")])
def test_the_language_model_alone_is_quantized(flag: str, kind: str) -> None:
    model = load_base(composed(flag, "true"), CPU)
    linears = {name: type(layer).__name__ for name, layer in model.named_modules() if "Linear" in type(layer).__name__}
    inside = {name: made for name, made in linears.items() if name.startswith("model.language_model.layers")}
    assert set(inside.values()) == {kind}
    assert {made for name, made in linears.items() if name not in inside} == {"Linear"}
    assert model.hf_quantizer is not None and getattr(model, f"is_loaded_in_{flag[-4:]}")
    with torch.no_grad():
        assert torch.isfinite(model(**batch_of()).logits).all()


def test_the_tower_keeps_no_gradients_whatever_hooks_say() -> None:
    model = load_base(composed(), CPU)
    model.enable_input_require_grads()
    seen = model.model.vision_tower(batch_of()["pixel_values"], output_hidden_states=True)
    assert not any(state.requires_grad for state in seen.hidden_states)
    model.model.vision_tower.__dict__.pop("forward")
    seen = model.model.vision_tower(batch_of()["pixel_values"], output_hidden_states=True)
    assert seen.hidden_states[-1].requires_grad, "which is what transformers' hook would do"


# --- the shapes of the real models


@functools.cache
def real_folder(name: str, parent: Path) -> Path:
    folder = parent / name
    shutil.copytree(SHARED_MODELS / name, folder)
    if "clip" not in name:
        shutil.copy(SHARED_MODELS / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real")


def real_settings(name: str, parent: Path, *argv: str) -> Settings:
    folders = real_folder(name, parent), real_folder("clip-vit-large-patch14", parent)
    return composed(*argv, name=str(folders[0]), encoder=str(folders[1]))


@needs_shapes
@pytest.mark.parametrize("name", REAL)
def test_real_vocabularies_have_a_row_to_spare(name: str, real: Path) -> None:
    settings = real_settings(name, real)
    config, made = load_config(settings), load_processing_class(settings)
    rows = config.text_config.vocab_size
    assert len(made.tokenizer) <= config.image_token_id + 1 < rows
    assert made.image_token_id == config.image_token_id
    # 267 in Qwen3 and 399 in Qwen2.5-14B, whose tokenizer has four tokens less than the one in the folder.
    assert rows - config.image_token_id in (267, 395, 399)
    (ids,), inputs = tokenize([f"a {IMAGE_TOKEN} b"], [picture(300, 200)], made)
    assert ids.count(config.image_token_id) == 256
    assert inputs["pixel_values"].shape == (1, 3, 224, 224)


@needs_shapes
@pytest.mark.parametrize("name", REAL)
def test_what_is_trained_of_a_14b_model_takes_less_than_200_mb(name: str, real: Path, tmp_path: Path) -> None:
    settings = real_settings(name, real)
    empty = skeleton(load_config(settings))
    assert isinstance(empty.model.multi_modal_projector, ImageProjector)
    parts = trained_parts(empty, settings)
    model = get_peft_model(empty, lora_config(empty, settings, parts))
    report = report_parameters(model, parts)
    assert not report.outside and report.modules["model.multi_modal_projector"] == 1
    layers = load_config(settings).text_config.num_hidden_layers
    assert sum(report.modules.values()) == 7 * layers + 1
    if name == "Qwen3-14B":  # the default; Qwen2.5-14B has eight layers more
        saved = {key: torch.zeros(x.shape, dtype=torch.bfloat16) for key, x in get_peft_model_state_dict(model).items()}
        save_file(saved, tmp_path / "adapter_model.safetensors")
        megabytes = (tmp_path / "adapter_model.safetensors").stat().st_size / 1e6
        assert megabytes == pytest.approx(191.4, abs=0.1)


@needs_shapes
def test_nothing_but_the_language_models_linears_is_to_be_quantized(real: Path) -> None:
    settings = real_settings("Qwen3-14B", real, "--load_in_4bit", "true")
    skipped = quantization(settings, load_config(settings)).llm_int8_skip_modules
    assert "lm_head" in skipped and "model.multi_modal_projector.linear_1" in skipped
    assert not any("language_model" in name for name in skipped)


# --- the chat template


def templates() -> dict[str, str]:
    found = {"tiny": load_processing_class(settings_for(TEXT)).chat_template}
    for name in REAL if SHARED_MODELS.is_dir() else []:
        found[name] = (SHARED_MODELS / name / "chat_template.jinja").read_text(encoding="utf-8")
    return found


@pytest.mark.parametrize("name", ["tiny", *REAL])
def test_no_part_of_a_message_vanishes(name: str) -> None:
    if name not in templates():
        pytest.skip("needs the real models' templates")
    tokenizer = load_processing_class(settings_for(TEXT))

    def render(source: str, messages: list[dict[str, Any]], **flags: Any) -> str:
        return tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, **flags)

    own, ours = templates()[name], with_images(templates()[name], IMAGE_TOKEN)
    typed = [
        message("system", "Be brief ."),
        {"role": "user", "content": [*message("user", "one", 1)["content"], *message("user", "two", 2)["content"]]},
        message("assistant", "three"),
        message("user", "four"),
    ]
    text = render(ours, typed)
    assert f"{IMAGE_TOKEN}one{IMAGE_TOKEN}{IMAGE_TOKEN}two" in text
    assert all(part in text for part in ("Be brief .", "three", "four"))
    with contextlib.suppress(TypeError):  # which is what Qwen2.5's own does
        assert "one" not in render(own, typed), "Qwen3's own template drops typed parts"
    plain = [{"role": row["role"], "content": "".join(p.get("text", "") for p in row["content"])} for row in typed]
    flags = {"add_generation_prompt": True}
    thinking = {"enable_thinking": False} if "enable_thinking" in own else {}
    assert render(ours, plain, **flags) == render(own, plain, **flags, **thinking)
    if thinking:
        on = {"enable_thinking": True}
        assert render(ours, plain, **flags, **on) == render(own, plain, **flags, **on)
    with pytest.raises(Exception, match="type video"):
        render(ours, [{"role": "user", "content": [{"type": "video"}]}])


@pytest.mark.parametrize("name", ["tiny", *REAL])
def test_every_answer_of_a_conversation_is_trained_and_nothing_else(name: str) -> None:
    if name not in templates():
        pytest.skip("needs the real models' templates")
    made = load_processing_class(composed())
    made.chat_template = with_images(templates()[name], IMAGE_TOKEN)
    row = conversation([("What is this ?", "A star ."), ("Which colour ?", "Red .")], [picture(96, 96)])
    marked = segments(row, made)
    targets = [segment.text for segment in marked if segment.is_target]
    assert targets == ["A star .<|im_end|>", "Red .<|im_end|>"]
    assert sum(segment.text.count(IMAGE_TOKEN) for segment in marked if not segment.is_target) == 1
    (prompt, answer) = segments(answered("What ?", "A star .", [picture(96, 96)]), made)
    assert answer.text == "A star .<|im_end|>" and prompt.text.count(IMAGE_TOKEN) == 1


@needs_shapes
@pytest.mark.parametrize("name", REAL)
def test_words_in_place_of_an_image_change_nothing_else(name: str, real: Path) -> None:
    def parts(*argv: str, words: str, images: list[Any]) -> tuple[str, list[str]]:
        made = load_processing_class(real_settings(name, real, *argv))
        shown = [{"type": "image"}] if images else [{"type": "text", "text": words}]
        content = [*shown, *message("user", "What is this ?")["content"]]
        row = answered("", "A star .", images) | {"prompt": [{"role": "user", "content": content}]}
        tokenizer = getattr(made, "tokenizer", made)
        asked = PromptCollator(made)([{"prompt": row["prompt"], "images": images}])["input_ids"][0]
        prompt = tokenizer.decode([token for token in asked if token != getattr(made, "image_token_id", None)])
        return prompt.replace(words, ""), [part.text for part in segments(row, made) if part.is_target]

    words = "[Image: a star]"
    seen = parts(words=words, images=[picture(96, 96)])
    assert parts("--vision_mode", "text", words=words, images=[]) == seen
    assert seen[1] == ["A star .<|im_end|>"]


# --- the projector


def test_pooling_is_the_mean_of_neighbours() -> None:
    patches = torch.arange(32.0).reshape(1, 16, 2)
    expected = [(0 + 2 + 8 + 10) / 4, (4 + 6 + 12 + 14) / 4, (16 + 18 + 24 + 26) / 4, (20 + 22 + 28 + 30) / 4]
    assert pooled(patches, 4)[0, :, 0].tolist() == expected
    assert pooled(patches, 1)[0, 0].tolist() == [15.0, 16.0]
    assert pooled(patches, 16) is patches


def test_counts_are_the_squares_that_divide_the_grid() -> None:
    assert image_token_counts(CLIPVisionConfig(image_size=224, patch_size=14)) == [256, 64, 16, 4, 1]
    assert image_token_counts(CLIPVisionConfig(image_size=336, patch_size=14)) == [576, 144, 64, 36, 16, 9, 4, 1]


@needs_features
@pytest.mark.parametrize("count", [64, 16])
def test_features_kept_before_the_projector_train_it_as_pixels_do(count: int) -> None:
    flags = ("--num_image_tokens", str(count))
    model = load_base(composed(*flags), CPU)
    settings = composed(*flags)
    parts = trained_parts(model, settings)
    fresh = batch_of(*flags)
    features = projector_inputs(model, pixel_values=fresh["pixel_values"])
    assert features.shape == (2 * count, 96) and not features.requires_grad
    adapted = get_peft_model(model, lora_config(model, settings, parts))
    require_frozen_vision(adapted)
    cached = {key: value for key, value in fresh.items() if key != "pixel_values"} | {"image_features": features}
    gradients = []
    for batch in (fresh, encoder_inputs(cached, adapted)):
        adapted.zero_grad()
        loss = adapted(**batch).loss
        loss.backward()
        projector = model.model.multi_modal_projector.modules_to_save["default"]
        gradients.append((loss.item(), projector.linear_1.weight.grad.clone()))
    assert gradients[0][0] == pytest.approx(gradients[1][0], abs=1e-6)
    assert gradients[0][1].abs().max() > 0
    assert torch.allclose(gradients[0][1], gradients[1][1], atol=1e-6)


@needs_features
def test_the_held_out_loss_of_kept_features_is_that_of_pixels() -> None:
    model, fresh = base(), batch_of()
    features = projector_inputs(model, pixel_values=fresh["pixel_values"])
    cached = {key: value for key, value in fresh.items() if key != "pixel_values"} | {"image_features": features}
    with torch.no_grad():
        losses = [token_sums(model, batch).losses for batch in (fresh, cached)]
        blind = token_sums(model, {key: value for key, value in fresh.items() if key != "pixel_values"}).losses
    assert torch.allclose(*losses, atol=1e-5)
    assert not torch.allclose(losses[0], blind, atol=1e-3)


# --- phases


def adapted_composition() -> tuple[Any, Any]:
    settings = composed("--lora_r", "4")
    model = load_base(settings, CPU)
    parts = trained_parts(model, settings)
    return get_peft_model(model, lora_config(model, settings, parts)), parts


def test_lora_has_no_gradient_while_it_is_off_and_the_projector_has() -> None:
    model, _ = adapted_composition()
    for is_on in (False, True):
        switch_lora(model, on=is_on)
        model.zero_grad()
        model(**batch_of()).loss.backward()
        had = {name: p.grad is not None and bool(p.grad.any()) for name, p in model.named_parameters()}
        assert any(had[name] for name in had if ".lora_B." in name) == is_on
        assert all(had[name] for name in had if "modules_to_save.default" in name)


def test_a_batch_without_an_image_has_a_backward_pass_in_align() -> None:
    model, parts = adapted_composition()
    switch = PhaseSwitch(model, parts, ["align"], 0.25)
    batch = CompletionCollator(processor(), None)([answered("Say it again : A star .", "A star .")])
    with pytest.raises(RuntimeError, match="does not require grad"):
        model(**batch).loss.backward()
    switch.on_train_begin(TrainingArguments(use_cpu=True), TrainerState(max_steps=2), TrainerControl())
    model(**batch).loss.backward()
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_align_keeps_the_lora_of_an_adapter_as_it_is_and_on() -> None:
    model, parts = adapted_composition()
    model.eval()
    batch = batch_of()
    lora = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    with torch.no_grad():
        fresh = model(**batch).logits
        for parameter in lora.values():
            parameter.add_(0.1)
        expected = model(**batch).logits
    assert not torch.allclose(fresh, expected, atol=1e-2)
    switch = PhaseSwitch(model, parts, ["align", "instruct"], 0.5, has_learned_lora=True)
    arguments, state, control = TrainingArguments(use_cpu=True), TrainerState(max_steps=2), TrainerControl()
    switch.on_train_begin(arguments, state, control)
    output = model(**batch)
    assert torch.equal(output.logits, expected)
    output.loss.backward()
    assert all(parameter.grad is None for parameter in lora.values())
    assert any(p.grad is not None for name, p in model.named_parameters() if "modules_to_save.default" in name)
    state.global_step = 1
    switch.on_step_end(arguments, state, control)
    assert all(parameter.requires_grad for parameter in lora.values())


def test_the_phases_share_the_steps() -> None:
    model, parts = adapted_composition()

    def first(phases: list[str], share: float, num_steps: int) -> int:
        return PhaseSwitch(model, parts, phases, share).first_instruct_step(num_steps)

    assert first(["align", "instruct"], 0.25, 2000) == 500
    assert first(["align", "instruct"], 0.01, 4) == 1, "each phase has a step"
    assert first(["align", "instruct"], 0.99, 4) == 3
    assert first(["instruct"], 0.25, 2000) == 0
    assert any(p.requires_grad for name, p in model.named_parameters() if ".lora_" in name)
    assert first(["align"], 0.25, 2000) == 2000
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".lora_" in name)


# --- errors


def fails(match: str, *argv: str, name: str = TEXT, encoder: str = CLIP) -> None:
    with pytest.raises(UserError, match=match):
        load_base(composed(*argv, name=name, encoder=encoder), CPU)


def test_a_gguf_file_is_refused_with_the_command_that_mends_it() -> None:
    fails("GGUF file.*save_pretrained", name="Qwen3-14B-Q4_K_M.gguf")


def test_a_folder_that_holds_only_a_gguf_file_is_refused_likewise(tmp_path: Path) -> None:
    (tmp_path / "Q4.gguf").touch()
    fails("Q4.gguf is a GGUF file.*gguf_file='Q4.gguf'", name=str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    assert model_source(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("name", ["Qwen/Qwen-14B", "Qwen/Qwen-7B-Chat", "folder"])
def test_the_first_qwen_is_refused_with_its_successors(name: str, tmp_path: Path) -> None:
    if name == "folder":
        name = str(tmp_path)
        (tmp_path / "config.json").write_text('{"model_type": "qwen", "auto_map": {}}', encoding="utf-8")
    fails("first-generation Qwen.*Qwen/Qwen3-14B or Qwen/Qwen2.5-14B-Instruct", name=name)


@pytest.mark.parametrize("encoder", [TEXT, "qvl/tiny-qwen3-vl"])
def test_an_encoder_that_is_no_clip_is_refused(encoder: str) -> None:
    fails("no CLIP.*openai/clip-vit-large-patch14", encoder=encoder)


def test_a_language_model_that_sees_by_itself_is_refused() -> None:
    fails("text-only.*Leave --vision_encoder out", name="qvl/tiny-qwen3-vl")


def test_a_full_vocabulary_is_refused() -> None:
    tokenizer = load_processing_class(settings_for(TEXT))
    tokenizer = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    num_tokens = len(tokenizer)
    with pytest.raises(UserError, match=f"{num_tokens} rows of vocabulary.*Qwen3 has 267 free"):
        add_image_token(tokenizer, num_tokens, "full")
    assert add_image_token(tokenizer, num_tokens + 1, "one row") == num_tokens


def test_an_impossible_number_of_image_tokens_is_refused() -> None:
    fails("--num_image_tokens 100: .* 8 x 8 patches, .* 64, 16, 4, 1", "--num_image_tokens", "100")


def test_four_and_eight_bits_at_once_are_refused() -> None:
    with pytest.raises(UserError, match="--load_in_4bit or --load_in_8bit, not both"):
        composed("--load_in_4bit", "true", "--load_in_8bit", "true")


def test_quantization_without_bitsandbytes_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    fails(r"pip install bitsandbytes.*--load_in_4bit false", "--load_in_4bit", "true")


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--num_image_tokens", "4"], "--num_image_tokens has no effect without --vision_encoder"),
        (["--vision_mode", "text"], "--vision_mode has no effect without --vision_encoder"),
        (["--phase", "align"], "--train_projector is off"),
        (
            ["--vision_encoder", CLIP, "--vision_mode", "text", "--train_projector", "--phase", "align"],
            "--vision_mode text has none",
        ),
        (["--projector_learning_rate", "1e-3"], "no effect without --train_projector"),
        (["--align_share", "1"], "--align_share 1: .* below 1"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags: list[str], match: str) -> None:
    with pytest.raises(UserError, match=match):
        settings_for(TEXT, *flags)


def test_a_model_without_a_projector_has_none_to_train() -> None:
    settings = settings_for(TEXT, "--train_projector")
    with pytest.raises(UserError, match=r"--train_projector: .* has none"):
        trained_parts(load_base(settings, CPU), settings)


def test_a_trained_projector_that_is_not_asked_for_is_named_with_its_flag() -> None:
    model, _ = adapted_composition()
    with pytest.raises(UserError, match=r"multi_modal_projector.*--train_projector.*ask for what the --adapter holds"):
        require_adapter_in_language_model(report_parameters(model))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_dry_run_says_what_is_quantized(bits: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows_with_pictures(tmp_path)
    data = ("--dataset_name", str(tmp_path / "rows.jsonl"), "--num_eval_examples", "1")
    dry_run(composed(f"--load_in_{bits}bit", *data), None, tmp_path / "run")
    assert f"float32, language model in {bits}-bit" in capsys.readouterr().out


# --- the model card


@pytest.mark.parametrize("count", [64, 16])
@pytest.mark.parametrize("is_merged", [True, False])
def test_the_model_card_of_a_composition_names_what_loads_it(count: int, is_merged: bool, tmp_path: Path) -> None:
    flags = ("--num_image_tokens", str(count))
    record = {"base_model_name_or_path": "Qwen3-14B", **composition_record(composed(*flags), base(*flags))}
    (tmp_path / "trained_with.json").write_text(json.dumps(record), encoding="utf-8")
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    card = model_card(Exported(tmp_path, is_merged, True, [], [], {}, {}, None))
    assert f"| vision encoder | {CLIP} |" in card and 'from_pretrained("Qwen3-14B"' not in card
    assert ("AutoModelForImageTextToText.from_pretrained(HERE" in card) == (is_merged and count == 64)
    assert ("LlavaForConditionalGeneration.from_pretrained" in card) == (not is_merged and count == 64)
    assert ("python -m qvl.chat --adapter HERE" in card) == (not is_merged or count == 16)


# --- images as words


def rows_with_pictures(folder: Path, num_rows: int = 12) -> Any:
    from qvl import scenes

    rows = []
    for index in range(num_rows):
        scene = scenes.make_scene(index, 0)
        scenes.draw(scene).save(folder / f"{index}.png")
        row = {"image": f"{index}.png", "instruction": "What is this ?", "response": scenes.captions(scene)[0]}
        rows.append(row | ({"caption": " A picture of mine . "} if index == 0 else {}))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_examples(DataConfig(str(folder / "rows.jsonl"), num_eval_examples=1))


def test_words_stand_where_images_stood(tmp_path: Path) -> None:
    data = rows_with_pictures(tmp_path)
    both = [data.train, data.evaluation]
    words = answer_words(data.train)
    assert words and "background" not in words, "a word of every answer says nothing"
    tags = zero_shot_tags(composed("--vision_mode", "text"), CPU, both, words)
    for dataset in both:
        asked = images_as_words(dataset, tags)
        for row, original in zip(undecoded_examples(asked), undecoded_examples(dataset), strict=True):
            parts = [part for turn in row["prompt"] for part in turn["content"]]
            assert all(part["type"] == "text" for part in parts) and not row["image_sizes"]
            assert row["image_names"] == original["image_names"], "the report still shows the picture"
            shown = parts[0]["text"]
            if row["image_names"] == ["0.png"]:
                assert shown == "[Image: A picture of mine .]\n"
            else:
                listed = shown.removeprefix("[Image: ").removesuffix("]\n").split(", ")
                assert len(listed) == 5 and set(listed) <= set(words)


def test_an_answer_never_becomes_the_prompt(tmp_path: Path) -> None:
    """A row whose captions are what is to be learned has no caption of its own."""
    picture(96, 96).save(tmp_path / "0.png")
    picture(96, 96, 1).save(tmp_path / "1.png")
    rows = [{"image": f"{n}.png", "caption": f"The secret {n} ."} for n in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = load_examples(DataConfig(str(tmp_path / "rows.jsonl"), caption_columns=("caption",)))
    for row in undecoded_examples(images_as_words(data.train, {})):
        assert "secret" not in json.dumps(row["prompt"])


def test_without_words_to_choose_from_it_says_so(tmp_path: Path) -> None:
    data = rows_with_pictures(tmp_path)
    with pytest.raises(UserError, match='give the rows a "caption"'):
        zero_shot_tags(composed("--vision_mode", "text"), CPU, [data.train], [])


def test_rows_with_captions_of_their_own_need_neither_tags_nor_a_clip(tmp_path: Path) -> None:
    data = rows_with_pictures(tmp_path)
    both = [data.train, data.evaluation]
    captions = [dataset.with_format(None)["caption"][:] for dataset in both]
    captioned = [rows.select([n for n, own in enumerate(c) if own]) for rows, c in zip(both, captions, strict=True)]
    assert sum(map(len, captioned)) == 1
    assert zero_shot_tags(composed("--vision_mode", "text", encoder="nowhere"), CPU, captioned, []) == {}


def test_the_tiny_clips_tokenizer_is_the_same_every_time() -> None:
    """The library's own maps have another order each time, and a seeded training must not."""
    assert len({make_clip_processor(0).tokenizer.backend_tokenizer.to_str() for _ in range(3)}) == 1
