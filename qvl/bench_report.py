"""What the comparison leaves: numbers of each case over its blocks, a table, bench.json and bench.png."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qvl.files import write_json_atomically

MEASURED, NOT_RUN, OUT_OF_MEMORY, FAILED = "measured", "not run", "out of memory", "failed"
_MEDIANS = ("captions_per_second", "tokens_per_second", "ms_per_step", "matmul_peak_share", "data_wait_share")
# The report page's colours of the two models: what there was before, and what is new.
_TRL_COLOUR, _QVL_COLOUR, _INK, _MUTED, _GRID = "#8794a0", "#0f766e", "#1c2227", "#5d6770", "#e0e2de"

Results = dict[str, Any]


def write_results(folder: Path, results: Results) -> None:
    """Writes bench.json as it stands, with the summaries of what is measured so far."""
    for case in results["cases"]:
        case["summary"] = summarize(case["rounds"])
    first = next((case["summary"] for case in results["cases"] if case["is_trl"] and case["summary"]), None)
    for case in results["cases"]:
        if case["summary"] and first:
            ratio = case["summary"]["captions_per_second"]["median"] / first["captions_per_second"]["median"]
            case["summary"]["times_trl"] = ratio
    write_json_atomically(folder / "bench.json", results)


def summarize(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Median, least and most over the blocks of all rounds; None where no block is finished."""
    blocks = [block for one in rounds for block in one["blocks"]]
    if not blocks:
        return None
    return {
        "num_blocks": len(blocks),
        **{name: _spread([block[name] for block in blocks]) for name in _MEDIANS},
        "num_recompiles": sum(block["num_recompiles"] for block in blocks),
        "peak_gib": _most(rounds, "peak_gib"),
        "build_peak_gib": _most(rounds, "build_peak_gib"),
        "leaked_gib": _most(rounds, "leaked_gib"),
        # Of the first round: later ones find compiled code in caches.
        "build_seconds": rounds[0]["build_seconds"],
        "first_step_seconds": rounds[0]["first_step_seconds"],
        "warmup_seconds": rounds[0]["warmup_seconds"],
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def _most(rounds: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return max((one[name] for one in rounds if one[name] is not None), default=None)


def table(results: Results) -> str:
    """The comparison as text, a line for each case."""
    header = ["", "captions/s", "", "x TRL", "tokens/s", "ms/step", "peak GiB", "of peak", "waits", "recompiles"]
    rows = [[*header, "first step", "warm-up"], *(_row(case) for case in results["cases"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column in (0, 2) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    peak = results["matmul_peak"]
    notes = [
        f"Median of the blocks, least and most in brackets; {peak['dtype']} matmul peak {peak['tflops']:.4g} TFLOP/s.",
        f"On {results['device']}, {results['model']}"
        + (", RANDOM WEIGHTS: speed and memory are real, losses are not." if results["random_weights"] else "."),
        *(["Without a GPU, peak GiB is the most that the process ever held."] if results["device"] == "cpu" else []),
        *[f"{case['name']}: {note}" for case in results["cases"] for note in _notes(case)],
    ]
    return "\n".join([*lines, "", *notes])


def _row(case: Mapping[str, Any]) -> list[str]:
    summary = case["summary"]
    if summary is None:
        return [case["name"], case["status"], *[""] * 10]
    speed = summary["captions_per_second"]
    peak = summary["peak_gib"]
    return [
        case["name"],
        _short(speed["median"]),
        f"({_short(speed['least'])}-{_short(speed['most'])})",
        f"{summary['times_trl']:.2f}" if "times_trl" in summary else "",
        f"{summary['tokens_per_second']['median']:,.0f}",
        f"{summary['ms_per_step']['median']:.0f}",
        f"{peak:.1f}" if peak is not None else "",
        f"{summary['matmul_peak_share']['median']:.1%}",
        f"{summary['data_wait_share']['median']:.1%}",
        str(summary["num_recompiles"]),
        f"{summary['first_step_seconds']:.1f} s",
        f"{summary['warmup_seconds']:.1f} s",
    ]


def _notes(case: Mapping[str, Any]) -> list[str]:
    """What a reader has to know beyond the row's numbers."""
    notes = []
    if case.get("batch_sizes_tried"):
        tried = ", ".join(f"{size}: {_tried(speed)}" for size, speed in case["batch_sizes_tried"].items())
        notes.append(f"batch {case['batch_size']} of those tried, captions/s: {tried}")
    if case["message"]:
        notes.append(f"{case['status']}: {case['message']}")
    elif case["status"] != MEASURED and case["summary"]:
        notes.append(f"{case['status']} after {case['summary']['num_blocks']} blocks")
    summary = case["summary"]
    if summary and (summary["leaked_gib"] or 0) > 0:
        notes.append(f"{summary['leaked_gib']:.2f} GiB did not come back, so later peaks are too high by that")
    if summary and summary["build_peak_gib"] > summary["peak_gib"]:
        notes.append(f"needed {summary['build_peak_gib']:.1f} GiB while it was built, more than in training")
    return notes


def _tried(speed: float | str) -> str:
    return speed if isinstance(speed, str) else _short(speed)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def draw(path: Path, results: Results) -> None:
    """Draws bars of captions a second with the spread of the blocks, and peak GiB behind each."""
    # Takes seconds to import, and a bench that was stopped early has no use for it.
    from matplotlib.figure import Figure

    cases = results["cases"]
    figure = Figure(figsize=(9, 1.2 + 0.55 * len(cases)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for place, case in enumerate(cases):
        summary = case["summary"]
        if summary is None:
            axes.text(0, place, f" {case['status']}", va="center", color=_MUTED)
            continue
        speed = summary["captions_per_second"]
        median = speed["median"]
        spread = [[median - speed["least"]], [speed["most"] - median]]
        colour = _TRL_COLOUR if case["is_trl"] else _QVL_COLOUR
        axes.barh(place, median, height=0.62, color=colour, xerr=spread, ecolor=_INK, capsize=3)
        ratio = f"  ({summary['times_trl']:.1f}x)" if "times_trl" in summary else ""
        memory = f", {summary['peak_gib']:.1f} GiB" if summary["peak_gib"] is not None else ""
        axes.text(speed["most"], place, f"  {_short(median)}{ratio}{memory}", va="center", color=_INK)
    axes.set_yticks(range(len(cases)), [case["name"] for case in cases])
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xlim(0, 1.35 * max((_fastest(case) for case in cases), default=1.0))
    axes.set_xlabel("captions a second (median of the blocks; whiskers: least and most)", color=_MUTED)
    random = ", random weights" if results["random_weights"] else ""
    axes.set_title(f"{results['model']}{random} on {results['device']}", loc="left", color=_INK, fontsize=11)
    axes.grid(axis="x", color=_GRID)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    figure.savefig(path)


def _fastest(case: Mapping[str, Any]) -> float:
    return float(case["summary"]["captions_per_second"]["most"]) if case["summary"] else 1e-9
