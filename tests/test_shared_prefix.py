"""Answers that share their prompt, and samples that share a row, train as separate samples do."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import CHAT, LLAVA, VISION, base, message, picture, processing_class
from transformers import (
    InternVLConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from qvl.collators import CompletionCollator
from qvl.encode import IGNORED_LABEL, tokenizer_of
from qvl.errors import UserError
from qvl.positions import positions_of
from qvl.recipe import run
from qvl.segment_attention import (
    PADDING_SEGMENT,
    SEGMENTS_PER_SAMPLE,
    dense_mask,
    use_sdpa,
    use_segment_attention,
)
from qvl.shared_prefix import SharedPrefixCollator, segment_refusal
from recipes.flickr8k import RECIPE

Example = dict[str, Any]
FAMILIES = [*VISION, LLAVA, CHAT]


def tree(question: str, answers: list[str], images: list[Any] | None = None, where: str = "row") -> Example:
    images = images or []
    return {
        "where": where,
        "images": images,
        "prompt": [message("user", question, len(images))],
        "completions": answers,
    }


def collator(name: str, **kwargs: Any) -> SharedPrefixCollator:
    return SharedPrefixCollator(
        processing_class(name), positions_of(base(name).config), kwargs.pop("max_length", None), **kwargs
    )


def separate(examples: list[Example]) -> list[Example]:
    return [
        {
            **{key: value for key, value in example.items() if key != "completions"},
            "completion": [message("assistant", a)],
        }
        for example in examples
        for a in example["completions"]
    ]


def trl_batch(examples: list[Example], name: str) -> dict[str, torch.Tensor]:
    """Separate samples through TRL's collator, without the newline that it teaches behind the end token."""
    processor = processing_class(name)
    if name == CHAT:  # TRL tokenizes text outside of its collator; tests/test_collators.py holds ours to it
        return CompletionCollator(processor, None)(separate(examples))
    keys = ("images", "prompt", "completion")
    rows = [{key: copy.deepcopy(row[key]) for key in keys} for row in separate(examples)]
    batch = dict(DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)(rows))
    end = tokenizer_of(processor).eos_token_id
    follows_end = torch.nn.functional.pad(batch["input_ids"][:, :-1] == end, (1, 0))
    labels = batch["labels"].masked_fill(follows_end, IGNORED_LABEL)
    return {**batch, "labels": labels}


