"""The scores of both models side by side, as rows for the page and as the text printed at the end of a run."""

import math
from collections.abc import Mapping
from typing import Any

from qvl.metrics import is_clear

_SCORE_NAMES = {"bleu4": "BLEU-4", "rouge_l": "ROUGE-L", "cider": "CIDEr"}
_LEAST_RELATIVE_BASE = 1e-3


def comparison_table(metrics: Mapping[str, Any]) -> str:
    """Lays metrics.json out as the text table printed at the end of a run.

    Args:
        metrics: the content of metrics.json; a stage may be missing or None.

    Returns:
        Lines such as "BLEU-4      0.1009      0.1294  +0.0285 (+28%)" under a header, without a final newline.
    """
    rows = score_rows(metrics)
    if not rows:
        return "No scores yet: neither the stage baseline nor evaluate has run."
    lines = [f"{'':<12}{'baseline':>10}{'fine-tuned':>12}  difference"]
    for row in rows:
        change = f"{row['difference']} {row['relative']}".rstrip()
        notes = [f"95% interval {row['interval']}" if row["interval"] else "", row["verdict"]]
        numbers = f"{row['name']:<12}{row['baseline']:>10}{row['finetuned']:>12}  {change:<16}"
        lines.append("  ".join([numbers, *filter(None, notes)]).rstrip())
    stages = [metrics.get(stage) or {} for stage in ("baseline", "finetuned")]
    counts = sorted({stage["num_examples"] for stage in stages if "num_examples" in stage})
    if counts:
        lines.append(f"on {' and '.join(f'{count:,}' for count in counts)} examples")
    return "\n".join(lines)


def score_rows(metrics: Mapping[str, Any]) -> list[dict[str, str]]:
    """The score table's rows, formatted: name, baseline, finetuned, difference, relative, interval, verdict.

    What is unknown is "-" in the first four, "" in the others. BLEU-4, ROUGE-L and CIDEr come first, then any other
    score that the run has.
    """
    baseline, finetuned = metrics.get("baseline") or {}, metrics.get("finetuned") or {}
    others = [key for key in {**baseline, **finetuned} if key not in _SCORE_NAMES and key != "num_examples"]
    rows = []
    for key in [*_SCORE_NAMES, *others]:
        before, after = finite(baseline.get(key)), finite(finetuned.get(key))
        if before is None and after is None:
            continue
        row = {"name": _SCORE_NAMES.get(key, key), "baseline": _number(before), "finetuned": _number(after)}
        interval = (metrics.get("difference") or {}).get(key) or {}
        rows.append({**row, **_change(before, after, finite(interval.get("low")), finite(interval.get("high")))})
    return rows


def _change(before: float | None, after: float | None, low: float | None, high: float | None) -> dict[str, str]:
    change = {"difference": "-", "relative": "", "interval": "", "verdict": ""}
    if before is None or after is None:
        return change
    # Adding zero turns a negative zero into a plain one.
    change["difference"] = f"{round(after - before, 4) + 0.0:+.4f}"
    # Against a score of practically nothing a percentage says nothing either.
    if before >= _LEAST_RELATIVE_BASE:
        change["relative"] = f"({(after - before) / before:+.0%})"
    if low is not None and high is not None:
        change["interval"] = f"{low:+.4f} to {high:+.4f}"
        is_noise = not is_clear({"mean": after - before, "low": low, "high": high})
        change["verdict"] = "no clear difference" if is_noise else ""
    return change


def finite(value: Any) -> float | None:
    """The value if it is a number to show, else None (missing, NaN, infinite)."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
