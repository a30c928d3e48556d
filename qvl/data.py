"""Rows in every accepted format -> examples: opening, checking, choosing, splitting by image.

The formats are described in the README; `qvl.rows` and `qvl.conversations` read them, `qvl.sources` opens them,
`qvl.validate` checks them, `qvl.sides` divides them, `qvl.examples` makes the data sets. Callers need this module only.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets

from qvl.data_config import DataConfig, MixedSet
from qvl.data_summary import DataSummary, summarize_split
from qvl.errors import UserError
from qvl.examples import build_dataset, image_sizes, prompt_messages, separate_completions
from qvl.mixture import mixture_counts, num_rows_to_read
from qvl.rows import RowToExample, caption_row
from qvl.sides import CheckedSet, Sides, check_set, divide, set_apart, shared_note, shown
from qvl.sources import SCENES
from qvl.validate import CheckedRows, GoodRow, image_keys

__all__ = [
    "SCENES",
    "DataConfig",
    "DataSummary",
    "LoadedData",
    "caption_row",
    "image_sizes",
    "load_examples",
    "prompt_messages",
    "separate_completions",
]


@dataclass(frozen=True)
class LoadedData:
    """Examples to train and to evaluate on, and what is known about them.

    `train[i]` is a dict with `id`, `where`, `image_names`, `images` (decoded RGB pictures), `references`, and either
    `prompt` (typed messages) and `completions` (texts) or `messages` (and `tools`, if any row has them). Beware of
    `train["id"]`: a data set with a transform makes whole rows for it and so decodes every picture; take
    `undecoded_examples`.
    """

    train: datasets.Dataset
    evaluation: datasets.Dataset
    summary: DataSummary


def load_examples(config: DataConfig, row_to_example: RowToExample | None = None) -> LoadedData:
    """Opens the data, checks the rows that will be used, and makes lazily decoding data sets of them.

    Rows keep the file's order on both sides, and the first ones are taken: shuffling is the trainer's, and a set of
    the first N rows can be named in a paper. Without named splits, or when both names are the same, rows are divided
    by image.

    Args:
        config: what to load.
        row_to_example: the recipe's own piece for rows that are neither `messages`, `conversations` nor
            `instruction`/`response`: gives `images`, `prompt`, `completions` and `references`, or None to leave the
            row out. Default: `caption_row`.

    Raises:
        UserError: the data cannot be reached, a split does not exist, or rows are wrong (first 20 listed).
    """
    piece = row_to_example or caption_row
    notes: list[str] = []
    part = _load_mixture(config, piece, notes) if config.datasets else _load_one(config, piece, notes)
    _note_fewer("num_train_examples", config.num_train_examples, part.train, notes)
    _note_fewer("num_eval_examples", config.num_eval_examples, part.evaluation, notes)
    train, evaluation = _unique_ids(part.train, part.evaluation, notes)
    part = replace(part, train=train, evaluation=evaluation)
    as_messages = any(row.kind == "messages" for row in [*train, *evaluation])
    with_tools = any(row.record.tools for row in [*train, *evaluation])
    keys = _short_keys(evaluation, part.tables)
    return LoadedData(
        train=build_dataset(train, part.tables, as_messages, with_tools),
        evaluation=build_dataset(evaluation, part.tables, as_messages, with_tools, keys),
        summary=_summarize(part, tuple(notes)),
    )


@dataclass(frozen=True)
class _Part:
    """Rows chosen from one data set, or from several (`parts`), their tables, and the passes they come from."""

    name: str
    revision: str | None
    train: list[GoodRow]
    evaluation: list[GoodRow]
    passes: tuple[CheckedRows, CheckedRows]
    tables: Mapping[str, datasets.Dataset]
    parts: tuple["_Part", ...] = ()


def _load_one(config: DataConfig, piece: RowToExample, notes: list[str]) -> _Part:
    checked = check_set(config, piece)
    [sides] = divide([checked], config.seed)
    notes += [*sides.notes, *shared_note(sides.evaluation, shown(sides.train))]
    return _part(checked, sides)


def _part(checked: CheckedSet, sides: Sides) -> _Part:
    return _Part(
        checked.source.name,
        checked.source.revision,
        [row for row, _ in sides.train],
        [row for row, _ in sides.evaluation],
        (checked.train, checked.evaluation or CheckedRows(checked.train.split)),
        checked.tables,
    )


def _load_mixture(config: DataConfig, piece: RowToExample, notes: list[str]) -> _Part:
    """The rows of several data sets one after the other, as many of each as its share asks for."""
    sets = [
        set_apart(check_set(_own_config(mixed, config), piece), number)
        for number, mixed in enumerate(config.datasets, start=1)
    ]
    used = _shares(divide(sets, config.seed), sets, config)
    trained_on = shown(row for sides in used for row in sides.train)
    for checked, sides in zip(sets, used, strict=True):
        own_notes = [*sides.notes, *shared_note(sides.evaluation, trained_on)]
        notes += [f"{checked.config.dataset_name}: {note}" for note in own_notes]
    parts = [_part(checked, sides) for checked, sides in zip(sets, used, strict=True)]
    passes = [
        CheckedRows(
            side,
            errors=[f"{part.name}: {error}" for part in parts for error in part.passes[index].errors],
            num_left_out=sum(part.passes[index].num_left_out for part in parts),
        )
        for index, side in enumerate(("train", "evaluation"))
    ]
    return _Part(
        name=" + ".join(part.name for part in parts),
        revision=None,
        train=[row for part in parts for row in part.train],
        evaluation=[row for part in parts for row in part.evaluation],
        passes=(passes[0], passes[1]),
        tables={name: table for part in parts for name, table in part.tables.items()},
        parts=tuple(parts),
    )


def _own_config(mixed: MixedSet, config: DataConfig) -> DataConfig:
    """What a mixture asks of one of its sets."""
    fractions = [other.fraction for other in config.datasets]
    return replace(
        config,
        dataset_name=mixed.path,
        dataset_config=mixed.name,
        dataset_revision=None,
        dataset_train_split=mixed.split or config.dataset_train_split,
        num_train_examples=num_rows_to_read(mixed.fraction, fractions, config.num_train_examples),
        num_eval_examples=num_rows_to_read(mixed.fraction, fractions, config.num_eval_examples),
        datasets=(),
    )


def _shares(divided: Sequence[Sides], sets: Sequence[CheckedSet], config: DataConfig) -> list[Sides]:
    """Of each set as many of its first rows as its share asks for.

    Raises:
        UserError: a share is less than one row.
    """
    fractions = [mixed.fraction for mixed in config.datasets]
    num_train = mixture_counts([len(sides.train) for sides in divided], fractions, config.num_train_examples)
    num_eval = mixture_counts([len(sides.evaluation) for sides in divided], fractions, config.num_eval_examples)
    if 0 in num_train:
        name = sets[num_train.index(0)].source.name
        raise UserError(f"{name}: its share of the mixture is less than one row; raise its `fraction`.")
    return [
        replace(sides, train=sides.train[:train_count], evaluation=sides.evaluation[:eval_count])
        for sides, train_count, eval_count in zip(divided, num_train, num_eval, strict=True)
    ]


def _summarize(part: _Part, notes: tuple[str, ...]) -> DataSummary:
    return DataSummary(
        dataset_name=part.name,
        revision=part.revision,
        train=summarize_split("train", part.train, part.passes[0]),
        evaluation=summarize_split("evaluation", part.evaluation, part.passes[1]),
        notes=notes,
        parts=tuple(_summarize(inner, ()) for inner in part.parts),
    )


def _short_keys(rows: list[GoodRow], tables: Mapping[str, Any]) -> list[list[str]]:
    """Of each row, what its images are known by whatever they are called: the bootstrap draws equal ones together."""
    keys = image_keys(rows, tables)
    return [
        [hashlib.sha256(key.encode()).hexdigest()[:16] for key in row_keys] if row.refs else []
        for row, row_keys in zip(rows, keys, strict=True)
    ]


def _note_fewer(flag: str, wanted: int | None, rows: list[GoodRow], notes: list[str]) -> None:
    if wanted is not None and len(rows) < wanted:
        notes.append(f"--{flag} asks for {wanted:,}, there are {len(rows):,}")


def _unique_ids(
    train: list[GoodRow], evaluation: list[GoodRow], notes: list[str]
) -> tuple[list[GoodRow], list[GoodRow]]:
    """LLaVA's own files repeat ids, so a repeated one is made unique by its place instead of being refused."""
    seen: set[str] = set()
    num_repeated = 0
    sides: tuple[list[GoodRow], list[GoodRow]] = ([], [])
    for side, rows in zip(sides, (train, evaluation), strict=True):
        for row in rows:
            if row.id in seen:
                num_repeated += 1
                row = replace(row, id=f"{row.id} ({row.where})")
            seen.add(row.id)
            side.append(row)
    if num_repeated:
        notes.append(f"{num_repeated:,} ids occur again: the place of the row was added to them")
    return sides
