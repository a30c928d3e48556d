"""Training and evaluation rows that never share an image."""

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence


def split_by_image(
    keys: Sequence[Sequence[Hashable]], names: Sequence[str], num_evaluation: int, seed: int
) -> tuple[list[int], list[int]]:
    """Divides rows so that no key (the identity of an image) is on both sides.

    Which rows are held out depends on the seed and the rows' names only, so that rows added later move few others.

    Args:
        keys: for each row the identities of its images (or of its text, if it has none).
        names: for each row a name that does not change from machine to machine.
        num_evaluation: rows wanted on the evaluation side; at most this many come back there.
        seed: another seed, another split.

    Returns:
        Indices of the training rows and of the evaluation rows, each ascending. A group of rows that share images
        and is too large for the evaluation side goes to training whole.
    """
    groups = _connected(keys)
    order = sorted(groups, key=lambda rows: _rank(names[rows[0]], seed))
    evaluation: list[int] = []
    for rows in order:
        if len(evaluation) + len(rows) <= num_evaluation and len(evaluation) + len(rows) < len(keys):
            evaluation += rows
    held_out = set(evaluation)
    return [row for row in range(len(keys)) if row not in held_out], sorted(evaluation)


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
