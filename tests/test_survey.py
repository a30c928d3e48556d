"""The survey counts, without decoding an image, what the collator will make."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tiny import CHAT, LLAVA, VISION, message, picture, processing_class, settings_for

from qvl.active_run import load_data
from qvl.collators import CompletionCollator
from qvl.data import DataConfig, LoadedData, load_examples, prompt_messages, separate_completions
from qvl.encode import IGNORED_LABEL, ProcessingClass
from qvl.errors import UserError
from qvl.generate import PromptCollator
from qvl.models import load_processing_class
from qvl.survey import RowLength, describe_lengths, fit_rows, prompt_lengths, training_lengths

SIZES = [(8, 8), (64, 64), (100, 37), (500, 375), (375, 500), (33, 600), (1000, 90), (1200, 1200), (31, 31), (96, 96)]


def load(folder: Path, rows: list[dict[str, Any]]) -> LoadedData:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_examples(DataConfig(dataset_name=str(path), num_eval_examples=1))


def write_pictures(folder: Path) -> list[str]:
    names = []
    for number, (width, height) in enumerate(SIZES):
        picture(width, height).save(folder / f"{number}.png")
        names.append(f"{number}.png")
    return names


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """One image a row."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [
        {"image": name, "instruction": "What is it? " * number, "response": f"Number {number}: ünïcode 犬"}
        for number, name in enumerate(write_pictures(folder))
    ]
    return load(folder, rows).train


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """No, one or several images, one or several turns."""
    folder = tmp_path_factory.mktemp("talks")
    names = write_pictures(folder)
    rows: list[dict[str, Any]] = []
    for number in range(len(names)):
        parts = [{"type": "image", "image": name} for name in names[number : number + number % 4]]
        first = {"role": "user", "content": [*parts, {"type": "text", "text": "Hi " * number}]}
        turns = [first, {"role": "assistant", "content": f"Hello {number}"}]
        more = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "Bye"}]
        rows.append({"messages": turns + more * (number % 3)})
    return load(folder, rows).train


@functools.cache
def small_budget() -> ProcessingClass:
    return load_processing_class(settings_for(VISION[0], "--min_pixels", "2048", "--max_pixels", "20000"))


PROCESSORS = [pytest.param(lambda name=name: processing_class(name), id=name) for name in VISION]
PROCESSORS.append(pytest.param(small_budget, id="own pixel budget"))


def measured(example: dict[str, Any], processor: ProcessingClass) -> RowLength:
    """What the collator makes of a decoded row."""
    batch = CompletionCollator(processor, None)([example])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    targets = [label != IGNORED_LABEL for label in labels]
    images = [index for index, token in enumerate(ids) if token == getattr(processor, "image_token_id", -1)]
    needed = targets.index(True) + 1
    if images and images[-1] > needed:
        needed = targets.index(True, images[-1])
    return RowLength(example["where"], len(ids), len(images), sum(targets), needed)


@pytest.mark.parametrize("get_processor", PROCESSORS)
@pytest.mark.parametrize("kind", ["pairs", "talks"])
def test_lengths_are_the_collators(get_processor: Any, kind: str, request: pytest.FixtureRequest) -> None:
    processor = get_processor()
    rows = separate_completions(request.getfixturevalue(kind))
    lengths = training_lengths(rows, processor)
    assert lengths == [measured(rows[index], processor) for index in range(len(rows))]
    assert len({row.num_visual_tokens for row in lengths}) > 4, "the images are of too few sizes to prove anything"


@pytest.mark.parametrize("kind", ["pairs", "talks"])
def test_prompt_lengths_are_generations(kind: str, request: pytest.FixtureRequest) -> None:
    rows = request.getfixturevalue(kind)
    processor = processing_class(VISION[0])
    collator = PromptCollator(processor)
    expected = []
    for index in range(len(rows)):
        batch = collator([{"prompt": prompt_messages(rows[index]), "images": rows[index]["images"]}])
        expected.append(int(batch["attention_mask"].sum()))
    assert prompt_lengths(rows, processor) == expected


@pytest.fixture
def late(tmp_path: Path) -> Dataset:
    """The image stands in the second question."""
    rows = []
    for number in range(3):
        picture(96, 96 + 32 * number).save(tmp_path / f"{number}.png")
        turns = [
            message(*turn) for turn in (("user", "Hi"), ("assistant", "Hello"), ("user", ""), ("assistant", "Dog"))
        ]
        turns[2]["content"] = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": "And this?"}]
        rows.append({"messages": turns})
    return load(tmp_path, rows).train


