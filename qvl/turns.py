"""Conversations cut to a length by whole turns: the last ones go, never a part of one."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from qvl.encode import ProcessingClass
from qvl.errors import UserError
from qvl.examples import with_columns
from qvl.feature_store import dump_features, load_features
from qvl.image_refs import dump_refs, load_refs
from qvl.survey import RowLength, training_lengths

_ROWS_SHOWN = 20


@dataclass(frozen=True)
class Shortened:
    """What `truncate_turns` leaves.

    Attributes:
        dataset: the rows, all of which fit.
        lengths: of those rows.
        num_rows: rows that were cut.
        num_answers: assistant turns that were cut off them, and with them can teach nothing.
    """

    dataset: datasets.Dataset
    lengths: list[RowLength]
    num_rows: int
    num_answers: int


def num_answers(messages: Sequence[dict[str, Any]]) -> int:
    """Assistant turns of a conversation."""
    return sum(message["role"] == "assistant" for message in messages)


def first_answers(messages: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The conversation up to and including its `count`-th assistant turn (from 1).

    The beginning is what stays: every answer keeps all that it answers to.
    """
    ends = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return list(messages[: ends[count - 1] + 1])


def truncate_turns(
    dataset: datasets.Dataset, lengths: Sequence[RowLength], max_length: int, processing_class: ProcessingClass
) -> Shortened:
    """Shortens every row that is longer than `max_length` by as few turns at its end as will do.

    An image goes with the turn that it stands in. Which turns fit is found by rendering and counting anew: a template
    may write an answer otherwise once it is the last. Qwen3's leaves out thoughts that a later question follows, so
    that a longer conversation may be the shorter row; those with thoughts are tried answer by answer.

    Args:
        dataset: training rows; those with `prompt` and `completion` have one answer, which cannot go.
        lengths: of the same rows.
        max_length: in tokens.
        processing_class: the run's processor or tokenizer.

    Raises:
        UserError: rows whose first answer alone does not fit.
    """
    stored = dataset.with_format(None)
    overlong = [index for index, row in enumerate(lengths) if row.num_tokens > max_length]
    rows = {index: stored[index] for index in overlong}
    conversations = {index: json.loads(row["conversation"]) for index, row in rows.items()}
    # The most answers known to fit, and the fewest known not to, with their length.
    fitting = dict.fromkeys(overlong, 0)
    failing = {index: num_answers(conversations[index].get("messages", [])) for index in overlong}
    too_long = {index: lengths[index] for index in overlong}
    while searched := [index for index in overlong if failing[index] - fitting[index] > 1]:
        tried = {
            index: failing[index] - 1
            if _holds_thoughts(conversations[index]["messages"])
            else (fitting[index] + failing[index]) // 2
            for index in searched
        }
        shorter = [_cut(rows[index], conversations[index], tried[index]) for index in searched]
        candidates = _with_rows(dataset.select(searched), dict(enumerate(shorter)))
        measured = training_lengths(candidates, processing_class)
        for index, length in zip(searched, measured, strict=True):
            if length.num_tokens <= max_length:
                fitting[index] = tried[index]
            else:
                failing[index], too_long[index] = tried[index], length
    _refuse_hopeless([too_long[index] for index in overlong if fitting[index] == 0], max_length)
    if not overlong:
        return Shortened(dataset, list(lengths), 0, 0)
    cut = {index: _cut(rows[index], conversations[index], fitting[index]) for index in overlong}
    result = _with_rows(dataset, cut)
    new_lengths = training_lengths(result.select(overlong), processing_class)
    remeasured = dict(zip(overlong, new_lengths, strict=True))
    before = sum(num_answers(conversations[index]["messages"]) for index in overlong)
    return Shortened(
        result,
        [remeasured.get(index, length) for index, length in enumerate(lengths)],
        len(overlong),
        before - sum(fitting.values()),
    )


def _holds_thoughts(messages: Sequence[dict[str, Any]]) -> bool:
    return any(
        message.get("reasoning_content") or "</think>" in part.get("text", "")
        for message in messages
        if message["role"] == "assistant"
        for part in message["content"]
    )


def _cut(row: dict[str, Any], conversation: dict[str, Any], count: int) -> dict[str, Any]:
    """A stored row with its first `count` answers and the images of what is left."""
    messages = first_answers(conversation["messages"], count)
    num_images = sum(part["type"] == "image" for message in messages for part in message["content"])
    shorter = {
        "conversation": json.dumps({**conversation, "messages": messages}),
        "image_names": row["image_names"][:num_images],
        "image_sizes": row["image_sizes"][:num_images],
        "image_refs": dump_refs(load_refs(row["image_refs"])[:num_images]),
    }
    if "image_features" in row:
        shorter["image_features"] = dump_features(load_features(row["image_features"])[:num_images])
    return shorter


def _with_rows(dataset: datasets.Dataset, rows: Mapping[int, dict[str, Any]]) -> datasets.Dataset:
    """The same data set with some columns of some rows replaced."""
    columns = {name: list(dataset.with_format(None)[name]) for name in next(iter(rows.values()))}
    for index, row in rows.items():
        for name, values in columns.items():
            values[index] = row[name]
    return with_columns(dataset, columns)


def _refuse_hopeless(rows: Sequence[RowLength], max_length: int) -> None:
    if rows:
        shown = [f"  {row.where}: {row.num_tokens} tokens" for row in rows[:_ROWS_SHOWN]]
        rest = [f"  ... and {len(rows) - _ROWS_SHOWN} more"] if len(rows) > _ROWS_SHOWN else []
        message = (
            f"{len(rows)} rows are longer than --max_length {max_length} with their first answer alone, which "
            "--overlong truncate_turns never cuts into. Raise --max_length, or choose --overlong drop or truncate_text."
        )
        raise UserError("\n".join([message, *shown, *rest]))
