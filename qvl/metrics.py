"""Corpus scores of captions against all their references, and whether a difference between two models is noise.

BLEU-1..4, ROUGE-L and CIDEr-D are the numbers that coco-caption prints (fractions; CIDEr may pass 1), equal to the
scorers of PyPI's `pycocoevalcap` 1.2 to 1e-9. `sufficient_statistics` reduces the texts to a few numbers per item;
the scores of the whole set and of every bootstrap resample are then functions of weighted sums of those.

To score against the first reference only, pass `{id: references[:1]}`.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import TypedDict

import numpy as np

from qvl.caption_statistics import CaptionStatistics, Floats, caption_statistics
from qvl.errors import UserError
from qvl.ptb import tokenize

METRICS = ("bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider")

# coco-caption's guards against a division by zero.
_TINY = 1e-15
_SMALL = 1e-9
# Resamples are drawn in blocks of at most this many weights, 64 MiB.
_WEIGHTS_PER_BLOCK = 2**23
_NUM_NAMED_IDS = 5


class Interval(TypedDict):
    """An observed value with the ends of its 95% bootstrap interval."""

    mean: float
    low: float
    high: float


class Difference(Interval):
    """An observed difference B - A with its 95% interval and two-sided p-value."""

    p_value: float


class Comparison(TypedDict):
    """One metric of two models on the same items.

    Attributes:
        a: score of the first model.
        b: score of the second.
        difference: b - a, paired.
        relative: (b - a) / a as a fraction, or None where a is 0 in the set or in a resample.
    """

    a: Interval
    b: Interval
    difference: Difference
    relative: Interval | None


def score(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Scores the captions of a whole set.

    Args:
        predictions: one caption for each id; an empty one is scored like any other.
        references: one or more true captions for each of the same ids.

    Returns:
        A score for each name in `METRICS`, and `num_examples` (an int).

    Raises:
        UserError: no items, an id on one side only, or an id without references.
    """
    statistics = sufficient_statistics(predictions, references)
    whole_set = np.ones((1, statistics.num_examples))
    scores = corpus_scores(statistics, whole_set)
    return {**{name: float(values[0]) for name, values in scores.items()}, "num_examples": statistics.num_examples}


