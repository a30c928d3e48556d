"""Which examples the page shows, and what it says about each: answers, references, scores, and how answers changed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qvl.files import read_jsonl
from qvl.run_folder import SAMPLES_FILE

MAX_GALLERY_EXAMPLES = 500
_MAX_SAMPLES = 6
_MAX_STEPS = 8
_STAGES = ("baseline", "finetuned")


@dataclass(frozen=True)
class ItemScore:
    """The score that says which answers are good.

    Attributes:
        name: its key in the rows of the predictions files.
        label: what the page calls it.
        higher_is_better: which way is better.
    """

    name: str
    label: str
    higher_is_better: bool = True


@dataclass
class GalleryRow:
    """One example with both models' predictions; `scores` has a stage where there is something to score."""

    id: str
    image_name: str | None
    prompt: str
    references: list[str]
    higher_is_better: bool = True
    baseline: str | None = None
    finetuned: str | None = None
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def gain(self) -> float | None:
        """How much better the fine-tuned answer is by `ItemScore`; None without both."""
        if "baseline" in self.scores and "finetuned" in self.scores:
            return self._sign * (self.scores["finetuned"] - self.scores["baseline"])
        return None

    @property
    def sort_value(self) -> float:
        """What the gallery sorts by, more is better: the gain, or the only score there is."""
        return self.gain if self.gain is not None else self._sign * next(iter(self.scores.values()), 0.0)

    @property
    def _sign(self) -> int:
        return 1 if self.higher_is_better else -1


@dataclass(frozen=True)
class Sample:
    """One evaluation prompt that was answered while training, with (step, answer) in the order of the steps."""

    id: str
    prompt: str
    reference: str
    answers: list[tuple[int, str]]


def item_score(run_dir: Path) -> ItemScore | None:
    """The score that the gallery shows and sorts by; None where no prediction has a score of its own.

    ROUGE-L where the run has it, else the first of its scores that single answers have.
    """
    rows = [row for stage in _STAGES for row in _predictions(run_dir, stage)]
    present = {name for row in rows for name in row.get("scores") or {}}
    path = run_dir / "metrics.json"
    known = (json.loads(path.read_text(encoding="utf-8")).get("scores") or {}) if path.is_file() else {}
    ranked = [name for name in ("rouge_l", *known, *sorted(present)) if name in present]
    if not ranked:
        return None
    entry = known.get(ranked[0]) or {}
    return ItemScore(ranked[0], entry.get("label", ranked[0]), entry.get("higher_is_better", True))


def gallery_rows(run_dir: Path, score: ItemScore | None) -> list[GalleryRow]:
    """Every example of the predictions files, in their order."""
    rows: dict[str, GalleryRow] = {}
    for stage in _STAGES:
        for item in _predictions(run_dir, stage):
            new_row = GalleryRow(
                item["id"],
                item.get("image"),
                item.get("prompt") or "",
                item.get("references") or [],
                score is None or score.higher_is_better,
            )
            row = rows.setdefault(item["id"], new_row)
            setattr(row, stage, item["prediction"])
            if score is not None and score.name in (item.get("scores") or {}):
                row.scores[stage] = item["scores"][score.name]
    return list(rows.values())


def most_telling(rows: list[GalleryRow], most: int = MAX_GALLERY_EXAMPLES) -> list[GalleryRow]:
    """At most so many: a quarter each of the largest losses and gains, evenly spaced ones for the rest.

    More than `MAX_GALLERY_EXAMPLES` would leave no bytes for pictures, nor patience for looking at them.
    """
    if len(rows) <= most:
        return rows
    ranked = sorted(range(len(rows)), key=lambda index: rows[index].sort_value)
    quarter = most // 4
    spaced = evenly_spaced(ranked[quarter:-quarter], most - 2 * quarter)
    return [rows[index] for index in sorted([*ranked[:quarter], *ranked[-quarter:], *spaced])]


def training_samples(run_dir: Path) -> list[Sample]:
    """The first examples of `--eval_generations`, with the answers of at most eight evaluations, first and last too."""
    path = run_dir / SAMPLES_FILE
    rows = read_jsonl(path) if path.is_file() else []
    steps = evenly_spaced(sorted({row["step"] for row in rows}), _MAX_STEPS)
    by_id: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["step"] in steps:
            by_id.setdefault(row["id"], []).append(row)
    return [
        Sample(
            example_id,
            answered[0]["prompt"],
            (answered[0]["references"] or [""])[0],
            [(row["step"], row["prediction"]) for row in answered],
        )
        for example_id, answered in list(by_id.items())[:_MAX_SAMPLES]
    ]


def evenly_spaced(values: Sequence[int], number: int) -> list[int]:
    """`number` of the values, the first and the last among them; all where there are no more."""
    if len(values) <= number:
        return list(values)
    return [values[index * (len(values) - 1) // (number - 1)] for index in range(number)]


def _predictions(run_dir: Path, stage: str) -> list[dict[str, Any]]:
    path = run_dir / f"{stage}_predictions.jsonl"
    return read_jsonl(path) if path.exists() else []
