"""Several data sets as one, by weight: TRL's `datasets:` list, its keys and its arithmetic."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from qvl.data_config import MixedSet
from qvl.errors import UserError
from qvl.image_refs import TableImage
from qvl.validate import GoodRow

_REFUSED_KEYS = {
    "data_dir": "name the folder as `path`",
    "data_files": "name the file as `path`, one entry a file",
    "columns": "rows are read by their keys, other columns are passed over",
}


def read_mixture(entries: Sequence[Any]) -> tuple[MixedSet, ...]:
    """Checks a `datasets:` list.

    Raises:
        UserError: an entry without a path, a key that is unknown or refused, fractions that are not positive or not in
            all entries.
    """
    sets = tuple(_read_entry(entry, number) for number, entry in enumerate(entries, start=1))
    fractions = [mixed.fraction for mixed in sets]
    if None in fractions and any(fraction is not None for fraction in fractions):
        missing = fractions.index(None) + 1
        raise UserError(f"datasets: entry {missing} has no `fraction`, others have: set it in all of them or in none.")
    return sets


def _read_entry(entry: Any, number: int) -> MixedSet:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
        raise UserError(f"datasets: entry {number} needs a `path` (hub id, folder or file), found {entry!r}.")
    known = [item.name for item in dataclasses.fields(MixedSet)]
    for key, value in entry.items():
        if key in _REFUSED_KEYS and value is not None:
            raise UserError(f"datasets: entry {number}, `{key}` is refused: {_REFUSED_KEYS[key]}.")
        if key not in known and key not in _REFUSED_KEYS:
            raise UserError(f"datasets: entry {number} has the unknown key `{key}`: known are {', '.join(known)}.")
    fraction = entry.get("fraction")
    if fraction is not None and (isinstance(fraction, bool) or not isinstance(fraction, int | float) or fraction <= 0):
        raise UserError(f"datasets: entry {number}, `fraction: {fraction}` has to be a number above 0.")
    for key in ("name", "split"):
        if not isinstance(entry.get(key), str | None):
            raise UserError(f"datasets: entry {number}, `{key}: {entry[key]}` has to be text.")
    return MixedSet(**{key: entry.get(key) for key in known})  # type: ignore[arg-type]


def mixture_counts(sizes: Sequence[int], fractions: Sequence[float | None], limit: int | None) -> list[int]:
    """How many of its first rows each set gives.

    As TRL does it: the largest mixture of the wanted shares in which no row is used twice. Without fractions every
    row is used; a limit then takes from each set in proportion to its size.

    Args:
        sizes: rows of each set.
        fractions: wanted shares, relative to each other; None in all for the sizes themselves.
        limit: the mixture has at most about this many rows (each share is rounded); None for no limit.
    """
    weights = [size if fraction is None else fraction for size, fraction in zip(sizes, fractions, strict=True)]
    whole = sum(weights)
    total = min(size * whole / weight if weight else 0.0 for size, weight in zip(sizes, weights, strict=True))
    if limit is not None:
        total = min(total, limit)
    return [min(size, round(weight / whole * total)) for size, weight in zip(sizes, weights, strict=True)]


def num_rows_to_read(fraction: float | None, fractions: Sequence[float | None], limit: int | None) -> int | None:
    """The most rows of one set that a mixture of at most `limit` rows can use; None where only its size tells."""
    if limit is None or fraction is None:
        return None
    return max(1, round(fraction / sum(share or 0.0 for share in fractions) * limit))


def apart(row: GoodRow, number: int, path: str) -> GoodRow:
    """A row of a mixture, whose place and tables cannot be mistaken for those of another set.

    Args:
        row: as read.
        number: of its set.
        path: of its set.
    """
    refs = [
        dataclasses.replace(ref, split=table_name(number, ref.split)) if isinstance(ref, TableImage) else ref
        for ref in row.refs
    ]
    where = row.where if row.where.startswith(path) else f"{path} ({row.where})"
    return dataclasses.replace(row, refs=refs, where=where)


def table_name(number: int, split: str) -> str:
    """The key of a hub table in a mixture: two sets may both have a split `train`."""
    return f"{number} {split}"
