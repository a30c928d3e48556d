"""What a model does: each check passes on a sound model and fails on one that was broken on purpose."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import CPU, VISION, base, processing_class, settings_for
from torch import nn
from transformers import PreTrainedModel

from qvl.adapters import add_adapter
from qvl.answer_distributions import answer_distributions, divergences, largest_difference
from qvl.behaviour_checks import (
    LEAST_CHANGE_NATS,
    Alignment,
    another_image,
    check_alignment,
    check_alignment_kept,
    check_routing,
    measure_alignment,
)
from qvl.checks import Check, failed
from qvl.collators import CompletionCollator
from qvl.generate import Decoding
from qvl.generation_checks import check_generation, generate_tokens, repetition_rate
from qvl.models import load_base
from qvl.number_checks import check_finite, check_quantization_divergence
from qvl.scenes import captions, draw, make_scene

QWEN25 = "qvl/tiny-qwen2.5-vl"
PROMPT = "Describe the image in one sentence."


@functools.cache
def rows(count: int = 8) -> tuple[dict[str, Any], ...]:
    result = []
    for index in range(count):
        scene = make_scene(index, 3, "test")
        content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
        answer = [{"type": "text", "text": captions(scene)[0]}]
        result.append(
            {
                "where": f"scene {index}",
                "images": [draw(scene)],
                "prompt": [{"role": "user", "content": content}],
                "completion": [{"role": "assistant", "content": answer}],
            }
        )
    return tuple(result)


def collator(name: str = QWEN25) -> CompletionCollator:
    return CompletionCollator(processing_class(name), None)


def broken(name: str = QWEN25) -> PreTrainedModel:
    """A copy to be broken."""
    return copy.deepcopy(base(name))


def names(checks: list[Check]) -> set[str]:
    return {check.name for check in failed(checks)}


# --- routing


@pytest.mark.parametrize("name", VISION)
@pytest.mark.parametrize(
    "flags", [(), ("--load_in_4bit",), ("--load_in_8bit",), ("--dtype", "bfloat16", "--bf16", "false")]
)
def test_sound_models_route_as_they_should(name: str, flags: tuple[str, ...]) -> None:
    model = load_base(settings_for(name, *flags), CPU)
    checks = check_routing(model, rows(4), collator(name))
    assert failed(checks) == []
    assert len(checks) == 7
    for check in checks:
        if "changes" in check.name:
            assert check.value > 10 * LEAST_CHANGE_NATS, "the bound has to be far from what a sound model does"


def hook_visual(model: PreTrainedModel, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Changes what comes out of the vision tower and merger."""

    def changed(module: nn.Module, inputs: Any, output: Any) -> Any:
        output.pooler_output = change(output.pooler_output)
        return output

    model.model.visual.register_forward_hook(changed)


def hook_embeddings(model: PreTrainedModel, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: change(output))


def test_a_model_that_sees_nothing_fails() -> None:
    model = broken()
    hook_visual(model, torch.zeros_like)
    assert {"another_image_changes_the_answer", "swapping_two_images_changes_the_answer"} <= names(
        check_routing(model, rows(4), collator())
    )


def test_a_model_that_mixes_up_the_order_of_images_fails() -> None:
    model = broken()

    def sorted_images(features: torch.Tensor) -> torch.Tensor:
        # Puts the images of a batch into an order of their own, and so those of a swapped row too.
        return features[features.sum(dim=1).argsort()]

    hook_visual(model, sorted_images)
    assert "swapping_two_images_changes_the_answer" in names(check_routing(model, rows(2), collator()))


