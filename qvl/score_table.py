"""The scores of both models side by side, as rows for the page and as the text printed at the end of a run."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qvl.metrics import FIRST_REFERENCE

NO_SCORES = "No scores yet: neither the stage baseline nor evaluate has run."
_STAGES = ("baseline", "finetuned")
_HEADER = ("", "baseline", "fine-tuned", "difference", "relative", "p")
_LEAST_WIDTHS = (23, 18, 18, 20, 16, 7)


def comparison_table(metrics: Mapping[str, Any]) -> str:
    """Lays metrics.json out as the text table printed at the end of a run.

    Args:
        metrics: the content of metrics.json; a stage may be missing or None.

    Returns:
        Two lines a score under a header, the numbers and below them what they say with their 95% intervals, without a
        final newline. Scores against the first reference only are left to the page.
    """
    rows = [row for row in score_rows(metrics) if not row["is_first_reference"]]
    if not rows:
        return NO_SCORES
    lines = [_HEADER]
    for row in rows:
        lines.append(tuple(row[key] for key in ("name", *_STAGES, "difference", "relative", "p_value")))
        intervals = [row[f"{key}_interval"] for key in (*_STAGES, "difference", "relative")]
        if any(intervals):
            lines.append((f"  {row['verdict']}", *intervals, ""))
    text = _aligned(lines)
    counts = sorted({stage["num_examples"] for stage in _stages(metrics) if "num_examples" in stage})
    if counts:
        text.append(f"on {' and '.join(f'{count:,}' for count in counts)} examples, with 95% intervals")
    return "\n".join(text)


def score_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The score table's rows, formatted.

    Returns:
        For each score, in the order of the run's: `key`, `name`, `is_first_reference`, the texts `baseline`,
        `finetuned`, `difference` ("-" where unknown), `relative`, `p_value`, `verdict` and, for the first four of
        them, `..._interval` ("" where unknown).
    """
    known = metrics.get("scores") or {}
    stages = dict(zip(_STAGES, _stages(metrics), strict=True))
    present = [key for stage in stages.values() for key in stage if key not in ("num_examples", "interval")]
    rows = []
    for key in dict.fromkeys([*(key for key in known if key in present), *present]):
        values = {name: finite(stage.get(key)) for name, stage in stages.items()}
        if all(value is None for value in values.values()):
            continue
        row = {
            "key": key,
            "name": (known.get(key) or {}).get("label", key),
            "is_first_reference": key.endswith(FIRST_REFERENCE),
        }
        for name, stage in stages.items():
            ends = (stage.get("interval") or {}).get(key)
            row |= {name: _number(values[name]), f"{name}_interval": _range(ends, _number)}
        both_known = None not in values.values()
        rows.append({**row, **_change(((metrics.get("difference") or {}).get(key) or {}) if both_known else {})})
    return rows


def finite(value: Any) -> float | None:
    """The value if it is a number to show, else None (missing, NaN, infinite)."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def _change(difference: Mapping[str, Any]) -> dict[str, str]:
    """What metrics.json says of the difference of one score."""
    mean, p_value = finite(difference.get("mean")), finite(difference.get("p_value"))
    relative = difference.get("relative") or {}
    percent = finite(relative.get("mean"))
    return {
        # Adding zero turns a negative zero into a plain one.
        "difference": "-" if mean is None else _number(round(mean, 4) + 0.0, "+"),
        "difference_interval": _range(difference, lambda value: _number(value, "+")),
        "relative": "" if percent is None else f"{percent:+.0%}",
        "relative_interval": _range(relative, "{:+.0%}".format),
        "p_value": "" if p_value is None else f"{p_value:.3f}",
        "verdict": difference.get("verdict") or "",
    }


def _stages(metrics: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [metrics.get(stage) or {} for stage in _STAGES]


def _aligned(lines: Sequence[tuple[str, ...]]) -> list[str]:
    """Names on the left, numbers on the right; a long number makes its column wider."""
    widths = [
        max(least, *(len(cell) + 2 for cell in column))
        for least, column in zip(_LEAST_WIDTHS, zip(*lines, strict=True), strict=True)
    ]
    texts = []
    for name, *cells in lines:
        numbers = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        texts.append(f"{name:<{widths[0]}}{numbers}".rstrip())
    return texts


def _range(ends: Mapping[str, Any] | None, number: Callable[[float], str]) -> str:
    low, high = (finite((ends or {}).get(end)) for end in ("low", "high"))
    return "" if low is None or high is None else f"{number(low)} to {number(high)}"


def _number(value: float | None, sign: str = "") -> str:
    """Four places; fewer from 10 on, where perplexities lie."""
    if value is None:
        return "-"
    places = 4 if abs(value) < 10 else 2 if abs(value) < 1000 else 1
    return f"{value:{sign}.{places}f}"
