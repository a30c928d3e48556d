"""Training and evaluation rows that never share an image."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Undivided:
    """A data set whose rows have no side yet.

    Attributes:
        keys: for each row the identities of its images (or of its text, if it has none).
        names: for each row a name that does not change from machine to machine.
        num_evaluation: rows wanted on the evaluation side.
    """

    keys: Sequence[Sequence[Hashable]]
    names: Sequence[str]
    num_evaluation: int


def split_by_image(
    sets: Sequence[Undivided],
    seed: int,
    trained_on: Collection[Hashable] = frozenset(),
    evaluated_on: Collection[Hashable] = frozenset(),
) -> list[tuple[list[int], list[int]]]:
    """Divides the rows of data sets so that no key (the identity of an image) is on both sides, of whichever set.

    Which rows are held out depends on the seed and the rows' names only, so that rows added later move few others. A
    set that shares no image with the others is divided as it would be alone.

    Args:
        sets: whose rows are divided.
        seed: another seed, another split.
        trained_on: keys that are trained on already; rows that show one are trained on too.
        evaluated_on: keys that are evaluated on already; rows that show one, and none of the others, are held out.

    Returns:
        For each set the indices of the training rows and of the evaluation rows, each ascending. At most the rows
        wanted come back on the evaluation side, but for those that are held out with another set's. A group of rows
        that share images and is too large for the evaluation side goes to training whole.
    """
    keys = [row_keys for undivided in sets for row_keys in undivided.keys]
    names = [name for undivided in sets for name in undivided.names]
    following: list[list[int]] = []
    free: list[list[int]] = []
    for rows in sorted(_connected(keys), key=lambda rows: _rank(names[rows[0]], seed)):
        shown = {key for row in rows for key in keys[row]}
        if shown.isdisjoint(trained_on):
            (free if shown.isdisjoint(evaluated_on) else following).append(rows)
    held_out = _held_out(sets, following, free)
    starts = accumulate((len(undivided.keys) for undivided in sets), initial=0)
    sides = []
    for start, undivided in zip(starts, sets, strict=False):
        is_held_out = [start + index in held_out for index in range(len(undivided.keys))]
        sides.append(
            (
                [index for index, held in enumerate(is_held_out) if not held],
                [index for index, held in enumerate(is_held_out) if held],
            )
        )
    return sides


def _held_out(sets: Sequence[Undivided], following: Sequence[list[int]], free: Sequence[list[int]]) -> set[int]:
    """All rows that follow, and as many of the free groups as the sets want; rows are counted through all sets."""
    owners = [number for number, undivided in enumerate(sets) for _ in undivided.keys]
    held_out = {row for rows in following for row in rows}
    num_held_out = Counter(owners[row] for row in held_out)
    # First what no set has too much with. An image may have five rows here and one there, so that one set is full long
    # before the other: what that one still needs comes second, whatever it costs the first.
    for has_room in (all, any):
        for rows in free:
            added = Counter(owners[row] for row in rows)
            after = {owner: num_held_out[owner] + count for owner, count in added.items()}
            if (
                rows[0] not in held_out
                and has_room(count <= sets[owner].num_evaluation for owner, count in after.items())
                and all(count < len(sets[owner].keys) for owner, count in after.items())
            ):
                held_out.update(rows)
                num_held_out += added
    return held_out


def _rank(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def _connected(keys: Sequence[Sequence[Hashable]]) -> list[list[int]]:
    """Groups of rows that share a key, directly or through others; rows ascending in each."""
    parent = list(range(len(keys)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first_row: dict[Hashable, int] = {}
    for row, row_keys in enumerate(keys):
        for key in row_keys:
            parent[root(row)] = root(first_row.setdefault(key, row))
    groups: Mapping[int, list[int]] = defaultdict(list)
    for row in range(len(keys)):
        groups[root(row)].append(row)
    return list(groups.values())