def test_a_model_that_does_not_read_fails() -> None:
    model = broken()
    processor: Any = processing_class(QWEN25)
    image_id = processor.image_token_id

    def only_images(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        words = inputs[0] != image_id
        return torch.where(words[..., None], torch.zeros_like(output), output)

    model.get_input_embeddings().register_forward_hook(only_images)
    checks = {check.name: check for check in check_routing(model, rows(4), collator())}
    assert not checks["blanking_the_text_changes_the_answer"].passed


def test_rows_that_leak_into_each_other_fail() -> None:
    model = broken()
    hook_embeddings(model, lambda embedded: embedded + 0.05 * embedded.mean(dim=0, keepdim=True))
    assert "other_rows_of_the_batch_do_not_matter" in names(check_routing(model, rows(4), collator()))


def test_padding_that_is_attended_to_fails() -> None:
    model = broken()
    whole = model.model.language_model.forward

    def without_mask(**inputs: Any) -> Any:
        return whole(**{**inputs, "attention_mask": None})

    model.model.language_model.forward = without_mask
    assert {"padding_does_not_matter_left"} <= names(check_routing(model, rows(4), collator()))


def test_a_model_that_counts_padding_fails() -> None:
    """Breaks padding on the right, which a causal model cannot see by itself."""
    model = broken()
    hook_embeddings(model, lambda embedded: embedded * (1 + 1e-3 * embedded.shape[1]))
    found = names(check_routing(model, rows(4), collator()))
    assert {"padding_does_not_matter_right", "padding_does_not_matter_much"} <= found


def test_not_a_number_is_no_change() -> None:
    model = broken()
    hook_visual(model, lambda features: features * float("nan"))
    assert len(failed(check_routing(model, rows(2), collator()))) == 7


# --- alignment


@pytest.mark.parametrize("name", VISION)
def test_captions_belong_to_their_images(name: str) -> None:
    found = measure_alignment(base(name), rows(32), collator(name), batch_size=8)
    assert failed(check_alignment(found, "before_training")) == []
    assert measure_alignment(base(name), rows(32), collator(name), batch_size=5).margin == pytest.approx(
        found.margin, abs=1e-3
    )


def test_images_given_to_other_rows_fail() -> None:
    found = measure_alignment(base(QWEN25), another_image(rows(32)), collator(), batch_size=8)
    checks = check_alignment(found, "before_training")
    assert names(checks) == {"own_image_likelier_share_before_training", "own_image_margin_before_training"}


def test_features_that_reach_the_next_row_fail() -> None:
    """The tower sees every image, and what it sees goes to another caption: nothing but the routing is wrong."""
    alike = [{**row, "images": [image.resize((128, 128)) for image in row["images"]]} for row in rows(32)]
    found = measure_alignment(base(QWEN25), alike, collator(), batch_size=8)
    assert failed(check_alignment(found, "before_training")) == []
    model = broken()
    hook_visual(model, lambda features: features.roll(len(features) // 8, dims=0))
    found = measure_alignment(model, alike, collator(), batch_size=8)
    assert len(failed(check_alignment(found, "before_training"))) == 2
    assert found.share < 0.5 and found.margin < 0


def test_a_blind_model_has_no_alignment() -> None:
    model = broken()
    hook_visual(model, torch.zeros_like)
    found = measure_alignment(model, rows(8), collator(), batch_size=8)
    assert len(failed(check_alignment(found, "after_training"))) == 2


def test_alignment_that_quantization_takes_away_fails() -> None:
    full = Alignment(0.9, 10.0, 2.0, 32)
    assert failed(check_alignment_kept(Alignment(0.85, 9.0, 2.0, 32), full, "before_training")) == []
    assert len(failed(check_alignment_kept(Alignment(0.75, 7.0, 2.0, 32), full, "before_training"))) == 2
    assert len(failed(check_alignment_kept(Alignment(0.9, 7.9, 2.0, 32), full, "before_training"))) == 1
    assert failed(check_alignment_kept(full, Alignment(0.5, 0.0, 2.0, 32), "before_training")), (
        "nothing to keep is no pass"
    )


# --- numbers


def adapted(name: str = QWEN25, dtype: torch.dtype = torch.float32) -> PeftModel:
    return add_adapter(broken(name).to(dtype), settings_for(name))


def batch(name: str = QWEN25) -> dict[str, torch.Tensor]:
    return collator(name)([dict(row) for row in rows(2)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sound_numbers(dtype: torch.dtype) -> None:
    model = adapted(dtype=dtype)
    checks = check_finite(model, batch())
    assert failed(checks) == []
    assert all(int(check.threshold.split()[2]) > 150 for check in checks), "every layer is looked at"
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_weight_fails(value: float) -> None:
    model = adapted()
    layer = model.get_base_model().model.language_model.layers[3].mlp.down_proj.base_layer
    with torch.no_grad():
        layer.weight[0, 0] = value
    check = check_finite(model, batch())[0]
    assert not check.passed and "layers.3.mlp.down_proj" in check.detail


def test_fp16_overflow_fails() -> None:
    """65,504 is fp16's largest number; the same weights are fine in fp32."""
    for dtype, passes in ((torch.float32, True), (torch.float16, False)):
        model = adapted(dtype=dtype)
        hook_embeddings(model.get_base_model(), lambda embedded: embedded * 1e6)
        assert check_finite(model, batch())[0].passed == passes


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan")


def test_a_bad_gradient_fails_though_the_outputs_are_sound() -> None:
    model = adapted()
    layer = model.get_base_model().model.language_model.layers[2].mlp
    layer.register_forward_hook(lambda module, inputs, output: _BadGradient.apply(output))
    output, gradient = check_finite(model, batch())
    assert output.passed and not gradient.passed


def test_divergence_of_4bit_from_full_weights() -> None:
    full = answer_distributions(base(QWEN25), rows(4), collator())
    quantized = load_base(settings_for(QWEN25, "--load_in_4bit"), CPU)
    check = check_quantization_divergence(answer_distributions(quantized, rows(4), collator()), full)
    assert check.passed and check.value > 0.005
    state = quantized.model.language_model.layers[1].mlp.down_proj.weight.quant_state
    state.absmax *= 4
    assert not check_quantization_divergence(answer_distributions(quantized, rows(4), collator()), full).passed


def test_distances_are_those_of_the_formulas() -> None:
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    expected = 0.5 * torch.log(torch.tensor(2.0)) + 0.5 * torch.log(torch.tensor(2 / 3))
    assert divergences([p.log()], [q.log()])[0] == pytest.approx(float(expected))
    assert divergences([p.log()], [p.log()]) == [0.0]
    assert largest_difference([p.log()], [q.log()]) == pytest.approx(float(torch.log(torch.tensor(2.0))))


# --- generation

DECODING = Decoding(max_new_tokens=24, batch_size=4, seed=0)


def prompts(count: int = 4) -> list[dict[str, Any]]:
    return [{"prompt": row["prompt"], "images": row["images"]} for row in rows(count)]


def check_answers(model: Any, decoding: Decoding = DECODING) -> list[Check]:
    return check_generation(model, processing_class(QWEN25), prompts(), decoding)


def test_sound_answers() -> None:
    assert failed(check_answers(base(QWEN25))) == []
    short = check_answers(base(QWEN25), Decoding(max_new_tokens=3, batch_size=4, seed=0))
    assert failed(short) == [], "the limit is an end too"


def test_answers_that_change_fail() -> None:
    model = broken()
    model.lm_head.register_forward_hook(lambda module, inputs, output: output + 5 * torch.randn_like(output))
    assert "answers_that_differ_when_repeated" in names(check_answers(model))


def test_answers_that_depend_on_their_batch_fail() -> None:
    model = broken()
    hook_embeddings(model, lambda embedded: embedded + embedded.mean(dim=0, keepdim=True))
    found = check_answers(model)
    assert names(found) & {"share_of_answers_that_differ_in_a_batch"}


@pytest.mark.parametrize(("lead", "passes"), [(0.25, True), (4.0, False)])
def test_in_16_bits_words_as_likely_as_each_other_may_change_places(lead: float, passes: bool) -> None:
    """Every answer of a long enough kind meets such a place; alone the one word comes first, in a batch the other."""
    model = broken().to(torch.bfloat16)

    def tied(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(output)
        output[..., 51] = 30.0
        output[..., 50] = 30.0 + (lead if len(output) == 1 else -lead)
        return output

    model.lm_head.register_forward_hook(tied)
    (check,) = [check for check in check_answers(model) if check.name == "share_of_answers_that_differ_in_a_batch"]
    assert check.passed is passes and check.value == (0 if passes else 1)


def test_a_loop_fails() -> None:
    model = broken()

    def stuck(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(output)
        output[..., 50] = 1.0
        return output

    model.lm_head.register_forward_hook(stuck)
    assert names(check_answers(model)) == {"repetition_rate"}


def test_answers_that_just_stop_fail() -> None:
    model = broken()
    whole = model.generate

    def cut(**kwargs: Any) -> Any:
        output = whole(**kwargs)
        output.sequences = output.sequences[:, : kwargs["input_ids"].shape[1] + 2]
        return output

    model.generate = cut
    assert "answers_without_end" in names(check_answers(model))


def test_tokens_end_with_the_end_token() -> None:
    end = processing_class(QWEN25).tokenizer.eos_token_id
    answers = generate_tokens(base(QWEN25), processing_class(QWEN25), prompts(2), DECODING)
    assert all(row.count(end) <= 1 and end not in row[:-1] for row in answers)


def test_repetition_rate() -> None:
    assert repetition_rate([1, 2, 3, 1, 2, 3, 1, 2, 3]) == pytest.approx(4 / 7)
    assert repetition_rate([1, 2, 3, 4, 5]) == 0
    assert repetition_rate([7] * 50) > 0.95
    assert repetition_rate([]) == repetition_rate([1, 2]) == 0


def test_random_weights_are_only_asked_what_must_not_matter() -> None:
    checks = check_routing(base(QWEN25), rows(2), collator(), has_learned=False)
    assert [check.passed for check in checks] == [True] * 4
    assert all("matter" in check.name for check in checks)
