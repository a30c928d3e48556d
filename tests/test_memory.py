"""The memory plan: formulas against counted tensors, predictions against measured runs, and what a plan decides."""

import copy
import functools
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_memory import count_step
from shapes import shape
from tiny import CHAT, VISION, answered, base, picture, processing_class, settings_for
from torch import nn

from qvl.activations import Format, Mode, kept_bytes, passing_bytes, saved_bytes
from qvl.active_run import load_data
from qvl.adapters import add_adapter, lora_config
from qvl.collators import CompletionCollator
from qvl.errors import UserError
from qvl.fp8 import quantize_frozen_base
from qvl.frozen_vision import ask_no_gradient_of_vision
from qvl.memory import GIB, Card, MemoryPlan, memory_for_run, plan_memory
from qvl.memory_needs import LongestRows, Needs, answering_parts, held_out_parts, training_parts
from qvl.memory_settings import find_needs, longest_rows
from qvl.memory_shapes import decoder_shape
from qvl.memory_weights import TrainedCounts, count_trained, largest_packed_layer, weight_parts
from qvl.models import load_config, skeleton
from qvl.positions import positions_of
from qvl.recipe import run
from qvl.settings import Settings, parse_settings
from qvl.shared_prefix import SharedPrefixCollator
from recipes import flickr8k
from recipes.flickr8k import RECIPE

MEASURED = json.loads((Path(__file__).parent / "measured_memory.json").read_text(encoding="utf-8"))
LARGEST_ERROR = 0.10
PHOTO = LongestRows(240, 192, 23, 209, 192, 238, 22, 192, 500)


def settings_of_recipe(*argv: str) -> Settings:
    """Those of the caption recipe, planned for a GPU."""
    return parse_settings(flickr8k.DEFAULTS, {}, ["--gpu_memory_gib", "80", *argv])


@functools.cache
def needs_of(name: str, rows: LongestRows, *argv: str) -> Needs:
    found = find_needs(settings_of_recipe(*argv), shape(name), rows, for_gpu=True)
    assert found is not None
    return found


def plan_of(name: str, gib: float, *argv: str, rows: LongestRows = PHOTO) -> MemoryPlan:
    return MemoryPlan(
        needs_of(name, rows, *argv), ("baseline", "train", "evaluate"), Card("a card", int(gib * GIB)), True
    )


# Shapes of full size, a row of each family that recipes use.
LAYERS = [
    ("Qwen3-VL-8B", 0.05, True, torch.bfloat16, 16),
    ("Qwen3-VL-8B", 0.0, False, torch.bfloat16, 16),
    ("Qwen3-VL-8B", 0.0, True, torch.float32, 16),
    ("Qwen3-VL-8B", 0.05, True, torch.bfloat16, 4),
    ("Qwen2.5-VL-7B", 0.05, True, torch.bfloat16, 16),
    ("Qwen2.5-VL-7B", 0.05, False, torch.float32, 16),
    ("Qwen2.5-VL-7B", 0.0, True, torch.bfloat16, 4),
    ("Qwen3-4B", 0.05, False, torch.bfloat16, 16),
    ("Qwen3-4B", 0.0, False, torch.bfloat16, 4),
    ("CLIP + Qwen3-14B", 0.0, True, torch.bfloat16, 16),
    ("Qwen3-VL-8B", 0.0, True, torch.bfloat16, 8),
]


@pytest.mark.parametrize(("name", "dropout", "has_mask", "dtype", "bits"), LAYERS)
def test_a_layer_saves_what_the_formula_says(
    name: str, dropout: float, has_mask: bool, dtype: torch.dtype, bits: int
) -> None:
    config = shape(name, num_layers=1, vocabulary=1000)
    lora = lora_config(skeleton(config), settings_of_recipe("--lora_dropout", str(dropout)))
    sizes = decoder_shape(skeleton(config), lora)
    assert sizes is not None
    counted = count_step(config, lora, dtype, 4, 512, has_mask, bits=bits)
    form = Format(dtype.itemsize, has_autocast=dtype == torch.bfloat16, casts_inputs=bits == 16)
    assert 4 * 512 * saved_bytes(sizes, form, 512 if has_mask else 0) == pytest.approx(counted.saved, rel=0.02)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"]])
