"""What the rows weigh in tokens, found out before the first step and without decoding an image."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from datasets import Dataset
from transformers import ProcessorMixin

from qvl.data import prompt_messages
from qvl.encode import ProcessingClass, Segment, prompt_text, segments, tokenizer_of
from qvl.errors import UserError, first_line
from qvl.examples import undecoded_examples

_ROWS_PER_BATCH = 256
_ROWS_SHOWN = 20


@dataclass(frozen=True)
class RowLength:
    """One row in tokens.

    Attributes:
        where: the row, for messages.
        num_tokens: all of it, visual tokens included.
        num_visual_tokens: of its images.
        num_target_tokens: that are trained on.
        num_needed_tokens: the fewest that the row can be cut to: all images, the text up to the turn behind them, and
            one target.
    """

    where: str
    num_tokens: int
    num_visual_tokens: int
    num_target_tokens: int
    num_needed_tokens: int


def training_lengths(dataset: Dataset, processing_class: ProcessingClass) -> list[RowLength]:
    """Lengths of training rows (`prompt` and `completion`, or `messages`).

    Raises:
        UserError: rows whose text holds another number of image placeholders than they have images, or whose answers
            cannot be told from the rest.
    """
    result: list[RowLength] = []
    for rows in _batches(undecoded_examples(dataset)):
        marked = [segments(row, processing_class) for row in rows]
        counts = iter(_count([segment.text for row in marked for segment in row], processing_class))
        for row, parts in zip(rows, marked, strict=True):
            visual = _visual_tokens(row, "".join(part.text for part in parts), processing_class)
            lengths = [next(counts) for _ in parts]
            result.append(_row_length(row["where"], parts, lengths, visual, processing_class))
    return result


def _row_length(
    where: str,
    parts: Sequence[Segment],
    lengths: Sequence[int],
    visual: Sequence[int],
    processing_class: ProcessingClass,
) -> RowLength:
    """Adds up a row from its segments' lengths before expansion, where every image is one token yet."""
    placeholder = getattr(processing_class, "image_token", None)
    waiting = iter(visual)
    position = num_targets = num_needed = 0
    for part, length in zip(parts, lengths, strict=True):
        num_places = part.text.count(placeholder) if placeholder else 0
        end = position + length + sum(next(waiting) - 1 for _ in range(num_places))
        if part.is_target:
            num_needed = num_needed if num_targets else position + 1
            num_targets += end - position
        elif num_places:
            num_needed = end
        position = end
    return RowLength(where, position, sum(visual), num_targets, num_needed)


def prompt_lengths(dataset: Dataset, processing_class: ProcessingClass) -> list[int]:
    """Tokens of each row's prompt, visual ones included."""
    result: list[int] = []
    for rows in _batches(undecoded_examples(dataset)):
        texts = [prompt_text(prompt_messages(row), processing_class, row.get("tools")) for row in rows]
        for row, text, count in zip(rows, texts, _count(texts, processing_class), strict=True):
            visual = _visual_tokens(row, text, processing_class)
            result.append(count + sum(visual) - len(visual))
    return result


def fit_rows(dataset: Dataset, lengths: Sequence[RowLength], max_length: int | None, overlong: str) -> Dataset:
    """Applies the policy for rows longer than `max_length`.

    Args:
        dataset: training rows.
        lengths: of the same rows.
        max_length: in tokens, None for no limit.
        overlong: "error", "drop" (the rows go) or "truncate_text" (the collator cuts behind `max_length`).

    Returns:
        The rows to train on; the difference in length is what was dropped.

    Raises:
        UserError: rows too long under "error"; rows whose prompt leaves no room for an answer under "truncate_text";
            nothing left under "drop".
    """
    if max_length is None:
        return dataset
    if overlong == "truncate_text":
        hopeless = [row for row in lengths if row.num_needed_tokens > max_length]
        remedy = "Their images and prompts alone fill it: lower --max_pixels, raise --max_length or drop them."
    else:
        hopeless = [row for row in lengths if row.num_tokens > max_length]
        remedy = "Raise --max_length, lower --max_pixels, or choose --overlong drop or truncate_text."
    if hopeless and overlong != "drop":
        shown = [f"  {row.where}: {row.num_tokens} tokens, {row.num_visual_tokens} of them visual" for row in hopeless]
        rest = [f"  ... and {len(hopeless) - _ROWS_SHOWN} more"] if len(hopeless) > _ROWS_SHOWN else []
        raise UserError(
            "\n".join(
                [
                    f"{len(hopeless)} rows are longer than --max_length {max_length}. {remedy}",
                    *shown[:_ROWS_SHOWN],
                    *rest,
                ]
            )
        )
    kept = [index for index, row in enumerate(lengths) if row.num_tokens <= max_length]
    if overlong != "drop" or len(kept) == len(dataset):
        return dataset
    if not kept:
        raise UserError(f"--overlong drop leaves no row: all are longer than --max_length {max_length}.")
    return dataset.select(kept)


def describe_lengths(lengths: Sequence[RowLength]) -> list[str]:
    """Text lines: token lengths, visual tokens, and the share that is trained on."""
    tokens = [row.num_tokens for row in lengths]
    visual = [row.num_visual_tokens for row in lengths if row.num_visual_tokens]
    lines = [f"  tokens a training row: {_spread(tokens)}, {sum(tokens):,} in all"]
    if visual:
        lines.append(f"  visual tokens of a row with images: {_spread(visual)}")
    share = sum(row.num_target_tokens for row in lengths) / sum(tokens)
    return [*lines, f"  trained on: {share:.1%} of the tokens"]


def _spread(values: Sequence[int]) -> str:
    return f"{min(values)} to {max(values)}, median {statistics.median_low(values)}"


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _ROWS_PER_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _count(texts: Sequence[str], processing_class: ProcessingClass) -> list[int]:
    encoded = tokenizer_of(processing_class)(list(texts), add_special_tokens=False)
    return [len(ids) for ids in encoded["input_ids"]]


def _visual_tokens(row: dict[str, Any], text: str, processing_class: ProcessingClass) -> list[int]:
    """Visual tokens of each image of a row, after checking that the text has a place for each."""
    sizes = row["image_sizes"]
    placeholder = getattr(processing_class, "image_token", None)
    num_places = text.count(placeholder) if placeholder else 0
    if num_places != len(sizes):
        raise UserError(
            f"{row['where']}: {num_places} image placeholders ({placeholder}) in the rendered text for {len(sizes)} "
            "images. "
            + ("Its text holds the placeholder itself: remove it." if num_places else "This model takes text only.")
        )
    return [num_visual_tokens(processing_class, height, width) for width, height in sizes]


@lru_cache(maxsize=65536)
def num_visual_tokens(processing_class: ProcessorMixin, height: int, width: int) -> int:
    """Visual tokens that a processor makes of an image of this size in pixels, EXIF rotation applied."""
    return int(processing_class._get_num_multimodal_tokens(image_sizes=[(height, width)])["num_image_tokens"][0])


def size_refusal(processing_class: ProcessorMixin, width: int, height: int) -> str | None:
    """Why a processor takes no image of this size in pixels, in its own words; None where it does.

    Qwen's refuse images more than 200 times as long as wide; CLIP's take any.
    """
    try:
        num_visual_tokens(processing_class, height, width)
    except ValueError as error:
        return first_line(error)
    return None
