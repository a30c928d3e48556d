"""What a model is made of: each check passes on a sound model and fails on one that was broken on purpose."""

import copy
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import CPU, VISION, base, processing_class, settings_for
from torch import nn
from transformers import PreTrainedModel

from qvl.adapter_checks import check_lora_placement, check_no_adapter_on_frozen_parts
from qvl.adapters import add_adapter
from qvl.checks import Check, failed
from qvl.collators import CompletionCollator
from qvl.model_checks import (
    check_footprint,
    check_image_places,
    check_quantization,
    quantized_bits,
)
from qvl.models import load_base

QWEN25 = "qvl/tiny-qwen2.5-vl"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def names(checks: list[Check]) -> set[str]:
    return {check.name for check in failed(checks)}


def four_bit(name: str = QWEN25, *flags: str) -> PreTrainedModel:
    return load_base(settings_for(name, "--load_in_4bit", *flags), CPU)


def replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def linear_like(layer: nn.Module) -> nn.Linear:
    return nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)  # type: ignore[arg-type]


def packed_like(layer: nn.Linear) -> bnb.nn.Linear4bit:
    packed = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=layer.bias is not None, quant_type="nf4")
    packed.load_state_dict(layer.state_dict())
    return packed.to("cpu")


# --- quantization


@pytest.mark.parametrize("name", VISION)
@pytest.mark.parametrize("nested", [False, True])
def test_a_4bit_model_is_as_computed(name: str, nested: bool) -> None:
    model = four_bit(name, *["--use_bnb_nested_quant"] * nested)
    assert quantized_bits(model, True, False) == 4
    assert failed(check_quantization(model, 4)) == []
    check = check_footprint(model, torch.float32, nested)
    assert check.passed and check.value < 1e-3
    assert not check_footprint(base(name), torch.float32, nested).passed, (
        "four bits were promised, and all weights are whole"
    )


def test_one_layer_of_the_language_model_left_whole_fails() -> None:
    model = four_bit()
    path = "model.language_model.layers.2.mlp.down_proj"
    replace(model, path, linear_like(model.get_submodule(path)))
    (check,) = failed(check_quantization(model, 4))
    assert (check.name, check.value, check.detail) == ("language_model_linears_4bit", 1, path)
    assert not check_footprint(model, torch.float32, False).passed


def test_a_layer_of_the_right_class_whose_weight_was_never_packed_fails() -> None:
    model = four_bit()
    model.get_submodule("model.language_model.layers.0.self_attn.q_proj").weight.quant_state = None
    assert names(check_quantization(model, 4)) == {"language_model_linears_4bit"}


@pytest.mark.parametrize("path", ["model.visual.blocks.1.attn.qkv", "model.visual.merger.mlp.0", "lm_head"])
def test_a_packed_layer_beside_the_language_model_fails(path: str) -> None:
    model = four_bit()
    replace(model, path, packed_like(model.get_submodule(path)))  # type: ignore[arg-type]
    (check,) = failed(check_quantization(model, 4))
    assert (check.name, check.detail) == ("vision_and_head_not_quantized", path)


def test_weights_in_another_format_than_computed_fail() -> None:
    model = four_bit()
    model.model.visual.to(torch.float64)
    check = check_footprint(model, torch.float32, False)
    assert not check.passed and check.value > 0.1


def test_a_whole_model_has_nothing_quantized() -> None:
    model = copy.deepcopy(base(QWEN25))
    assert quantized_bits(model, False, False) == 0
    assert failed(check_quantization(model, 0)) == []
    assert names(check_quantization(model, 4)) == {"language_model_linears_4bit"}
    path = "model.language_model.layers.0.mlp.up_proj"
    replace(model, path, packed_like(model.get_submodule(path)))  # type: ignore[arg-type]
    assert names(check_quantization(model, 0)) == {"language_model_linears_not_quantized"}