def test_layers_with_fewer_adapters_save_less(targets: list[str]) -> None:
    config = shape("Qwen3-VL-8B", num_layers=1, vocabulary=1000)
    lora = lora_config(skeleton(config), settings_of_recipe("--lora_target_modules", *targets))
    sizes = decoder_shape(skeleton(config), lora)
    assert sizes is not None
    counted = count_step(config, lora, torch.bfloat16, 4, 512, has_mask=True)
    assert 4 * 512 * saved_bytes(sizes, Format(2, has_autocast=True), 512) == pytest.approx(counted.saved, rel=0.02)


# With few tokens the weight that 4-bit layers unpack is what makes the peak, with many it is LoRA's own tensors, and
# without LoRA on the last projection the gradients of the activation.
ATTENTION_ALONE = "--lora_target_modules q_proj v_proj"
STEPS: list[tuple[str, Mode, str, int, int]] = [
    ("Qwen3-VL-8B", "kept", "", 16, 4),
    ("Qwen2.5-VL-7B", "checkpointed", "", 16, 4),
    ("Qwen3-VL-8B", "checkpointed", "--lora_dropout 0", 16, 4),
    ("Qwen3-4B", "checkpointed", ATTENTION_ALONE, 16, 4),
    ("Qwen3-VL-8B", "kept", "", 4, 1),
    ("Qwen3-VL-8B", "checkpointed", "", 4, 1),
    ("Qwen3-VL-2B", "kept", "", 4, 8),
    ("Qwen3-VL-2B", "checkpointed", "", 4, 8),
    ("Qwen2.5-VL-7B", "kept", "--lora_dropout 0", 4, 4),
    ("Qwen3-4B", "checkpointed", "--lora_dropout 0", 4, 4),
    ("Qwen3-4B", "kept", ATTENTION_ALONE, 4, 8),
    ("Qwen3-VL-2B", "kept", "", 8, 8),
    ("Qwen3-VL-2B", "checkpointed", "", 8, 8),
    ("Qwen2.5-VL-7B", "checkpointed", "", 8, 4),
    ("Qwen3-4B", "kept", "--lora_dropout 0", 8, 4),
    ("Qwen3-4B", "checkpointed", "--lora_dropout 0", 8, 4),
    ("Qwen3-4B", "kept", ATTENTION_ALONE, 8, 8),
]


@pytest.mark.parametrize(("name", "mode", "flags", "bits", "num_rows"), STEPS)
def test_a_step_through_several_layers_peaks_where_the_formula_says(
    name: str, mode: Mode, flags: str, bits: int, num_rows: int
) -> None:
    config = shape(name, num_layers=2, vocabulary=1000)
    empty = skeleton(config)
    lora = lora_config(empty, settings_of_recipe(*flags.split()))
    sizes = decoder_shape(empty, lora)
    assert sizes is not None
    counted = count_step(
        config,
        lora,
        torch.bfloat16,
        num_rows,
        512,
        has_mask=True,
        with_backward=True,
        checkpointing=mode == "checkpointed",
        bits=bits,
    )
    form = Format(2, has_autocast=True, casts_inputs=bits == 16, holds_inputs=bits == 8)
    unpacked = largest_packed_layer(empty) * 2 if bits < 16 else 0
    # Copies of the adapter in 16 bits, and its gradients as they come.
    beside = count_trained(empty, lora).num_trained * 2
    num_tokens = num_rows * 512
    passing = passing_bytes(sizes, form, mode, num_tokens, 512, unpacked)
    predicted = num_tokens * kept_bytes(sizes, form, mode, 512) + passing + beside
    assert predicted == pytest.approx(counted.peak, rel=0.03)


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row['model']}, {row['name']}")
def test_predictions_are_within_a_tenth_of_measured_peaks(row: dict[str, Any]) -> None:
    needs = needs_of(row["model"], LongestRows(**row["rows"]), *shlex.split(row["flags"]))
    if row["stage"] == "answering":
        parts = answering_parts(needs, row["prompts_at_a_time"], has_adapter=False)
    else:
        parts = training_parts(needs)
    assert sum(parts.values()) / GIB == pytest.approx(row["measured_gib"], rel=LARGEST_ERROR)