def test_an_image_behind_the_first_answer(late: Dataset) -> None:
    processor = processing_class(VISION[0])
    lengths = training_lengths(late, processor)
    assert lengths == [measured(late[index], processor) for index in range(len(late))]
    # Found before training, not at the step that comes to the row.
    limit = lengths[0].num_needed_tokens
    CompletionCollator(processor, limit, truncate=True)([late[0]])
    assert len(fit_rows(late.select([0]), lengths[:1], limit, "truncate_text")) == 1
    with pytest.raises(UserError, match=r"rows\.jsonl:\d"):
        fit_rows(late.select([0]), lengths[:1], limit - 1, "truncate_text")


def test_captions_of_one_image_are_rows_of_their_own() -> None:
    config = DataConfig("qvl/scenes", num_train_examples=20, num_eval_examples=5, captions_per_image=5)
    rows = separate_completions(load_examples(config).train)
    processor = processing_class(VISION[0])
    lengths = training_lengths(rows, processor)
    assert len(lengths) == 100
    chosen = [0, 3, 57, 99]
    assert [lengths[index] for index in chosen] == [measured(rows[index], processor) for index in chosen]


def test_more_rows_than_a_batch(tmp_path: Path) -> None:
    turns = [(f"number {i}" + " a" * (i % 7), "b " * (i % 5) + "c") for i in range(600)]
    data = load(tmp_path, [{"messages": [message("user", q), message("assistant", a)]} for q, a in turns])
    tokenizer = processing_class(CHAT)
    lengths = training_lengths(data.train, tokenizer)
    assert len(lengths) == len(data.train)
    assert [lengths[i] for i in (0, 255, 256, 590)] == [measured(data.train[i], tokenizer) for i in (0, 255, 256, 590)]
    assert all(row.num_visual_tokens == 0 for row in lengths)


# Placeholders that are no images


@pytest.mark.parametrize("place", ["instruction", "response"])
def test_a_literal_placeholder_is_named(place: str, tmp_path: Path) -> None:
    rows = []
    for number in range(3):
        picture(64, 64, number).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "instruction": "What?", "response": "A dog"})
    data = load(tmp_path, [{**row, place: "See <|image_pad|> here"} for row in rows])
    with pytest.raises(UserError, match=r"rows\.jsonl:\d: 2 image placeholders .* for 1 images\. .*remove it"):
        training_lengths(separate_completions(data.train), processing_class(VISION[0]))


def test_images_for_a_model_of_text_only(pairs: Dataset) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl:\d+: .*takes text only"):
        training_lengths(separate_completions(pairs), processing_class(CHAT))
    with pytest.raises(UserError, match=r"rows\.jsonl:\d+: .*takes text only"):
        prompt_lengths(pairs, processing_class(CHAT))


# Rows that do not fit


@pytest.fixture(scope="module")
def surveyed(pairs: Dataset) -> tuple[Dataset, list[RowLength]]:
    rows = separate_completions(pairs)
    return rows, training_lengths(rows, processing_class(VISION[0]))


@pytest.mark.parametrize("overlong", ["error", "drop", "truncate_text"])
def test_rows_that_all_fit_are_left_alone(surveyed: Any, overlong: str) -> None:
    rows, lengths = surveyed
    longest = max(row.num_tokens for row in lengths)
    assert fit_rows(rows, lengths, longest, overlong) is rows
    assert fit_rows(rows, lengths, None, overlong) is rows


def test_error_lists_the_rows(surveyed: Any) -> None:
    rows, lengths = surveyed
    limit = sorted(row.num_tokens for row in lengths)[-3]
    with pytest.raises(UserError) as caught:
        fit_rows(rows, lengths, limit, "error")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"2 rows are longer than --max_length {limit}. Raise --max_length, lower --max_pixels")
    named = [row for row in lengths if row.num_tokens > limit]
    assert lines[1:] == [f"  {r.where}: {r.num_tokens} tokens, {r.num_visual_tokens} of them visual" for r in named]


