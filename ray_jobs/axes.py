"""What a sweep varies: a list of values, or a range. Knows nothing of Ray, so that importing a sweep starts nothing."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """Numbers between two ends, drawn evenly; `is_log` draws their logarithms evenly."""

    low: float
    high: float
    is_log: bool = False

    def three_points(self) -> list[float]:
        """Both ends and the middle: what a grid takes of a range."""
        middle = math.sqrt(self.low * self.high) if self.is_log else (self.low + self.high) / 2
        return [self.low, float(f"{middle:.3g}"), self.high]


Axis = list[Any] | Range


def example_of(axes: Mapping[str, Axis]) -> dict[str, Any]:
    """One point of the space, to be checked as the recipe's flags."""
    return {name: axis.low if isinstance(axis, Range) else axis[0] for name, axis in axes.items()}


def random_space(axes: Mapping[str, Axis]) -> dict[str, Any]:
    """The axes as Ray Tune draws from them."""
    from ray import tune

    def domain(axis: Axis) -> Any:
        if isinstance(axis, list):
            return tune.choice(axis)
        return (tune.loguniform if axis.is_log else tune.uniform)(axis.low, axis.high)

    return {name: domain(axis) for name, axis in axes.items()}


def grid_space(axes: Mapping[str, Axis]) -> dict[str, Any]:
    """The axes as Ray Tune walks over all combinations."""
    from ray import tune

    return {
        name: tune.grid_search(axis if isinstance(axis, list) else axis.three_points()) for name, axis in axes.items()
    }
