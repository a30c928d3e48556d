"""The numbers of `two_gpus.py` from the run folders that its cases have left: speed, peaks, losses, answers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvl.files import read_jsonl

CAPTIONS_PER_IMAGE = 5
# Trained alike, for their speed: with layers compiled but for one_plain.
TIMED = ("one", "one_plain", "ddp", "fsdp2", "zero3")
_REFERENCES = ("one", "one_plain")
_RESUMED = "_resumed"
# The first steps compile.
_NUM_FIRST_STEPS = 4


@dataclass(frozen=True)
class Shape:
    """Of the timed trainings.

    Attributes:
        batch: images a GPU and step; one GPU takes two such batches, so that all train on the same rows a step.
        num_steps: optimizer steps.
    """

    batch: int
    num_steps: int

    @property
    def saved_at(self) -> int:
        """The step whose checkpoint is resumed from."""
        return max(1, self.num_steps * 3 // 4)

    @property
    def captions_per_step(self) -> int:
        """Of both GPUs."""
        return 2 * self.batch * CAPTIONS_PER_IMAGE

    @property
    def steady_steps(self) -> list[int]:
        """Steps that are timed: not the first ones, nor the one that waits for a checkpoint to be written."""
        first = min(_NUM_FIRST_STEPS, self.num_steps // 3) + 1
        return [step for step in range(first, self.num_steps + 1) if step != self.saved_at + 1]


def summarize(runs: Path, shape: Shape) -> dict[str, Any]:
    """Everything that can be told from the run folders in `runs`, which are named after their cases."""
    trained = {folder.name: rows for folder in sorted(runs.glob("*/")) if (rows := _training_rows(folder))}
    found = {name: _of_training(runs / name, rows, shape) for name, rows in trained.items()}
    rates = {
        name: found[name]["captions_per_second"] for name in TIMED if found.get(name, {}).get("captions_per_second")
    }
    return {
        "batch": shape.batch,
        "num_steps": shape.num_steps,
        "steady_steps": shape.steady_steps,
        "captions_per_second": rates,
        "ratios": {
            f"{name}/{reference}": rate / rates[reference]
            for reference in _REFERENCES
            for name, rate in rates.items()
            if reference in rates and name != reference
        },
        "loss_apart": {
            f"{name} from {reference}": _apart(trained[name], trained[reference])
            for reference in _REFERENCES
            for name in TIMED
            if {name, reference} <= trained.keys() and name != reference
        },
        "resumed_loss_apart": {
            name: _apart(rows, trained[name.removesuffix(_RESUMED)], shape.saved_at + 1)
            for name, rows in trained.items()
            if name.endswith(_RESUMED) and name.removesuffix(_RESUMED) in trained
        },
        "answers": _answers(runs),
        "runs": found,
    }


def _training_rows(folder: Path) -> dict[int, dict[str, Any]]:
    """What the trainer has logged, by step."""
    path = folder / "training_log.jsonl"
    rows = read_jsonl(path) if path.is_file() else []
    return {row["step"]: row for row in rows if "loss" in row}


def _json(path: Path, default: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else default


def _of_training(folder: Path, rows: Mapping[int, dict[str, Any]], shape: Shape) -> dict[str, Any]:
    """Speed of a timed run, and of any run its peak, its losses and the checks that it failed."""
    result: dict[str, Any] = {
        "peak_gib": (_json(folder / "metrics.json", {}).get("train") or {}).get("peak_gib"),
        "losses": {step: row["loss"] for step, row in rows.items()},
        "checks_failed": [check["name"] for check in _json(folder / "checks.json", []) if not check["passed"]],
    }
    if folder.name in TIMED:
        steady = [rows[step] for step in shape.steady_steps if step in rows]
        result |= {
            # Steps of as many captions each: their seconds add up, their rates do not.
            "captions_per_second": len(steady) / sum(1 / row["samples_per_second"] for row in steady)
            if steady
            else None,
            "num_steady_steps": len(steady),
            "first_step_seconds": shape.captions_per_step / rows[1]["samples_per_second"] if 1 in rows else None,
            "data_wait_share": max((row["data_wait_share"] for row in steady), default=None),
            "num_compilations_while_steady": sum(row.get("num_compilations", 0) for row in steady),
        }
    return result


def _apart(ours: Mapping[int, dict[str, Any]], theirs: Mapping[int, dict[str, Any]], first: int = 1) -> dict[str, Any]:
    """How far two trainings' losses are apart from step `first` on, as a share of the second one's."""
    steps = sorted(step for step in ours.keys() & theirs.keys() if step >= first)
    by_step = {step: abs(ours[step]["loss"] - theirs[step]["loss"]) / abs(theirs[step]["loss"]) for step in steps}
    apart: dict[str, Any] = {"most": max(by_step.values(), default=None), "by_step": by_step}
    apart["same_tokens"] = all(ours[step].get("num_tokens") == theirs[step].get("num_tokens") for step in steps)
    return apart


def _answers(runs: Path) -> dict[str, Any]:
    """One GPU's answers and their losses beside those of two, for base and adapter."""
    found = {}
    for part in ("baseline", "finetuned"):
        paths = [runs / name / f"{part}_predictions.jsonl" for name in ("eval_one", "eval_two")]
        if not all(path.is_file() for path in paths):
            continue
        one, two = map(read_jsonl, paths)
        pairs = list(zip(one, two, strict=True))
        found[part] = {
            "num_prompts": len(pairs),
            "num_same": sum(a["id"] == b["id"] and a["prediction"] == b["prediction"] for a, b in pairs),
            "num_different_answers": len({row["prediction"] for row in one}),
            "loss_apart": max(abs(a["answer_loss"] - b["answer_loss"]) / abs(a["answer_loss"]) for a, b in pairs),
            "seconds": [_seconds_of_answering(path.parent, part) for path in paths],
        }
    return found


