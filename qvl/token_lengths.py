"""How many tokens the training rows have and how many of them are trained on: a file of the run and a histogram."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from qvl.survey import RowLength

_MAX_BARS = 24
_WIDTH, _HEIGHT = 720, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 14, 40


def summarize_lengths(lengths: "Sequence[RowLength]", max_length: int | None) -> dict[str, Any]:
    """What token_lengths.json holds.

    Args:
        lengths: of the rows that are trained on, at least one.
        max_length: the run's limit in tokens.

    Returns:
        `num_rows`, `num_tokens`, `num_target_tokens`, `trained_share` (0 to 1), `max_length`, and `bins`: equally wide
        ones, each {"from", "to" (exclusive), "count"}, from the shortest row to the longest.
    """
    tokens = [row.num_tokens for row in lengths]
    num_tokens, num_targets = sum(tokens), sum(row.num_target_tokens for row in lengths)
    first, last = min(tokens), max(tokens)
    width = _round_width((last - first + 1) / _MAX_BARS)
    starts = range(first // width * width, last + 1, width)
    return {
        "num_rows": len(tokens),
        "num_tokens": num_tokens,
        "num_target_tokens": num_targets,
        "trained_share": num_targets / num_tokens,
        "max_length": max_length,
        "bins": [
            {"from": start, "to": start + width, "count": sum(start <= value < start + width for value in tokens)}
            for start in starts
        ],
    }


def _round_width(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... tokens that is not below `least`."""
    magnitude = 1
    while True:
        for factor in (1, 2, 5):
            if factor * magnitude >= least:
                return factor * magnitude
        magnitude *= 10


def length_histogram(summary: Mapping[str, Any]) -> Markup:
    """Draws the bins of `summarize_lengths`; colours and fonts are the page's."""
    bins = summary["bins"]
    highest = max(row["count"] for row in bins)
    slot = (_WIDTH - _LEFT - _RIGHT) / len(bins)
    base = _HEIGHT - _BOTTOM
    parts = [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>'
        f'<text class="tick" x="{_LEFT - 8}" y="{_TOP + 4}" text-anchor="end">{highest:,}</text>'
        f'<text class="tick" x="{_LEFT - 8}" y="{base + 4}" text-anchor="end">0</text>'
        f'<text class="tick" x="{(_WIDTH + _LEFT - _RIGHT) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">'
        "tokens of a row</text>"
    ]
    labelled = max(1, -(-len(bins) // 8))
    for index, row in enumerate(bins):
        height = row["count"] / highest * (base - _TOP)
        left = _LEFT + index * slot
        title = f"{row['from']:,} to {row['to'] - 1:,} tokens: {row['count']:,} rows"
        parts.append(
            f'<rect class="finetuned" x="{left + 1:.1f}" y="{base - height:.1f}" width="{max(slot - 2, 1):.1f}" '
            f'height="{height:.1f}"><title>{escape(title)}</title></rect>'
        )
        if index % labelled == 0:
            parts.append(
                f'<text class="tick" x="{left:.1f}" y="{base + 18}" text-anchor="middle">{row["from"]:,}</text>'
            )
    summary_text = (
        f"{summary['num_rows']:,} training rows of {bins[0]['from']:,} to {bins[-1]['to'] - 1:,} tokens, "
        f"{summary['trained_share']:.1%} of the tokens trained on"
    )
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(summary_text)}">{"".join(parts)}</svg>'
    )