def test_error_lists_twenty_and_the_number_of_the_rest() -> None:
    lengths = [RowLength(f"row {i}", 100, 0, 5, 96) for i in range(50)]
    with pytest.raises(UserError) as caught:
        fit_rows(Dataset.from_dict({"x": range(50)}), lengths, 99, "error")
    lines = str(caught.value).splitlines()
    assert len(lines) == 22 and lines[-1] == "  ... and 30 more"


def test_drop_keeps_exactly_the_rows_that_fit(surveyed: Any) -> None:
    rows, lengths = surveyed
    limit = sorted(row.num_tokens for row in lengths)[-3]
    kept = fit_rows(rows, lengths, limit, "drop")
    assert len(kept) == len(rows) - 2
    assert training_lengths(kept, processing_class(VISION[0])) == [row for row in lengths if row.num_tokens <= limit]
    CompletionCollator(processing_class(VISION[0]), limit)([kept[index] for index in range(len(kept))])


def test_dropping_everything_is_an_error(surveyed: Any) -> None:
    rows, lengths = surveyed
    with pytest.raises(UserError, match="leaves no row"):
        fit_rows(rows, lengths, 5, "drop")


def test_truncation_passes_what_the_collator_can_cut(surveyed: Any) -> None:
    rows, lengths = surveyed
    limit = max(row.num_needed_tokens for row in lengths)
    assert any(row.num_tokens > limit for row in lengths)
    assert fit_rows(rows, lengths, limit, "truncate_text") is rows
    collator = CompletionCollator(processing_class(VISION[0]), limit, truncate=True)
    assert collator([rows[index] for index in range(len(rows))])["input_ids"].shape[1] == limit
    with pytest.raises(UserError, match="prompts alone fill it"):
        fit_rows(rows, lengths, limit - 1, "truncate_text")


def test_the_description_adds_up() -> None:
    lengths = [RowLength("a", 10, 0, 2, 8), RowLength("b", 30, 20, 4, 26), RowLength("c", 20, 10, 4, 16)]
    assert describe_lengths(lengths) == [
        "  tokens a training row: 10 to 30, median 20, 60 in all",
        "  visual tokens of a row with images: 10 to 20, median 10",
        "  trained on: 16.7% of the tokens",
    ]
    assert len(describe_lengths(lengths[:1])) == 2


# --- images that a processor refuses


@pytest.fixture
def long_pictures(tmp_path: Path) -> str:
    """Rows whose pictures are 1, 200 and 300 times as long as wide; the third is too long for Qwen's processors."""
    rows = []
    for number, (width, height) in enumerate([(64, 64), (400, 2), (600, 2), (64, 60)]):
        picture(width, height).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "instruction": "What is it?", "response": "Noise."})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("name", VISION)
def test_a_picture_that_the_processor_refuses_makes_a_bad_row(name: str, long_pictures: str) -> None:
    settings = settings_for(name, "--dataset_name", long_pictures, "--num_eval_examples", "1")
    with pytest.raises(UserError) as caught:
        load_data(settings, None, processing_class(name))
    assert (
        '1 bad row(s):\n  rows.jsonl:3: image "2.png" is 600 x 2 pixels, which the model\'s processor refuses '
        "(absolute aspect ratio must be smaller than 200, got 300.0): crop it or remove the row.\n"
        "Correct them, or pass --skip_bad_rows"
    ) in str(caught.value)
    data = load_data(
        settings_for(name, "--dataset_name", long_pictures, "--num_eval_examples", "1", "--skip_bad_rows"),
        None,
        processing_class(name),
    )
    assert data.summary.num_skipped == 1
    rows = [separate_completions(side)[index] for side in (data.train, data.evaluation) for index in range(len(side))]
    assert sorted(row["image_names"][0] for row in rows) == ["0.png", "1.png", "3.png"]
    assert CompletionCollator(processing_class(name), None)(rows)["image_grid_thw"].shape == (3, 3)


def test_a_picture_of_any_shape_is_taken_where_the_processor_takes_it(long_pictures: str) -> None:
    settings = settings_for(VISION[0], "--dataset_name", long_pictures, "--num_eval_examples", "1")
    for takes_all in (LLAVA, CHAT):
        data = load_data(settings, None, processing_class(takes_all))
        assert len(data.train) + len(data.evaluation) == 4
    train = separate_completions(load_data(settings, None, processing_class(LLAVA)).train)
    assert CompletionCollator(processing_class(LLAVA), None)(list(train))["pixel_values"].shape[0] == len(train)