@pytest.mark.parametrize("name", [*VISION, CHAT])
def test_weights_are_those_of_the_model(name: str) -> None:
    model = base(name)
    parts = weight_parts(skeleton(model.config), torch.float32, "none")
    assert sum(part.num_bytes for part in parts) == sum(parameter.nbytes for parameter in model.parameters())


def test_weights_in_fp8_are_those_of_the_quantized_model() -> None:
    settings = settings_for(VISION[0])
    model = add_adapter(copy.deepcopy(base(VISION[0])), settings)
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    quantize_frozen_base(model)
    layers = [module for module in model.modules() if "Fp8" in type(module).__name__]
    packed = sum(buffer.nbytes for layer in layers for buffer in layer.buffers())
    there = sum(parameter.nbytes for parameter in model.parameters()) - trained + packed
    parts = weight_parts(skeleton(base(VISION[0]).config), torch.float32, "fp8")
    assert sum(part.num_bytes for part in parts) == there


def test_what_is_trained_is_counted_as_peft_does() -> None:
    settings = settings_for(VISION[0], "--lora_r", "4", "--train_merger")
    model = add_adapter(copy.deepcopy(base(VISION[0])), settings)
    config = model.peft_config["default"]
    counts = count_trained(skeleton(base(VISION[0]).config), config)
    assert counts.num_trained == model.get_nb_trainable_parameters()[0]
    assert counts.num_whole > 0


def test_a_tied_head_that_is_trained_whole_is_a_copy() -> None:
    settings = settings_for(VISION[0], "--lora_modules_to_save", "lm_head")
    model = add_adapter(copy.deepcopy(base(VISION[0])), settings)
    assert base(VISION[0]).config.tie_word_embeddings
    counts = count_trained(skeleton(base(VISION[0]).config), model.peft_config["default"])
    assert counts.num_trained == model.get_nb_trainable_parameters()[0]
    assert counts.num_whole == model.get_output_embeddings().weight.numel()


def test_the_optimizer_holds_what_it_is_said_to_hold() -> None:
    weights = [nn.Parameter(torch.ones(64, 8)) for _ in range(3)]
    counts = TrainedCounts(sum(weight.numel() for weight in weights), 0)
    for name, optimizer in (("adamw_torch_fused", torch.optim.AdamW(weights)), ("sgd", torch.optim.SGD(weights))):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values()]
        held = sum(value.nbytes for value in states if isinstance(value, torch.Tensor) and value.dim())
        assert counts.optimizer_bytes(name) == held
    assert counts.optimizer_bytes("paged_adamw_8bit") == counts.optimizer_bytes("adamw_torch") / 4


@pytest.mark.parametrize(("name", "captions"), [(VISION[0], 5), (VISION[1], 1)])
def test_the_longest_row_is_the_one_that_the_collator_makes(name: str, captions: int) -> None:
    flags = ["--dataset_name", "qvl/scenes", "--num_train_examples", "24", "--num_eval_examples", "8"]
    settings = settings_for(name, *flags, "--captions_per_image", str(captions))
    data = load_data(settings, None, None)
    found = longest_rows(settings, load_config(settings), data, processing_class(name), for_gpu=False)
    collator = SharedPrefixCollator(processing_class(name), positions_of(load_config(settings)), None)
    batch = collator(list(data.train))
    assert found.train == batch["input_ids"].shape[1]
    assert found.num_prompts == len(data.evaluation)


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    plan = plan_of("Qwen3-VL-8B", 23.4)
    line = next(line for line in plan.lines() if "--per_device_train_batch_size" in line)
    largest = int(line.rpartition(" ")[2])
    assert plan.fits()
    assert plan_of("Qwen3-VL-8B", 23.4, "--per_device_train_batch_size", str(largest)).fits()
    assert not plan_of("Qwen3-VL-8B", 23.4, "--per_device_train_batch_size", str(largest + 1)).fits()


