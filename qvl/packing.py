"""Rows packed: several samples behind each other in one row, filled up to a length, none of them cut."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the longest first, each into the fullest row that has room for it, else into a new one.

    Needs at most 11/9 of the fewest rows possible, and one more (Johnson 1973). Example, a capacity of 10 tokens::

        lengths   6 3 7 4 2
        rows      [7 3] [6 4] [2]      as numbers: [1, 2] [0, 3] [4]

    Args:
        lengths: tokens of each sample.
        capacity: tokens of a row; a longer sample gets a row of its own.

    Returns:
        Numbers of the samples of each row, ascending; rows in the order of their first sample.
    """
    rows: list[list[int]] = []
    # Room that is left and the row's number, sorted: the first that suffices is the fullest.
    room: list[tuple[int, int]] = []
    for number in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect.bisect_left(room, (lengths[number], 0))
        if place == len(room):
            left, row = capacity, len(rows)
            rows.append([])
        else:
            left, row = room.pop(place)
        rows[row].append(number)
        bisect.insort(room, (left - lengths[number], row))
    return sorted(sorted(row) for row in rows)


@dataclass(frozen=True)
class PackTransform:
    """Turns a packed row into its examples on access; goes to worker processes with the data set.

    Attributes:
        rows: the samples, with their own transform.
    """

    rows: datasets.Dataset

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Column `members` (numbers of samples) -> column `pack` (their examples)."""
        if "members" not in batch:
            return batch  # somebody asked for one column only
        return {"pack": [[self.rows[number] for number in members] for members in batch["members"]]}


def packed_rows(rows: datasets.Dataset, capacity: int) -> datasets.Dataset:
    """The same samples in as few rows as best-fit decreasing finds; each is in exactly one of them.

    Args:
        rows: samples with a column `length` in tokens.
        capacity: tokens of a row.

    Returns:
        Rows that show `pack`, a list of examples, and store `members` and their `length` together.
    """
    lengths = rows.with_format(None)["length"]
    members = best_fit(lengths, capacity)
    totals = [sum(lengths[number] for number in row) for row in members]
    packed = datasets.Dataset.from_dict({"members": members, "length": totals})
    return packed.with_transform(PackTransform(rows))
