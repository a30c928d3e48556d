"""The two plots of the report as inline SVG: score bars and the loss curve.

Colours and fonts are the page's: the elements carry classes only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 14, 40
_MAX_POINTS = 600


@dataclass(frozen=True)
class Bar:
    """One bar: its label, CSS class, value (finite), and the ends of the value's interval if they are known."""

    label: str
    css_class: str
    value: float
    interval: tuple[float, float] | None = None


def score_bars(name: str, bars: Sequence[Bar]) -> Markup:
    """Draws one horizontal bar per score, from 0 on, with a whisker for its interval; below 0 there is no bar.

    Args:
        name: of the score, "BLEU-4".
        bars: at least one.
    """
    width, bar_height, gap, label_width, value_width = 460, 34, 18, 92, 64
    height = len(bars) * (bar_height + gap) - gap + 8
    longest = max(max(bar.value, bar.interval[1] if bar.interval else 0.0) for bar in bars)
    scale = (width - label_width - value_width) / max(longest, 1e-9)
    parts = []
    for index, bar in enumerate(bars):
        top = 4 + index * (bar_height + gap)
        middle = top + bar_height / 2
        length = max(bar.value * scale, 2)
        end = label_width + length
        parts.append(
            f'<text class="label" x="{label_width - 12}" y="{middle + 5}" text-anchor="end">{escape(bar.label)}</text>'
            f'<rect class="{bar.css_class}" x="{label_width}" y="{top}" width="{length:.1f}" height="{bar_height}" '
            'rx="4"/>'
        )
        if bar.interval:
            low, high = (label_width + max(value * scale, 0) for value in bar.interval)
            parts.append(
                f'<path class="whisker" d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 5}v10'
                f'M{high:.1f} {middle - 5}v10"/>'
            )
            end = max(end, high)
        parts.append(f'<text class="value" x="{end + 8:.1f}" y="{middle + 5}">{bar.value:.4f}</text>')
    summary = ", ".join(f"{bar.label} {bar.value:.4f}" for bar in bars)
    return _svg(width, height, f"{name}: {summary}", "".join(parts))


def loss_curve(training: Sequence[tuple[float, float]], held_out: Sequence[tuple[float, float]]) -> Markup:
    """Draws the loss over the training steps.

    Args:
        training: (step, loss) points, finite, at least one.
        held_out: the same of the held-out set, may be empty.
    """
    width, height = 720, 300
    training = _thinned(training)
    points = [*training, *held_out]
    steps = _ticks(min(step for step, _ in points), max(step for step, _ in points), is_integer=True)
    losses = _ticks(*_loss_range([loss for _, loss in points]))

    def x(step: float) -> float:
        first, last = min(steps[0], points[0][0]), max(steps[-1], max(point[0] for point in points))
        return _LEFT + (step - first) / ((last - first) or 1) * (width - _LEFT - _RIGHT)

    def y(loss: float) -> float:
        return height - _BOTTOM - (loss - losses[0]) / ((losses[-1] - losses[0]) or 1) * (height - _TOP - _BOTTOM)

    parts = [
        f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text class="tick" x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in losses
    ]
    parts += [
        f'<text class="tick" x="{x(tick):.1f}" y="{height - _BOTTOM + 18}" text-anchor="middle">{tick:g}</text>'
        for tick in steps
    ]
    parts.append(
        f'<text class="tick" x="{(width + _LEFT - _RIGHT) / 2}" y="{height - 4}" text-anchor="middle">step</text>'
    )
    path = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in training)
    parts.append(f'<polyline class="curve" points="{path}"/>')
    is_sparse = len(training) <= 30
    parts += [_dot("curve-dot", x(step), y(loss), f"step {step:g}: {loss:.4f}") for step, loss in training if is_sparse]
    parts += [_dot("held-out", x(step), y(loss), f"held-out, step {step:g}: {loss:.4f}") for step, loss in held_out]
    summary = f"training loss from {training[0][1]:.4f} to {training[-1][1]:.4f} at step {training[-1][0]:g}"
    return _svg(width, height, summary, "".join(parts))


def _svg(width: int, height: float, summary: str, content: str) -> Markup:
    return Markup(f'<svg viewBox="0 0 {width} {height:g}" role="img" aria-label="{escape(summary)}">{content}</svg>')


def _dot(css_class: str, x: float, y: float, title: str) -> str:
    return f'<circle class="{css_class}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{escape(title)}</title></circle>'


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `_MAX_POINTS` points: means of equally long stretches, more than the plot has pixels to show."""
    stride = math.ceil(len(points) / _MAX_POINTS)
    stretches = [points[start : start + stride] for start in range(0, len(points), stride)]
    return [(stretch[-1][0], sum(loss for _, loss in stretch) / len(stretch)) for stretch in stretches]


def _loss_range(losses: Sequence[float]) -> tuple[float, float]:
    """From 0 where that wastes less than half of the plot, else the range of the values."""
    low, high = min(losses), max(losses)
    return (min(0.0, low), high) if low < high / 2 else (low, high)


def _ticks(low: float, high: float, is_integer: bool = False) -> list[float]:
    """Round numbers, about five, that enclose low and high (integers: that lie within)."""
    span = (high - low) or abs(high) or 1.0
    magnitude = 10.0 ** math.floor(math.log10(span / 5))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if span / (factor * magnitude) <= 6)
    if is_integer:
        step = max(step, 1.0)
        first, last = math.ceil(low / step), math.floor(high / step)
    else:
        first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 10) for index in range(first, max(first, last) + 1)]