def test_each_remedy_saves_what_it_says_when_it_is_followed() -> None:
    flags = ["--per_device_train_batch_size", "8", "--no_gradient_checkpointing"]
    plan = plan_of("Qwen3-VL-8B", 15.4, *flags)
    assert not plan.fits()
    found = {remedy.flags: remedy for remedy in plan.remedies()}
    assert any("--max_pixels" in text for text in found)
    for text, remedy in found.items():
        if "--max_pixels" in text:
            continue  # changes the rows, which are given here
        followed = plan_of("Qwen3-VL-8B", 15.4, *flags, *shlex.split(text))
        assert plan.needed_bytes() - followed.needed_bytes() == remedy.saved_bytes, text
    assert [remedy.saved_bytes for remedy in found.values()] == sorted(
        (r.saved_bytes for r in found.values()), reverse=True
    )


@pytest.mark.parametrize("flags", ["--load_in_8bit", "--base_precision fp8"])
def test_four_bits_take_the_place_of_eight(flags: str) -> None:
    plan = plan_of("Qwen3-VL-8B", 8, *flags.split())
    (remedy,) = [remedy.flags for remedy in plan.remedies() if "--load_in_4bit" in remedy.flags]
    added, _, left_out = remedy.partition(" without ")
    kept = [] if left_out == flags else flags.split()
    followed = settings_of_recipe(*kept, *added.split())
    assert (followed.model.load_in_8bit, followed.recipe.base_precision) == (False, None)


@pytest.mark.parametrize(("method", "is_known"), [("awq", False), ("gptq", False), ("fp8", False), (None, True)])
def test_a_base_in_a_format_that_no_formula_knows_has_no_plan(method: str | None, is_known: bool) -> None:
    """Counted as 16 bits, a run that fits would be stopped."""
    config = shape("Qwen3-4B")
    if method is not None:
        config.quantization_config = {"quant_method": method, "bits": 4}
    assert (find_needs(settings_of_recipe(), config, PHOTO, for_gpu=True) is not None) is is_known


def test_evaluations_while_training_count() -> None:
    """Small steps, and many long answers in a batch between them."""
    rows = LongestRows(2048, 0, 2000, 1000, 0, 2048, 1000, 0, 64)
    flags = ["--stages", "train", "--gradient_checkpointing", "--per_device_eval_batch_size", "64"]
    asked = {
        "none": flags,
        "loss": [*flags, "--eval_strategy", "epoch"],
        "answers": [
            *flags,
            "--eval_strategy",
            "epoch",
            "--per_device_eval_batch_size",
            "1",
            "--eval_generations",
            "64",
        ],
    }
    card = Card("a card", 80 * GIB)
    plans = {key: MemoryPlan(needs_of("Qwen3-4B", rows, *argv), ("train",), card, True) for key, argv in asked.items()}
    steps = sum(training_parts(plans["none"].needs).values())
    assert plans["none"].training_gib() == steps / GIB
    needs = plans["loss"].needs
    held_out = sum(held_out_parts(needs).values()) + needs.trained.optimizer_bytes(needs.optim)
    assert plans["loss"].training_gib() == held_out / GIB > steps / GIB
    assert plans["loss"].needed_bytes() > held_out
    assert plans["answers"].training_gib() > plans["none"].training_gib()
    shown = {key: "\n".join(plan.lines()) for key, plan in plans.items()}
    assert ["held-out loss" in shown[key] for key in asked] == [False, True, True]
    assert ["answering" in shown[key] for key in asked] == [False, False, True]
    few = [*asked["answers"], "--eval_generations", "3"]
    assert "answering, 3 prompts at a time" in "\n".join(
        MemoryPlan(needs_of("Qwen3-4B", rows, *few), ("train",), card, True).lines()
    )
    tight = MemoryPlan(needs, ("train",), Card("a card", held_out - GIB), True)
    assert "--per_device_eval_batch_size 32" in "\n".join(tight.lines())


def test_one_long_row_among_thousands_is_found(tmp_path: Path) -> None:
    row = {"images": [], "instruction": "Say", "response": "dog", "split": "train"}
    rows = [*([row] * 1235), {**row, "response": "dog " * 400}, *([row] * 2765), {**row, "split": "test"}]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    settings = settings_for(CHAT, "--dataset_name", str(tmp_path), "--max_length", "2048")
    found = longest_rows(
        settings, load_config(settings), load_data(settings, None, None), processing_class(CHAT), for_gpu=False
    )
    assert found.train > 400