def _seconds_of_answering(folder: Path, part: str) -> float | None:
    return _json(folder / "metrics.json", {}).get("cost", {}).get(part, {}).get("seconds")


def table(summary: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The summary as a Markdown table with a row for each case in `records`."""
    head = ("case", "ended", "s", "captions/s", "x one GPU", "peak GiB", "first step, s", "loss apart", "note")
    lines = [_row(head), "|" + "---|" * len(head)]
    for name, record in records.items():
        run = summary["runs"].get(name, {})
        apart = summary["loss_apart"].get(f"{name} from one") or summary["resumed_loss_apart"].get(name) or {}
        cells = (
            name,
            record["status"],
            f"{record.get('seconds', 0):.0f}",
            _number(run.get("captions_per_second"), ".4g"),
            _number(summary["ratios"].get(f"{name}/one"), ".2f"),
            _number(run.get("peak_gib"), ".1f"),
            _number(run.get("first_step_seconds"), ".1f"),
            _number(apart.get("most"), ".2%"),
            _note(name, run, summary),
        )
        lines.append(_row(cells))
    return lines


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _note(name: str, run: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """What no column has: a base's and an adapter's answers, the losses of what is not timed, failed checks."""
    notes = []
    if name == "eval_two":
        for part, found in summary["answers"].items():
            seconds = " and ".join(_number(value, ".1f") for value in found["seconds"])
            same = f"{found['num_same']} of {found['num_prompts']} answers the same"
            notes.append(f"{part}: {same}, losses {found['loss_apart']:.2g} apart, {seconds} s")
    elif run and name not in TIMED:
        losses = list(run["losses"].values())
        notes.append(f"loss {losses[0]:.4g} to {losses[-1]:.4g}")
    if run.get("checks_failed"):
        notes.append(f"checks failed: {', '.join(run['checks_failed'])}")
    return "; ".join(notes)