def sufficient_statistics(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> CaptionStatistics:
    """Tokenizes the captions and reduces them to numbers per item, in the order of `references`.

    Arguments and errors are those of `score`.
    """
    return _statistics_of_models([predictions], references)[0]


def corpus_scores(statistics: CaptionStatistics, weights: Floats) -> dict[str, Floats]:
    """Scores R corpora made of the same N items.

    Args:
        statistics: of the N items.
        weights: [R, N] float64, how often each corpus holds each item; each row sums to at least 1.

    Returns:
        For each name in `METRICS` an array [R] float64.
    """
    correct = weights @ statistics.correct
    guessed = weights @ statistics.guessed
    ratio = (weights @ statistics.prediction_tokens + _TINY) / (weights @ statistics.reference_tokens + _SMALL)
    brevity_penalty = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    precisions = np.cumprod((correct + _TINY) / (guessed + _SMALL), axis=1)
    bleu = precisions ** (1 / np.arange(1, 5)) * brevity_penalty[:, None]
    num_items = weights.sum(axis=1)
    return {
        **{f"bleu{order}": bleu[:, order - 1] for order in range(1, 5)},
        "rouge_l": weights @ statistics.rouge_l / num_items,
        "cider": weights @ statistics.cider / num_items,
    }


def compare(
    predictions_a: Mapping[str, str],
    predictions_b: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    num_resamples: int = 1000,
    seed: int = 42,
) -> dict[str, Comparison]:
    """Compares two models on the same items by a paired bootstrap over items.

    Both models are scored on the same resamples. An interval runs from the 2.5th to the 97.5th percentile of the
    resampled values; `mean` is the value observed on the whole set. The p-value is two-sided: twice the smaller share
    of resamples in which the difference is not above, or not below, 0, one resample being added to each so that it is
    never 0. CIDEr's document frequencies stay those of the whole set.

    Args:
        predictions_a: one caption for each id, for instance of the base model.
        predictions_b: the same of the other model.
        references: one or more true captions for each id.
        num_resamples: number of bootstrap resamples.
        seed: of the resampling; the same seed gives the same numbers.

    Returns:
        A `Comparison` for each name in `METRICS`, plain values fit for JSON.

    Raises:
        UserError: see `score`.
    """
    models = _statistics_of_models([predictions_a, predictions_b], references)
    scores_a, scores_b = _resampled_scores(models, num_resamples, seed)
    return {name: _comparison(scores_a[name], scores_b[name]) for name in METRICS}


def describe_difference(comparison: Comparison) -> str:
    """Says in words what a comparison found.

    Returns:
        For instance "+0.0285 (+28%), 95% interval +0.0210 to +0.0361, p = 0.002", led by "no clear difference: " when
        the interval holds 0.
    """
    difference = comparison["difference"]
    relative = comparison["relative"]
    change = f" ({relative['mean']:+.0%})" if relative else ""
    numbers = (
        f"{difference['mean']:+.4f}{change}, 95% interval {difference['low']:+.4f} to {difference['high']:+.4f}, "
        f"p = {difference['p_value']:.3f}"
    )
    return numbers if is_clear(difference) else f"no clear difference: {numbers}"


def is_clear(difference: Interval) -> bool:
    """Whether the 95% interval of the difference leaves out 0."""
    return difference["low"] > 0 or difference["high"] < 0


def _statistics_of_models(
    models: Sequence[Mapping[str, str]], references: Mapping[str, Sequence[str]]
) -> list[CaptionStatistics]:
    """Of each model's predictions; the references, the bulk of the text, are tokenized once."""
    for predictions in models:
        _check_ids(predictions, references)
    reference_tokens = [[tokenize(caption) for caption in captions] for captions in references.values()]
    return [
        caption_statistics([tokenize(predictions[item_id]) for item_id in references], reference_tokens)
        for predictions in models
    ]


def _resampled_scores(models: Sequence[CaptionStatistics], num_resamples: int, seed: int) -> list[dict[str, Floats]]:
    """For each model its scores [1 + num_resamples]: the whole set first, then resamples common to all models."""
    num_items = models[0].num_examples
    generator = np.random.default_rng(seed)
    block_rows = max(1, _WEIGHTS_PER_BLOCK // num_items)
    blocks = [[corpus_scores(model, np.ones((1, num_items))) for model in models]]
    for start in range(0, num_resamples, block_rows):
        num_rows = min(block_rows, num_resamples - start)
        weights = np.stack(
            [np.bincount(generator.integers(num_items, size=num_items), minlength=num_items) for _ in range(num_rows)]
        ).astype(np.float64)
        blocks.append([corpus_scores(model, weights) for model in models])
    return [
        {name: np.concatenate([block[index][name] for block in blocks]) for name in METRICS}
        for index in range(len(models))
    ]


def _comparison(scores_a: Floats, scores_b: Floats) -> Comparison:
    differences = scores_b - scores_a
    resampled = differences[1:]
    num_against = min(np.count_nonzero(resampled <= 0), np.count_nonzero(resampled >= 0))
    p_value = min(1.0, 2 * (num_against + 1) / (len(resampled) + 1))
    return {
        "a": _interval(scores_a),
        "b": _interval(scores_b),
        "difference": {**_interval(differences), "p_value": p_value},
        "relative": _interval(differences / scores_a) if np.all(scores_a > 0) else None,
    }


def _interval(values: Floats) -> Interval:
    """Of the observed value (first) and the resampled ones."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return {"mean": float(values[0]), "low": float(low), "high": float(high)}


def _check_ids(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    if not references and not predictions:
        raise UserError("There is nothing to score: no predictions and no references.")
    problems = [
        _named_ids("without a prediction", [item_id for item_id in references if item_id not in predictions]),
        _named_ids("predicted without references", [item_id for item_id in predictions if item_id not in references]),
        _named_ids("with an empty list of references", [item_id for item_id, texts in references.items() if not texts]),
    ]
    if any(problems):
        raise UserError(
            f"Predictions and references do not belong together: {'; '.join(filter(None, problems))}. "
            "Score the predictions of a run against the references of the same data."
        )


def _named_ids(problem: str, ids: Collection[str]) -> str:
    if not ids:
        return ""
    named = ", ".join(repr(item_id) for item_id in list(ids)[:_NUM_NAMED_IDS])
    return f"{len(ids)} {problem} ({named}{', ...' if len(ids) > _NUM_NAMED_IDS else ''})"