def test_a_row_that_is_cut_or_dropped_brings_no_more_visual_tokens_than_are_allowed() -> None:
    flags = ["--dataset_name", "qvl/scenes", "--num_train_examples", "8", "--num_eval_examples", "2"]
    settings = settings_for(VISION[0], *flags, "--max_length", "10", "--overlong", "drop")
    data = load_data(settings, None, None)
    found = longest_rows(settings, load_config(settings), data, processing_class(VISION[0]), for_gpu=False)
    assert found.train_visual <= 10


def test_a_text_only_run_is_offered_shorter_rows() -> None:
    rows = LongestRows(2048, 0, 2000, 1000, 0, 2048, 1000, 0, 8)
    plan = plan_of(
        "Qwen3-4B", 4.0, "--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "1", rows=rows
    )
    text = "\n".join(plan.lines())
    assert not plan.fits()
    assert "--max_length 1024" in text
    assert "--max_pixels" not in text


def test_a_plan_on_a_laptop_is_for_the_precision_of_the_card() -> None:
    on_card = needs_of("Qwen3-VL-8B", PHOTO)
    assert (on_card.base_bytes, on_card.training_format) == (2, Format(2, has_autocast=True))
    asked = needs_of("Qwen3-VL-8B", PHOTO, "--dtype", "float32")
    assert (asked.base_bytes, asked.training_format.has_autocast) == (4, False)
    here = find_needs(parse_settings(flickr8k.DEFAULTS, {}, ["--use_cpu"]), shape("Qwen3-VL-8B"), PHOTO, for_gpu=False)
    assert here is not None
    assert here.base_bytes == 4


def test_a_run_that_does_not_fit_stops_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"smoke": True, "num_train_examples": 8, "num_eval_examples": 2, "gpu_memory_gib": 1}
    with pytest.raises(UserError, match=r"does not fit(.|\n)*--ignore_memory_plan"):
        run(RECIPE, {**flags, "output_dir": str(tmp_path / "run")})
    assert "Loading" not in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_plan_that_is_to_be_ignored_is_shown_and_stops_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--dataset_name", "qvl/scenes", "--num_train_examples", "8", "--num_eval_examples", "2"]
    settings = settings_for(VISION[0], *flags, "--gpu_memory_gib", "1", "--ignore_memory_plan")
    plan = memory_for_run(settings, load_config(settings), load_data(settings, None, None), processing_class(VISION[0]))
    assert plan is not None
    assert not plan.fits()
    assert "it does not fit" in capsys.readouterr().out
    assert 0 < plan.training_gib() < plan.needed_bytes() / GIB


def test_a_dry_run_without_data_plans_with_the_longest_rows_allowed() -> None:
    settings = settings_for(CHAT, "--max_length", "700", "--gpu_memory_gib", "24")
    plan = plan_memory(settings, load_config(settings), None, processing_class(CHAT))
    assert plan is not None
    assert plan.needs.rows.train == 700


def test_a_dry_run_misses_an_adapter_that_is_not_there(tmp_path: Path) -> None:
    """The plan counts what the adapter trains, and would count a fresh one."""
    flags = {"smoke": True, "dry_run": True, "adapter": str(tmp_path / "none"), "output_dir": str(tmp_path / "run")}
    with pytest.raises(UserError, match="none holds no adapter"):
        run(RECIPE, flags)
    assert not (tmp_path / "run").exists()


def test_a_frozen_tower_takes_no_part_in_the_backward_pass(tmp_path: Path) -> None:
    name = VISION[1]
    settings = settings_for(name, "--gradient_checkpointing", "--lora_dropout", "0", "--output_dir", str(tmp_path))
    model = add_adapter(copy.deepcopy(base(name)), settings)
    batch = CompletionCollator(processing_class(name), None)([answered("What?", "A dog.", [picture(56, 56)])])
    model.train()
    model.get_base_model().enable_input_require_grads()
    seen: list[bool] = []
    model.get_base_model().base_model.visual.register_forward_hook(
        lambda module, inputs, output: seen.append(output.pooler_output[0].requires_grad)
    )
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        ask_no_gradient_of_vision(model)
    assert seen == [True, False]
    assert len(gradients[0]) == len(gradients[1]) > 0
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)
