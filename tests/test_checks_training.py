"""What training and saving keep: each check passes on a sound model and fails on one that was broken on purpose."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from test_checks_behaviour import QWEN25, collator, rows
from tiny import CPU, base, settings_for
from transformers import TrainerControl, TrainerState

from qvl.adapters import add_adapter
from qvl.answer_distributions import answer_distributions
from qvl.checks import Check
from qvl.merge_checks import RESOLVED_NATS, check_merge
from qvl.models import load_base
from qvl.training_checks import (
    GradientWatch,
    StopWhenLearned,
    check_base_kept,
    check_overfit,
    check_save_load,
)


def measure(model: Any) -> list[torch.Tensor]:
    return answer_distributions(model, rows(2), collator())


def adapted(*flags: str, strength: float = 0.02) -> PeftModel:
    """An adapter that does something, as after a training."""
    settings = settings_for(QWEN25, *flags)
    model = add_adapter(load_base(settings, CPU), settings)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=strength, generator=generator)
    return model


def backward(model: PeftModel) -> None:
    model.train()
    model(**collator()([dict(row) for row in rows(2)])).loss.backward()


# --- gradients


def test_every_layer_gets_a_gradient() -> None:
    settings = settings_for(QWEN25)
    model = add_adapter(copy.deepcopy(base(QWEN25)), settings)
    watch = GradientWatch(model)
    assert watch.verdicts() == [], "without a step there is nothing to say"
    watch.look()
    assert not watch.verdicts()[0].passed and watch.verdicts()[0].value == 28
    backward(model)
    watch.look()
    (check,) = watch.verdicts()
    assert check.passed and watch.num_groups == 28


def test_a_layer_that_is_cut_off_fails() -> None:
    model = adapted()
    watch = GradientWatch(model)
    layer = model.get_base_model().model.language_model.layers[1].self_attn.k_proj
    layer.register_forward_hook(lambda module, inputs, output: output.detach())
    backward(model)
    watch.look()
    (check,) = watch.verdicts()
    assert not check.passed and check.value == 1
    assert check.detail.endswith("layers.1.self_attn.k_proj")


def test_a_gradient_of_zeros_fails() -> None:
    model = adapted()
    backward(model)
    for name, parameter in model.named_parameters():
        if "layers.0.mlp.up_proj.lora" in name:
            assert parameter.grad is not None
            parameter.grad.zero_()
    watch = GradientWatch(model)
    watch.look()
    assert watch.verdicts()[0].value == 1


# --- the base below the adapter


def test_an_adapter_switched_off_is_the_base() -> None:
    model = adapted()
    before = measure(base(QWEN25))
    with model.disable_adapter():
        assert check_base_kept(before, measure(model)).passed
    assert not check_base_kept(before, measure(model)).passed, "switched on, it has to change something"


@pytest.mark.parametrize("flags", [(), ("--load_in_4bit",)])
def test_the_smallest_change_of_the_base_fails(flags: tuple[str, ...]) -> None:
    model = adapted(*flags)
    with model.disable_adapter():
        before = measure(model)
        weight = model.get_base_model().model.language_model.layers[0].mlp.down_proj.base_layer.weight
        if flags:
            weight.data[5] ^= 1
        else:
            weight.data[0, 0] += 1e-3
        assert not check_base_kept(before, measure(model)).passed


# --- saving, loading, merging


@pytest.mark.parametrize("flags", [(), ("--load_in_4bit",)])
def test_saved_and_loaded_is_the_same(flags: tuple[str, ...], tmp_path: Path) -> None:
    loaded, check = check_save_load(adapted(*flags), measure, tmp_path)
    assert check.passed
    assert sum(".lora_" in name for name, _ in loaded.named_parameters()) == 56


def test_an_adapter_saved_with_less_precision_fails(tmp_path: Path) -> None:
    model = adapted()
    whole = model.save_pretrained

    def save_rounded(folder: Path) -> None:
        whole(folder)
        path = folder / "adapter_model.safetensors"
        weights = {name: weight.bfloat16().float() for name, weight in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})

    model.save_pretrained = save_rounded
    assert not check_save_load(model, measure, tmp_path)[1].passed


def nats_beside(check: Check, what: str) -> float:
    return float(check.detail.split(f"{what}: ")[1].split(" nats")[0])


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--use_dora",),
        ("--use_rslora",),
        ("--load_in_4bit",),
        ("--load_in_4bit", "--use_bnb_nested_quant"),
        ("--load_in_4bit", "--use_dora"),
    ],
)
def test_merged_is_the_same_but_for_fp32(flags: tuple[str, ...]) -> None:
    check = check_merge(adapted(*flags), measure, is_4bit="--load_in_4bit" in flags)
    assert check.passed, check
    assert nats_beside(check, "rounding alone") < RESOLVED_NATS, "in fp32 the formulas are what peft computes"
    assert check.threshold == "<= 1e-06 nats"


@pytest.mark.parametrize("flags", [(), ("--load_in_4bit",), ("--load_in_4bit", "--use_dora")])
def test_in_16_bits_merged_is_as_near_as_rounding_lets_it_be(flags: tuple[str, ...]) -> None:
    check = check_merge(adapted(*flags, "--dtype", "bfloat16"), measure, is_4bit=bool(flags))
    assert check.passed, check
    assert RESOLVED_NATS < nats_beside(check, "rounding alone") < 0.01


@pytest.mark.parametrize("flags", [(), ("--load_in_4bit",), ("--dtype", "bfloat16")])
def test_a_merge_with_a_wrong_scale_in_one_layer_fails(flags: tuple[str, ...]) -> None:
    model = adapted(*flags)
    layer = model.get_base_model().model.language_model.layers[0].mlp.down_proj
    right = layer.get_delta_weight
    layer.get_delta_weight = lambda name: 4 * right(name)
    assert not check_merge(model, measure, is_4bit="--load_in_4bit" in flags).passed


@pytest.mark.parametrize(
    ("dtype", "kept", "passes"),
    [
        ("float32", 0.0, False),
        ("float32", 0.99, False),
        ("bfloat16", 0.0, False),
        ("bfloat16", 0.8, False),
        ("bfloat16", 0.97, True),
    ],
)
def test_a_merge_may_lose_a_tenth_of_the_adapter_in_16_bits_only(dtype: str, kept: float, passes: bool) -> None:
    model = adapted("--load_in_4bit", "--dtype", dtype, strength=0.1)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.get_delta_weight = lambda name, right=module.get_delta_weight: kept * right(name)
    assert check_merge(model, measure, is_4bit=True).passed == passes


@pytest.mark.parametrize(("dtype", "times"), [("float32", 1000), ("bfloat16", 4)])
def test_what_a_merge_into_4_bits_loses_is_told_and_would_fail(dtype: str, times: int) -> None:
    check = check_merge(adapted("--load_in_4bit", "--dtype", dtype), measure, is_4bit=True)
    assert check.passed
    assert nats_beside(check, "quantized again") > times * float(check.threshold.split()[1])


def test_a_merge_that_is_no_number_fails() -> None:
    model = adapted("--load_in_4bit")
    layer = model.get_base_model().model.language_model.layers[0].mlp.down_proj
    layer.get_delta_weight = lambda name: layer.lora_B[name].weight @ layer.lora_A[name].weight * float("nan")
    layer.merge = lambda safe_merge, adapter_names: None
    assert not check_merge(model, measure, is_4bit=True).passed


# --- learning by heart


def test_overfit() -> None:
    assert check_overfit(4.0, 0.39, 8, 60).passed
    assert not check_overfit(4.0, 0.41, 8, 60).passed
    assert not check_overfit(4.0, float("nan"), 8, 60).passed


def test_a_training_ends_once_it_has_learned() -> None:
    stop, control = StopWhenLearned(0.5), TrainerControl()
    for logs in (None, {}, {"loss": 0.6}, {"loss": float("nan")}, {"eval_loss": 0.1}):
        stop.on_log(None, TrainerState(), control, logs)  # type: ignore[arg-type]
        assert not control.should_training_stop
    stop.on_log(None, TrainerState(), control, {"loss": 0.4})  # type: ignore[arg-type]
    assert control.should_training_stop
