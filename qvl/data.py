"""Rows in every accepted format -> examples: opening, checking, choosing, splitting by image.

The formats are described in the README; `qvl.rows` and `qvl.conversations` read them, `qvl.sources` opens them,
`qvl.validate` checks them, `qvl.examples` makes the data sets. Callers need this module only.
"""

import difflib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import datasets

from qvl.data_config import DataConfig
from qvl.data_summary import DataSummary, summarize_split
from qvl.errors import UserError
from qvl.examples import build_dataset, image_sizes, prompt_messages, separate_completions
from qvl.mixture import apart, mixture_counts, num_rows_to_read, table_name
from qvl.rows import RowToExample, caption_row
from qvl.sources import SCENES, Source, open_source
from qvl.splits import split_by_image
from qvl.validate import CheckedRows, GoodRow, check_rows, image_keys, refuse_bad_rows

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


# Training rows, evaluation rows, and the passes they come from.
_Chosen = tuple[list[GoodRow], list[GoodRow], tuple[CheckedRows, CheckedRows]]


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
    part = _load_mixture(config, piece, notes) if config.datasets else _load_part(config, piece, notes)
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


def _load_part(config: DataConfig, piece: RowToExample, notes: list[str]) -> _Part:
    source = open_source(config)
    if "" in source.splits or config.dataset_train_split == config.dataset_test_split:
        train, evaluation, passes = _rows_by_image(source, config, piece, notes)
    else:
        train, evaluation, passes = _rows_by_name(source, config, piece, notes)
    return _Part(source.name, source.revision, train, evaluation, passes, source.tables)


def _load_mixture(config: DataConfig, piece: RowToExample, notes: list[str]) -> _Part:
    """The rows of several data sets one after the other, as many of each as its share asks for."""
    fractions = [mixed.fraction for mixed in config.datasets]
    loaded = []
    for mixed in config.datasets:
        own_notes: list[str] = []
        own_config = replace(
            config,
            dataset_name=mixed.path,
            dataset_config=mixed.name,
            dataset_revision=None,
            dataset_train_split=mixed.split or config.dataset_train_split,
            num_train_examples=num_rows_to_read(mixed.fraction, fractions, config.num_train_examples),
            num_eval_examples=num_rows_to_read(mixed.fraction, fractions, config.num_eval_examples),
            datasets=(),
        )
        loaded.append(_load_part(own_config, piece, own_notes))
        notes += [f"{mixed.path}: {note}" for note in own_notes]
    num_train = mixture_counts([len(part.train) for part in loaded], fractions, config.num_train_examples)
    num_eval = mixture_counts([len(part.evaluation) for part in loaded], fractions, config.num_eval_examples)
    parts = []
    for number, (part, train_count, eval_count) in enumerate(zip(loaded, num_train, num_eval, strict=True), start=1):
        if train_count == 0:
            raise UserError(f"{part.name}: its share of the mixture is less than one row; raise its `fraction`.")
        train, evaluation = (
            [apart(row, number, part.name) for row in rows[:count]]
            for rows, count in ((part.train, train_count), (part.evaluation, eval_count))
        )
        tables = {table_name(number, split): table for split, table in part.tables.items()}
        parts.append(replace(part, train=train, evaluation=evaluation, tables=tables))
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


def _summarize(part: _Part, notes: tuple[str, ...]) -> DataSummary:
    return DataSummary(
        dataset_name=part.name,
        revision=part.revision,
        train=summarize_split("train", part.train, part.passes[0]),
        evaluation=summarize_split("evaluation", part.evaluation, part.passes[1]),
        notes=notes,
        parts=tuple(_summarize(inner, ()) for inner in part.parts),
    )


def _rows_by_name(source: Source, config: DataConfig, piece: RowToExample, notes: list[str]) -> _Chosen:
    train_split = _known_split(config.dataset_train_split, source, "dataset_train_split")
    test_split = _known_split(config.dataset_test_split, source, "dataset_test_split")
    train = check_rows(source, train_split, config, piece, config.num_train_examples)
    evaluation = check_rows(source, test_split, config, piece, config.num_eval_examples)
    refuse_bad_rows([train, evaluation], config)
    keys = image_keys([*train.good, *evaluation.good], source.tables)
    seen = {key for row_keys in keys[: len(train.good)] for key in row_keys}
    num_shared = sum(any(key in seen for key in row_keys) for row_keys in keys[len(train.good) :])
    if num_shared:
        notes.append(f"WARNING: {num_shared:,} evaluation rows show an image (or text) that is also trained on")
    return train.good, evaluation.good, (train, evaluation)


def _rows_by_image(source: Source, config: DataConfig, piece: RowToExample, notes: list[str]) -> _Chosen:
    split = "" if "" in source.splits else _known_split(config.dataset_train_split, source, "dataset_train_split")
    checked = check_rows(source, split, config, piece, None)
    refuse_bad_rows([checked], config)
    rows = checked.good
    wanted = config.num_eval_examples
    tenth = max(1, len(rows) // 10)
    if wanted is not None and wanted > len(rows) // 2:
        notes.append(f"{len(rows):,} rows cannot spare {wanted:,} for evaluation: a tenth ({tenth:,}) is held out")
        wanted = tenth
    names = [row.refs[0].name if row.refs else row.id for row in rows]
    train, evaluation = split_by_image(image_keys(rows, source.tables), names, wanted or tenth, config.seed)
    if not evaluation:
        raise UserError(
            f"{config.dataset_name}: the rows cannot be divided without showing an image on both sides; add images."
        )
    notes.append(f"split by image with seed {config.seed}: {len(train):,} to train, {len(evaluation):,} to evaluate")
    chosen = [rows[index] for index in train][: config.num_train_examples]
    return chosen, [rows[index] for index in evaluation], (checked, CheckedRows(split))


def _short_keys(rows: list[GoodRow], tables: Mapping[str, Any]) -> list[list[str]]:
    """Of each row, what its images are known by whatever they are called: the bootstrap draws equal ones together."""
    keys = image_keys(rows, tables)
    return [
        [hashlib.sha256(key.encode()).hexdigest()[:16] for key in row_keys] if row.refs else []
        for row, row_keys in zip(rows, keys, strict=True)
    ]


def _known_split(name: str, source: Source, flag: str) -> str:
    if name in source.splits:
        return name
    held = ", ".join(f"{split} ({count:,} rows)" for split, count in source.splits.items())
    near = difflib.get_close_matches(name, list(source.splits), n=1)
    guess = f' Did you mean "{near[0]}"?' if near else ""
    raise UserError(
        f'{source.name}: there is no split "{name}"; it has {held}.{guess} Choose with --{flag}'
        " (the same split for training and test is divided by image)."
    )


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
