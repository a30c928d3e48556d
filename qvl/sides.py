"""Checked rows on their sides, training or evaluation: as their split is named, or by the images that they show."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from qvl.data_config import DataConfig
from qvl.errors import UserError
from qvl.mixture import apart, table_name
from qvl.rows import RowToExample
from qvl.sources import Source, open_source
from qvl.splits import Undivided, split_by_image
from qvl.validate import CheckedRows, GoodRow, check_rows, image_keys, refuse_bad_rows

KeyedRow = tuple[GoodRow, list[str]]
"""A row and the identities of its images, from one call of `image_keys` for all rows of a run."""


@dataclass(frozen=True)
class CheckedSet:
    """One data set after the first pass.

    Attributes:
        config: its own.
        source: it, opened.
        tables: its hub tables, by the names that its rows' images have for them.
        train: rows of the split to train on; without `evaluation`, the rows to be divided by image.
        evaluation: rows of the split to evaluate on.
    """

    config: DataConfig
    source: Source
    tables: Mapping[str, Any]
    train: CheckedRows
    evaluation: CheckedRows | None

    @property
    def rows(self) -> list[GoodRow]:
        """Of both splits."""
        return [*self.train.good, *(self.evaluation.good if self.evaluation else [])]


@dataclass(frozen=True)
class Sides:
    """The rows of one data set on both sides, and what the user should know of how they came there."""

    train: list[KeyedRow]
    evaluation: list[KeyedRow]
    notes: list[str] = field(default_factory=list)


def check_set(config: DataConfig, piece: RowToExample) -> CheckedSet:
    """Opens a data set and reads the rows that can be used.

    Raises:
        UserError: it cannot be reached, a split does not exist, or rows are wrong.
    """
    source = open_source(config)
    if "" in source.splits or config.dataset_train_split == config.dataset_test_split:
        split = "" if "" in source.splits else _known_split(config.dataset_train_split, source, "dataset_train_split")
        checked = check_rows(source, split, config, piece, None)
        refuse_bad_rows([checked], config)
        return CheckedSet(config, source, source.tables, checked, None)
    train_split = _known_split(config.dataset_train_split, source, "dataset_train_split")
    test_split = _known_split(config.dataset_test_split, source, "dataset_test_split")
    train = check_rows(source, train_split, config, piece, config.num_train_examples)
    evaluation = check_rows(source, test_split, config, piece, config.num_eval_examples)
    refuse_bad_rows([train, evaluation], config)
    return CheckedSet(config, source, source.tables, train, evaluation)


def set_apart(checked: CheckedSet, number: int) -> CheckedSet:
    """A data set of a mixture, whose rows and tables cannot be mistaken for those of another.

    Args:
        checked: as read.
        number: of the set.
    """

    def named(side: CheckedRows) -> CheckedRows:
        return dataclasses.replace(side, good=[apart(row, number, checked.source.name) for row in side.good])

    return dataclasses.replace(
        checked,
        tables={table_name(number, split): table for split, table in checked.tables.items()},
        train=named(checked.train),
        evaluation=named(checked.evaluation) if checked.evaluation else None,
    )


def divide(sets: Sequence[CheckedSet], seed: int) -> list[Sides]:
    """Puts the rows of each data set on their sides: those of named splits as named, the others by image.

    Rows that are divided by image show none that is on the other side, in whichever set; rows of named splits may.

    Args:
        sets: all of a run.
        seed: governs the split by image.

    Raises:
        UserError: a set has no row for one of the sides.
    """
    tables = {name: table for checked in sets for name, table in checked.tables.items()}
    keys = iter(image_keys([row for checked in sets for row in checked.rows], tables))
    read = [(checked, [(row, next(keys)) for row in checked.rows]) for checked in sets]
    as_named = [_as_named(checked, rows) for checked, rows in read]
    fixed = [sides for sides in as_named if sides is not None]
    by_image = iter(_by_image([one for one, sides in zip(read, as_named, strict=True) if sides is None], fixed, seed))
    return [sides or next(by_image) for sides in as_named]


def _as_named(checked: CheckedSet, rows: list[KeyedRow]) -> Sides | None:
    if checked.evaluation is None:
        return None
    num_train = len(checked.train.good)
    return Sides(rows[:num_train], rows[num_train:])


def _by_image(read: Sequence[tuple[CheckedSet, list[KeyedRow]]], fixed: Sequence[Sides], seed: int) -> list[Sides]:
    """The sides of sets that are divided by image, beside those whose sides are fixed by name."""
    trained_on = shown(row for sides in fixed for row in sides.train)
    evaluated_on = shown(row for sides in fixed for row in sides.evaluation)
    wanted = [_num_to_hold_out(len(rows), checked.config.num_eval_examples) for checked, rows in read]
    undivided = [
        Undivided([keys for _, keys in rows], [_name(row) for row, _ in rows], num_evaluation)
        for (_, rows), (num_evaluation, _) in zip(read, wanted, strict=True)
    ]
    divided = split_by_image(undivided, seed, trained_on, evaluated_on)
    found = []
    for (checked, rows), (_, notes), (train, evaluation) in zip(read, wanted, divided, strict=True):
        if not train or not evaluation:
            raise _indivisible(checked.config.dataset_name, is_mixed=len(read) + len(fixed) > 1)
        held_out = [rows[index] for index in evaluation]
        num_following = sum(not evaluated_on.isdisjoint(keys) for _, keys in held_out)
        following = f" ({num_following:,} show what another set evaluates on)" if num_following else ""
        note = f"split by image with seed {seed}: {len(train):,} to train, {len(evaluation):,} to evaluate{following}"
        chosen = [rows[index] for index in train][: checked.config.num_train_examples]
        found.append(Sides(chosen, held_out, [*notes, note]))
    return found


def shown(rows: Iterable[KeyedRow]) -> set[str]:
    """What images (or texts) rows show."""
    return {key for _, keys in rows for key in keys}


def shared_note(evaluation: Sequence[KeyedRow], trained_on: Set[str]) -> list[str]:
    """A warning where rows that are evaluated on show what is trained on; none where they do not.

    Args:
        evaluation: the rows.
        trained_on: what the training rows show.
    """
    num_shared = sum(not trained_on.isdisjoint(keys) for _, keys in evaluation)
    if not num_shared:
        return []
    return [f"WARNING: {num_shared:,} evaluation rows show an image (or text) that is also trained on"]


def _num_to_hold_out(num_rows: int, wanted: int | None) -> tuple[int, list[str]]:
    tenth = max(1, num_rows // 10)
    if wanted is not None and wanted > num_rows // 2:
        return tenth, [f"{num_rows:,} rows cannot spare {wanted:,} for evaluation: a tenth ({tenth:,}) is held out"]
    return wanted or tenth, []


def _name(row: GoodRow) -> str:
    return row.refs[0].name if row.refs else row.id


def _indivisible(name: str, is_mixed: bool) -> UserError:
    both, other_remedy = ("both sides", "")
    if is_mixed:
        both, other_remedy = "both sides of the mixture", ", or give the images the same named splits in all its sets"
    return UserError(
        f"{name}: the rows cannot be divided without showing an image on {both}; add images{other_remedy}."
    )


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