def test_a_checkpoint_that_comes_quantized_is_told(tmp_path: Any) -> None:
    four_bit().save_pretrained(tmp_path)
    settings = settings_for(str(tmp_path))
    model = load_base(settings, CPU)
    bits = quantized_bits(model, settings.model.load_in_4bit, settings.model.load_in_8bit)
    assert bits == 4
    assert failed([*check_quantization(model, bits), check_footprint(model, torch.float32, False)]) == []


# --- LoRA


def adapted(config: LoraConfig) -> PeftModel:
    return get_peft_model(copy.deepcopy(base(QWEN25)), config)


@pytest.mark.parametrize("flags", [(), ("--load_in_4bit",), ("--use_dora",), ("--lora_target_modules", "all-linear")])
def test_lora_as_asked(flags: tuple[str, ...]) -> None:
    settings = settings_for(QWEN25, *flags)
    model = add_adapter(load_base(settings, CPU), settings)
    targets = settings.model.lora_target_modules
    assert failed(check_lora_placement(model, targets, settings.model.lora_r)) == []
    assert names(check_lora_placement(model, targets, settings.model.lora_r + 1)) == {"trainable_share_as_computed"}


def test_lora_on_fewer_layers_than_asked_fails() -> None:
    checks = check_lora_placement(
        adapted(LoraConfig(r=4, target_modules=r".*language_model.*\.q_proj")), TARGETS, rank=4
    )
    assert names(checks) == {"lora_where_asked", "trainable_share_as_computed"}


def test_a_frozen_half_of_a_pair_fails() -> None:
    model = adapted(LoraConfig(r=4, target_modules=r".*language_model.*\.q_proj"))
    assert failed(check_lora_placement(model, "q_proj", 4)) == []
    next(p for name, p in model.named_parameters() if ".lora_A." in name).requires_grad = False
    assert names(check_lora_placement(model, "q_proj", 4)) == {"trainable_share_as_computed"}


def test_lora_in_the_vision_tower_fails_even_if_it_is_frozen() -> None:
    model = adapted(LoraConfig(r=4, target_modules=r".*(qkv|language_model.*\.q_proj)"))
    assert {"lora_where_asked", "no_adapter_on_frozen_parts"} <= names(check_lora_placement(model, "q_proj", 4))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".lora_" in name and ".visual." not in name
    check = check_no_adapter_on_frozen_parts(model)
    assert not check.passed and ".visual." in check.detail


def test_a_copied_merger_fails() -> None:
    model = adapted(LoraConfig(r=4, target_modules=r".*language_model.*\.q_proj", modules_to_save=["merger"]))
    assert not check_no_adapter_on_frozen_parts(model).passed


# --- images in their places


@pytest.mark.parametrize("name", VISION)
def test_placeholders_and_features_are_as_many(name: str) -> None:
    processor: Any = processing_class(name)
    check = check_image_places(base(name), CompletionCollator(processor, None), processor.image_token_id)
    assert check.passed and "mixed" in check.detail and "no image" in check.detail


def test_a_lost_placeholder_fails() -> None:
    processor: Any = processing_class(QWEN25)
    collator = CompletionCollator(processor, None)

    def losing(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collator(rows)
        if len(rows) == 4:
            row, place = (batch["input_ids"] == processor.image_token_id).nonzero()[3].tolist()
            batch["input_ids"][row, place] = 0
        return batch

    check = check_image_places(base(QWEN25), losing, processor.image_token_id)
    assert (check.passed, check.value, check.detail) == (False, 1, "mixed")


def test_a_tower_that_merges_otherwise_than_the_processor_fails() -> None:
    model = copy.deepcopy(base(QWEN25))
    processor: Any = processing_class(QWEN25)
    whole = model.base_model.get_image_features

    def halved(**inputs: Any) -> Any:
        output = whole(**inputs)
        output.pooler_output = [features[::2] for features in output.pooler_output]
        return output

    model.base_model.get_image_features = halved
    check = check_image_places(model, CompletionCollator(processor, None), processor.image_token_id)
    assert not check.passed and check.value == 5
