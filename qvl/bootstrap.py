"""How sure a score is, and whether a difference between two models is noise: a paired bootstrap over images."""

import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TypedDict

import numpy as np

from qvl.caption_statistics import Floats
from qvl.metrics import ScoreStatistics

NUM_RESAMPLES = 1000
# Resamples are drawn in blocks of at most this many weights, 64 MiB.
_WEIGHTS_PER_BLOCK = 2**23
# Against a score of practically nothing a percentage says nothing either.
_LEAST_RELATIVE_BASE = 1e-3


class Interval(TypedDict):
    """An observed value with the ends of its 95% bootstrap interval."""

    mean: float
    low: float
    high: float


class Difference(Interval):
    """An observed difference B - A with its 95% interval, two-sided p-value, and what that says in words.

    Attributes:
        relative: (B - A) / A as a fraction, None where A is below 0.001 in the set or in a resample.
        verdict: "better", "worse", or "no clear difference" where the interval holds 0.
    """

    p_value: float
    relative: Interval | None
    verdict: str


def intervals(
    statistics: Mapping[str, ScoreStatistics],
    images: Sequence[Hashable],
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
) -> dict[str, Interval]:
    """The scores of one model, each with its interval; arguments are those of `compare`.

    A score that is no finite number (a perplexity that overflows, say) is left out.
    """
    resampled = _resampled_scores([statistics], images, num_resamples, seed)[0]
    return {name: _interval(values) for name, values in resampled.items() if np.isfinite(values).all()}


def compare(
    statistics_a: Mapping[str, ScoreStatistics],
    statistics_b: Mapping[str, ScoreStatistics],
    images: Sequence[Hashable],
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
) -> dict[str, Difference]:
    """Compares two models on the same items by a paired bootstrap over images.

    Both models are scored on the same resamples, and items of one image are drawn together. An interval runs from the
    2.5th to the 97.5th percentile of the resampled values; `mean` is the value observed on the whole set. The p-value
    is two-sided: twice the smaller share of resamples in which the difference is not above, or not below, 0, one
    resample being added to each so that it is never 0. CIDEr's document frequencies stay those of the whole set.

    Args:
        statistics_a: scores of the base model, say, by name.
        statistics_b: the same scores of the other model on the same items.
        images: of each item the image it is about; items without one each have a value of their own.
        seed: of the resampling; the same seed gives the same numbers.
        num_resamples: number of bootstrap resamples.

    Returns:
        By score name, plain values fit for JSON; a score that is no finite number somewhere is left out. A BLEU that
        has no match of its order counts as 0 here: what coco-caption prints for it is a matter of lengths alone.
    """
    scores_a, scores_b = _resampled_scores([statistics_a, statistics_b], images, num_resamples, seed, void=0.0)
    return {
        name: _difference(scores_a[name], scores_b[name], statistics_b[name].higher_is_better)
        for name in statistics_a
        if np.isfinite(scores_a[name]).all() and np.isfinite(scores_b[name]).all()
    }


def _resampled_scores(
    models: Sequence[Mapping[str, ScoreStatistics]],
    images: Sequence[Hashable],
    num_resamples: int,
    seed: int,
    void: float | None = None,
) -> list[dict[str, Floats]]:
    """For each model its scores [1 + num_resamples]: the whole set first, then resamples common to all models.

    `void` takes the place of scores that are void (`ScoreStatistics.is_void`).
    """
    numbers = {image: number for number, image in enumerate(dict.fromkeys(images))}
    image_of_item = np.array([numbers[image] for image in images])
    summands = [_by_image(model, image_of_item, len(numbers)) for model in models]
    whole_set = np.ones((1, len(numbers)))
    blocks = itertools.chain([whole_set], _resamples(len(numbers), num_resamples, seed))
    sums = [[weights @ columns for columns in summands] for weights in blocks]
    return [
        _scores(model, np.concatenate([block[index] for block in sums]), void) for index, model in enumerate(models)
    ]


def _by_image(model: Mapping[str, ScoreStatistics], image_of_item: np.ndarray, num_images: int) -> Floats:
    """[num_images, all columns of all scores], the items of an image added up."""
    columns = np.concatenate([statistics.summands for statistics in model.values()], axis=1)
    result = np.zeros((num_images, columns.shape[1]))
    np.add.at(result, image_of_item, columns)
    return result


def _resamples(num_images: int, num_resamples: int, seed: int) -> Iterator[Floats]:
    """Blocks of rows that say how often a resample holds each image; no two are in memory at once."""
    generator = np.random.default_rng(seed)
    block_rows = max(1, _WEIGHTS_PER_BLOCK // num_images)
    for start in range(0, num_resamples, block_rows):
        num_rows = min(block_rows, num_resamples - start)
        drawn = [generator.integers(num_images, size=num_images) for _ in range(num_rows)]
        yield np.stack([np.bincount(row, minlength=num_images) for row in drawn]).astype(np.float64)


def _scores(model: Mapping[str, ScoreStatistics], sums: Floats, void: float | None) -> dict[str, Floats]:
    ends = np.cumsum([statistics.summands.shape[1] for statistics in model.values()])[:-1]
    parts = np.split(sums, ends, axis=1)
    return {name: _score(model[name], part, void) for name, part in zip(model, parts, strict=True)}


def _score(statistics: ScoreStatistics, sums: Floats, void: float | None) -> Floats:
    values = statistics.from_sums(sums)
    if void is None or statistics.is_void is None:
        return values
    return np.where(statistics.is_void(sums), void, values)


def _difference(scores_a: Floats, scores_b: Floats, higher_is_better: bool) -> Difference:
    differences = scores_b - scores_a
    resampled = differences[1:]
    num_against = min(np.count_nonzero(resampled <= 0), np.count_nonzero(resampled >= 0))
    has_base = bool(np.all(scores_a >= _LEAST_RELATIVE_BASE))
    interval = _interval(differences)
    return {
        **interval,
        "p_value": min(1.0, 2 * (num_against + 1) / (len(resampled) + 1)),
        "relative": _interval(differences / scores_a) if has_base else None,
        "verdict": _verdict(interval, higher_is_better),
    }


def _verdict(difference: Interval, higher_is_better: bool) -> str:
    if difference["low"] <= 0 <= difference["high"]:
        return "no clear difference"
    return "better" if (difference["low"] > 0) == higher_is_better else "worse"


def _interval(values: Floats) -> Interval:
    """Of the observed value (first) and the resampled ones."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return {"mean": float(values[0]), "low": float(low), "high": float(high)}
