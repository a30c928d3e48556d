"""Conversations that are too long lose their last turns, whole, with the images in them; and it is counted."""

import json
from pathlib import Path
from typing import Any

import pytest
import trl
from hypothesis import given
from hypothesis import strategies as st
from tiny import CHAT, VISION, picture, processing_class, settings_for

from qvl.collators import CompletionCollator
from qvl.data import DataConfig, load_examples, separate_completions
from qvl.encode import segments
from qvl.errors import UserError
from qvl.examples import undecoded_examples
from qvl.models import load_processing_class
from qvl.survey import training_lengths
from qvl.turns import Shortened, first_answers, num_answers, truncate_turns

LIMIT = 60
QWEN3 = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"


def turns(num_turns: int, words: int = 4) -> list[dict[str, Any]]:
    result = []
    for number in range(num_turns):
        result.append({"role": "user", "content": f"What colour is the shape number {number} ?"})
        result.append({"role": "assistant", "content": " ".join(["red"] * words)})
    return result


def load(folder: Path, rows: list[dict[str, Any]]) -> Any:
    path = folder / "chats.jsonl"
    lines = [json.dumps({**row, "split": split}) + "\n" for split in ("train", "test") for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return separate_completions(load_examples(DataConfig(str(path))).train)


def shortened(rows: Any, model: str, limit: int = LIMIT) -> Shortened:
    return truncate_turns(rows, training_lengths(rows, processing_class(model)), limit, processing_class(model))


def test_whole_turns_go_from_the_end_and_are_counted(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief ."}
    conversations = [turns(1), turns(7), [system, *turns(5)], turns(2)]
    rows = load(tmp_path, [{"messages": messages} for messages in conversations])
    before = training_lengths(rows, processing_class(CHAT))
    assert [row.num_tokens > LIMIT for row in before] == [False, True, True, False]
    result = shortened(rows, CHAT)
    kept = [row["messages"] for row in undecoded_examples(result.dataset)]
    original = [row["messages"] for row in undecoded_examples(rows)]
    for now, then in zip(kept, original, strict=True):
        assert now == then[: len(now)]
        assert now[-1]["role"] == "assistant"
    assert (kept[0], kept[3]) == (original[0], original[3])
    assert result.num_rows == 2
    assert result.num_answers == sum(map(num_answers, original)) - sum(map(num_answers, kept)) > 0
    assert result.lengths == training_lengths(result.dataset, processing_class(CHAT))
    for number in (1, 2):
        assert result.lengths[number].num_tokens <= LIMIT
        one_more = {"where": "row", "messages": first_answers(original[number], num_answers(kept[number]) + 1)}
        text = "".join(part.text for part in segments(one_more, processing_class(CHAT)))
        assert len(processing_class(CHAT)(text)["input_ids"]) > LIMIT, "a turn went that would have fitted"


def test_targets_of_what_is_left_are_whole_answers(tmp_path: Path) -> None:
    result = shortened(load(tmp_path, [{"messages": turns(9)}]), CHAT)
    tokenizer = processing_class(CHAT)
    batch = CompletionCollator(tokenizer, LIMIT)([result.dataset[0]])
    text = tokenizer.decode(batch["labels"][batch["labels"] != -100])
    assert text == "red red red red<|im_end|>" * num_answers(result.dataset[0]["messages"])


def test_rows_that_fit_are_the_same_object(tmp_path: Path) -> None:
    rows = load(tmp_path, [{"messages": turns(1)}])
    result = shortened(rows, CHAT)
    assert (result.dataset is rows, result.num_rows, result.num_answers) == (True, 0, 0)


def test_images_go_with_their_turns(tmp_path: Path) -> None:
    messages = []
    for number in range(4):
        picture(64 + 32 * number, 64, seed=number).save(tmp_path / f"{number}.png")
        messages.append({"role": "user", "content": "<image>What is this ?"})
        messages.append({"role": "assistant", "content": f"shape {number}"})
    rows = load(tmp_path, [{"images": [f"{number}.png" for number in range(4)], "messages": messages}])
    processor = processing_class(VISION[0])
    whole = training_lengths(rows, processor)[0]
    result = shortened(rows, VISION[0], whole.num_tokens - 1)
    row = result.dataset[0]
    assert [image.size for image in row["images"]] == [(64, 64), (96, 64), (128, 64)]
    assert row["image_names"] == ["0.png", "1.png", "2.png"]
    batch = CompletionCollator(processor, whole.num_tokens - 1)([row])
    assert (batch["input_ids"] == processor.image_token_id).sum() == result.lengths[0].num_visual_tokens
    assert len(batch["image_grid_thw"]) == 3


def test_a_first_answer_that_does_not_fit_is_named(tmp_path: Path) -> None:
    rows = load(tmp_path, [{"messages": turns(2)}, {"messages": turns(2, words=80)}])
    with pytest.raises(UserError, match=r"1 rows are longer.*truncate_turns never cuts into(.|\n)*chats\.jsonl:2: \d+"):
        shortened(rows, CHAT)


def test_instructions_with_one_response_are_not_cut(tmp_path: Path) -> None:
    rows = load(tmp_path, [{"images": [], "instruction": "Say red .", "response": " ".join(["red"] * 80)}])
    with pytest.raises(UserError, match=r"first answer alone"):
        shortened(rows, CHAT)


@given(st.lists(st.sampled_from(["user", "assistant", "tool"]), min_size=1), st.data())
def test_the_first_answers_are_a_beginning_that_ends_with_an_answer(roles: list[str], data: Any) -> None:
    messages = [{"role": role, "content": str(number)} for number, role in enumerate(roles)]
    if not num_answers(messages):
        return
    count = data.draw(st.integers(1, num_answers(messages)))
    kept = first_answers(messages, count)
    assert kept == messages[: len(kept)]
    assert kept[-1]["role"] == "assistant"
    assert num_answers(kept) == count


def test_thoughts_that_a_later_question_would_drop_make_the_longer_conversation_the_shorter_row(tmp_path: Path) -> None:
    """Qwen3's template keeps thoughts behind the last question only."""
    tokenizer = load_processing_class(settings_for(CHAT))
    tokenizer.chat_template = QWEN3.read_text(encoding="utf-8")
    messages = turns(3)
    messages[1]["reasoning_content"] = messages[5]["reasoning_content"] = "red " * 120
    rows = load(tmp_path, [{"messages": messages}])
    lengths = training_lengths(rows, tokenizer)
    result = truncate_turns(rows, lengths, 100, tokenizer)
    assert [num_answers(row["messages"]) for row in undecoded_examples(result.dataset)] == [2]
    assert result.lengths[0].num_tokens <= 100 < lengths[0].num_tokens
    alone = load(tmp_path, [{"messages": messages[:2]}])
    alone_tokens = training_lengths(alone, tokenizer)[0].num_tokens
    rows = load(tmp_path, [{"messages": messages}])
    with pytest.raises(UserError, match=rf"first answer alone(.|\n)*: {alone_tokens} tokens"):
        truncate_turns(rows, training_lengths(rows, tokenizer), 20, tokenizer)
