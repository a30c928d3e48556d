"""What was loaded, in numbers: for the screen, the run record and the report."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from qvl.validate import NUM_ERRORS_SHOWN, CheckedRows, GoodRow

Size = tuple[int, int]


@dataclass(frozen=True)
class SplitSummary:
    """One side of the data.

    Attributes:
        name: "train" or "evaluation".
        num_examples: rows used.
        num_images: images in them, the same one counted as often as it is used.
        smallest, median, largest: (width, height) in pixels of the images with the fewest, median, most pixels.
        skipped: an error for each bad row that was gone past.
        num_left_out: rows the recipe's own piece left out.
        fingerprint: SHA-256 over texts and image identities (name, bytes, size) of the rows used.
    """

    name: str
    num_examples: int
    num_images: int
    smallest: Size | None
    median: Size | None
    largest: Size | None
    skipped: tuple[str, ...]
    num_left_out: int
    fingerprint: str


@dataclass(frozen=True)
class DataSummary:
    """Both sides, and where they came from.

    Attributes:
        dataset_name: as given.
        revision: the hub commit; None for local data.
        train: the training side.
        evaluation: the evaluation side.
        notes: what the user should know, such as fewer rows than asked for.
        parts: the same of each data set of a mixture; empty for one data set.
    """

    dataset_name: str
    revision: str | None
    train: SplitSummary
    evaluation: SplitSummary
    notes: tuple[str, ...]
    parts: tuple["DataSummary", ...] = ()

    @property
    def fingerprint(self) -> str:
        """SHA-256 over both sides' fingerprints."""
        return hashlib.sha256(f"{self.train.fingerprint} {self.evaluation.fingerprint}".encode()).hexdigest()

    @property
    def num_skipped(self) -> int:
        """Bad rows that were gone past, each counted once."""
        return len({*self.train.skipped, *self.evaluation.skipped})

    def source(self) -> str:
        """Name, revision and fingerprint in a few words."""
        revision = f" at {self.revision}" if self.revision else ""
        return f"{self.dataset_name}{revision}, fingerprint {self.fingerprint[:16]}"

    def lines(self) -> list[str]:
        """Lines for the screen."""
        lines = [f"data {self.source()}"]
        for split in (self.train, self.evaluation):
            lines.append(f"  {split.name}: {split.num_examples:,} examples, {split.num_images:,} images{_sizes(split)}")
            if split.num_left_out:
                lines.append(f"    {split.num_left_out:,} rows left out by the recipe")
        for part in self.parts:
            counts = f"{part.train.num_examples:,} to train, {part.evaluation.num_examples:,} to evaluate"
            lines.append(f"  of {part.source()}: {counts}")
        lines += [f"  {note}" for note in self.notes]
        skipped = list(dict.fromkeys([*self.train.skipped, *self.evaluation.skipped]))
        if skipped:
            lines.append(f"  {len(skipped):,} bad rows skipped:")
            lines += [f"    {error}" for error in skipped[:NUM_ERRORS_SHOWN]]
            if len(skipped) > NUM_ERRORS_SHOWN:
                lines.append(f"    ... and {len(skipped) - NUM_ERRORS_SHOWN:,} more")
        return lines


def _sizes(split: SplitSummary) -> str:
    if not (split.smallest and split.median and split.largest):
        return ""
    words = [
        f"{name} {w}x{h}"
        for name, (w, h) in (("smallest", split.smallest), ("median", split.median), ("largest", split.largest))
    ]
    return f" ({', '.join(words)})"


def summarize_split(name: str, rows: Sequence[GoodRow], checked: CheckedRows) -> SplitSummary:
    """Counts one side.

    Args:
        name: "train" or "evaluation".
        rows: the rows used.
        checked: the pass they come from, for what was skipped.
    """
    sizes = sorted(((h.width, h.height) for row in rows for h in row.headers), key=lambda size: size[0] * size[1])
    return SplitSummary(
        name=name,
        num_examples=len(rows),
        num_images=len(sizes),
        smallest=sizes[0] if sizes else None,
        median=sizes[(len(sizes) - 1) // 2] if sizes else None,
        largest=sizes[-1] if sizes else None,
        skipped=tuple(checked.errors),
        num_left_out=checked.num_left_out,
        fingerprint=_fingerprint(rows),
    )


def _fingerprint(rows: Sequence[GoodRow]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        record = row.record
        images = [
            (ref.name, header.num_bytes, header.width, header.height)
            for ref, header in zip(row.refs, row.headers, strict=True)
        ]
        texts = [record.prompt, record.completions, record.messages, record.references, record.tools]
        digest.update(json.dumps([texts, images]).encode())
    return digest.hexdigest()