def loss_and_gradients(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    batch = {key: value for key, value in batch.items() if key != "num_answers"}
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_trains_like_separate_samples(
    name: str, examples: list[Example], rows: list[dict[str, Any]] | None = None, **kwargs: Any
) -> None:
    model = base(name)
    loss, gradients = loss_and_gradients(model, trl_batch(examples, name))
    use_segment_attention(model)
    try:
        ours, our_gradients = loss_and_gradients(model, collator(name, **kwargs)(rows or examples))
    finally:
        use_sdpa(model)
        model.zero_grad()
    assert ours == pytest.approx(loss, rel=1e-6)
    assert our_gradients.keys() == gradients.keys()
    largest = max(float(gradient.norm()) for gradient in gradients.values())
    for key, gradient in gradients.items():
        # A parameter whose gradient is rounding noise beside the others' has no relative error.
        assert (our_gradients[key] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7 * largest, key


PHOTOS = [picture(64, 64), picture(100, 70), picture(70, 150)]
EXAMPLES = [
    tree("Describe.", ["A dog runs.", "Dog", "There is a dog that runs, it seems."], PHOTOS[:1]),
    tree("What do you see here, in detail?", ["One answer only"], PHOTOS[1:2]),
    tree("Compare both pictures please", ["Same", "Not the same"], PHOTOS[1:]),
    tree("No picture", ["ünïcode, 犬", "b", "c", "d", "e"]),
]


def examples_for(name: str) -> list[Example]:
    return (
        EXAMPLES
        if name != CHAT
        else [{**row, **tree("Hi " * len(row["completions"]), row["completions"])} for row in EXAMPLES]
    )


@pytest.mark.parametrize("name", [VISION[0], CHAT])
def test_packs_train_like_separate_samples(name: str) -> None:
    examples = examples_for(name)
    packs = [{"pack": examples[:1]}, {"pack": examples[1:]}]
    assert_trains_like_separate_samples(name, examples, packs, padding_free=True)


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_separate_samples(name: str, padding_free: bool) -> None:
    assert_trains_like_separate_samples(name, examples_for(name), padding_free=padding_free, pad_to_multiple_of=16)


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ANSWERS = st.lists(WORDS.filter(lambda text: text.strip() != ""), min_size=1, max_size=6)
IMAGES = st.lists(st.builds(picture, st.integers(4, 120), st.integers(4, 120), st.integers(0, 9)), max_size=2)
TREES = st.lists(st.builds(tree, WORDS, ANSWERS, IMAGES), min_size=1, max_size=3)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(examples=TREES, name=st.sampled_from([*VISION, LLAVA]), padding_free=st.booleans())
def test_so_they_are_for_random_shapes(examples: list[Example], name: str, padding_free: bool) -> None:
    assert_trains_like_separate_samples(name, examples, padding_free=padding_free)


# What it costs


def num_tokens(examples: list[Example]) -> int:
    return int(collator(VISION[0])(examples)["attention_mask"].sum())


def test_five_captions_of_an_image_cost_little_more_than_one() -> None:
    """A photo of some 200 visual tokens, as Qwen3-VL-8B makes of 500 x 375 pixels, and captions of 13 tokens."""
    photo, caption = picture(448, 448), "a small red circle is to the left of a large blue square"
    tokenizer = tokenizer_of(processing_class(VISION[0]))
    assert 10 <= len(tokenizer(caption)["input_ids"]) <= 16
    one = num_tokens([tree("Describe the image in one sentence.", [caption], [photo])])
    five = num_tokens([tree("Describe the image in one sentence.", [caption] * 5, [photo])])
    assert 192 <= one <= 260
    assert five <= 1.4 * one


# Places and masks


def test_the_mask_of_a_tree_is_the_one_documented() -> None:
    rows = ["x.....", "xx....", "xxx...", "xxxx..", "xx..x.", "xx..xx"]
    wanted = torch.tensor([[mark == "x" for mark in row] for row in rows])
    assert torch.equal(dense_mask(torch.tensor([[0, 0, 1, 1, 2, 2]]))[0, 0], wanted)


def test_samples_of_a_row_do_not_see_each_other_and_padding_sees_itself() -> None:
    batch = collator(VISION[0], padding_free=True, pad_to_multiple_of=64)(EXAMPLES)
    (segments,) = batch["segment_ids"]
    assert len(segments) % 64 == 0
    mask = dense_mask(batch["segment_ids"])[0, 0]
    sample = torch.where(segments == PADDING_SEGMENT, -1, segments // SEGMENTS_PER_SAMPLE)
    assert not mask[sample[:, None] != sample].any()
    assert mask.diagonal().all()
    assert int((sample == -1).sum()) == int((batch["attention_mask"] == 0).sum())


def test_the_counts_are_those_of_the_examples() -> None:
    assert int(collator(VISION[0])(EXAMPLES)["num_answers"]) == sum(len(row["completions"]) for row in EXAMPLES)


# What is refused


def test_an_answer_that_is_too_long_is_named() -> None:
    rows = [tree("Hi", ["Hello", "word " * 50], where="captions.jsonl:12")]
    with pytest.raises(UserError, match=r"^captions\.jsonl:12: \d+ tokens, max_length is 30\."):
        collator(VISION[0], max_length=30)(rows)
    cut = collator(VISION[0], max_length=30, truncate=True)(rows)
    whole = collator(VISION[0])(rows)
    assert cut["input_ids"].shape[1] < whole["input_ids"].shape[1]


def test_more_answers_than_a_sample_has_numbers_for_are_named() -> None:
    most = SEGMENTS_PER_SAMPLE - 1
    after = tree("b", ["y", "z"])
    batch = collator(CHAT, padding_free=True)([tree("a", ["x"] * most), after])
    assert set((batch["segment_ids"] // SEGMENTS_PER_SAMPLE).flatten().tolist()) == {0, 1}
    assert int((batch["segment_ids"] == SEGMENTS_PER_SAMPLE + 2).sum()) > 1
    with pytest.raises(UserError, match=rf"^rows\.jsonl:7: {most + 1} answers .* --captions_per_step {most} or less"):
        collator(CHAT)([tree("a", ["x"] * (most + 1), where="rows.jsonl:7"), after])


def test_models_that_are_not_proven_are_refused_with_the_reason() -> None:
    assert segment_refusal(base(VISION[0]).config, None) is None
    assert "flash_attention_2 knows no segments" in str(segment_refusal(base(VISION[0]).config, "flash_attention_2"))
    assert "not proven for models of type llama" in str(segment_refusal(LlamaConfig(), None))
    sliding = Qwen2Config(num_hidden_layers=2, use_sliding_window=True, sliding_window=8, max_window_layers=0)
    assert "do not attend to the whole row" in str(segment_refusal(sliding, None))


@pytest.mark.parametrize("name", FAMILIES)
def test_proven_families_are_those_compared_above(name: str) -> None:
    assert segment_refusal(base(name).config, None) is None


@pytest.mark.parametrize("family", [InternVLConfig, LlavaOnevisionConfig, LlavaNextConfig])
@pytest.mark.parametrize("text", [Qwen2Config, Qwen3Config])
def test_a_proven_language_model_does_not_prove_what_is_around_it(
    family: type[PretrainedConfig], text: type[PretrainedConfig]
) -> None:
    reason = f"not proven for models of type {family.model_type} with {text.model_type}"
    assert reason in str(segment_refusal(family(text_config=text()), None))


# The whole recipe


@pytest.mark.slow
def test_a_run_has_the_same_losses_with_and_without(tmp_path: Path) -> None:
    """Ten captions a step either way, in the order of the file."""
    curves = []
    for name, flags in {
        "shared": ["--per_device_train_batch_size", "2"],
        "packed": ["--per_device_train_batch_size", "2", "--padding_free", "true"],
        "separate": ["--per_device_train_batch_size", "10", "--no_shared_prefix"],
    }.items():
        same = ["--smoke", "--stages", "train", "--max_steps", "6", "--logging_steps", "1", "--lora_dropout", "0"]
        order = ["--train_sampling_strategy", "sequential", "--num_train_examples", "20", "--num_eval_examples", "2"]
        run(RECIPE, argv=[*same, *order, *flags, "--output_dir", str(tmp_path / name)])
        log = [json.loads(line) for line in (tmp_path / name / "training_log.jsonl").read_text().splitlines()]
        curves.append([row["loss"] for row in log if "loss" in row])
    shared, packed, separate = curves
    assert len(separate) == 6
    assert shared == pytest.approx(separate, rel=1e-4)
    assert packed == pytest.approx(separate, rel=1e-4)
