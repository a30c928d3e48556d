"""Scores of a set of answers against all their references, and whether a difference between two models is noise.

BLEU-1..4, ROUGE-L and CIDEr-D are the numbers that coco-caption prints (fractions; CIDEr may pass 1), equal to the
scorers of PyPI's `pycocoevalcap` 1.2 to 1e-9. Exact match, ANLS, character error rate and a recipe's own scores are
those of `qvl.text_scores`; the held-out loss comes from `qvl.held_out`.

Every score is a function of sums over items. `score_statistics` reduces the texts to the summands once; the score of
the whole set, of every bootstrap resample, and their intervals then cost one matrix product.
"""

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qvl.caption_statistics import CaptionStatistics, Floats, caption_statistics
from qvl.errors import UserError
from qvl.ptb import tokenize
from qvl.text_scores import TEXT_SCORES, TextScore

CAPTION_SCORES = {
    **{f"bleu{order}": f"BLEU-{order}" for order in range(1, 5)},
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
}
# Published numbers seldom say whether they are of all references or of the first.
FIRST_REFERENCE = "_first_reference"

# coco-caption's guards against a division by zero.
_TINY = 1e-15
_SMALL = 1e-9
_NUM_NAMED_IDS = 5


@dataclass(frozen=True)
class ScoreStatistics:
    """One score of one model on N items: what it sums, and what it makes of the sums.

    Attributes:
        summands: [N, K] float64.
        from_sums: from sums over items, [R, K] float64 for R sets of items, to the R scores, [R] float64.
        items: [N] float64, each item's own score; None where only a set has one (BLEU).
        label: the name that tables show.
        higher_is_better: False for errors and losses.
        is_void: from the same sums, [R] bool: sets whose score is only what guards against a division by zero leave of
            0, so that it compares with nothing. None where that cannot be.
    """

    summands: Floats
    from_sums: Callable[[Floats], Floats]
    items: Floats | None
    label: str
    higher_is_better: bool = True
    is_void: Callable[[Floats], np.ndarray] | None = None

    @property
    def value(self) -> float:
        """The score of the whole set."""
        return float(self.from_sums(self.summands.sum(axis=0, keepdims=True))[0])


def choose_scores(names: Sequence[str], own: Mapping[str, TextScore]) -> list[str]:
    """The names without repetition, checked.

    Args:
        names: from --scores.
        own: the recipe's own scores by name.

    Raises:
        UserError: no name, one that is no score, or a score of the recipe that hides one of ours.
    """
    ours = {**CAPTION_SCORES, **TEXT_SCORES}
    for name in own:
        if name in ours or name in ("loss", "perplexity"):
            raise UserError(f"The recipe's score `{name}` has the name of one of qvl's: rename it.")
    for name in names:
        if name not in ours and name not in own:
            known = [*own, *ours]
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean `{nearest[0]}`?" if nearest else f"There are {', '.join(known)}."
            raise UserError(f"--scores {name} is no score. {hint}")
    if not names:
        raise UserError(f"--scores is empty: name some of {', '.join([*own, *ours])}.")
    return list(dict.fromkeys(names))


def score_statistics(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    names: Sequence[str] = tuple(CAPTION_SCORES),
    own: Mapping[str, TextScore] | None = None,
    with_first_reference: bool = False,
) -> dict[str, ScoreStatistics]:
    """Reduces the answers of a set to what the scores sum, in the order of `references`.

    Args:
        predictions: one answer for each id; an empty one is scored like any other.
        references: one or more true answers for each of the same ids.
        names: scores, see `choose_scores`.
        own: the recipe's own scores by name.
        with_first_reference: caption scores also against the first reference only, as `bleu4_first_reference`, where
            an item has more than one.

    Returns:
        By score name, in the order of `names`.

    Raises:
        UserError: no items, an id on one side only, an id without references, or a recipe's score that is no number.
    """
    _check_ids(predictions, references)
    chosen = [name for name in names if name in CAPTION_SCORES]
    result = _caption_scores(predictions, references, chosen)
    for name in names:
        if name not in CAPTION_SCORES:
            text_score = TEXT_SCORES.get(name) or (own or {})[name]
            result[name] = _text_score(name, text_score, predictions, references)
    result = {name: result[name] for name in names}
    if with_first_reference and chosen and any(len(texts) > 1 for texts in references.values()):
        first = _caption_scores(predictions, {key: texts[:1] for key, texts in references.items()}, chosen)
        for name, statistics in first.items():
            result[f"{name}{FIRST_REFERENCE}"] = replace(statistics, label=f"{statistics.label}, first reference")
    return result


def score(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    names: Sequence[str] = tuple(CAPTION_SCORES),
    own: Mapping[str, TextScore] | None = None,
) -> dict[str, float]:
    """The scores of a whole set by name; arguments and errors are those of `score_statistics`."""
    return {key: found.value for key, found in score_statistics(predictions, references, names, own).items()}


def loss_statistics(losses: Sequence[float], num_tokens: Sequence[int]) -> dict[str, ScoreStatistics]:
    """The held-out `loss` and `perplexity` as scores: sums over tokens, whatever the batches were.

    Args:
        losses: of each item the negative log-likelihood of its answers, summed over their tokens, in nats.
        num_tokens: of each item the tokens that this sums over.
    """
    summands = np.array([losses, num_tokens], dtype=np.float64).T
    items = _ratio(summands)
    return {
        "loss": ScoreStatistics(summands, _ratio, items, "held-out loss", higher_is_better=False),
        "perplexity": ScoreStatistics(summands, _perplexity, _perplexity(summands), "perplexity", False),
    }


def caption_scores(
    found: CaptionStatistics, names: Sequence[str] = tuple(CAPTION_SCORES)
) -> dict[str, ScoreStatistics]:
    """BLEU, ROUGE-L and CIDEr-D of captions that are reduced to numbers already."""
    means = {"rouge_l": found.rouge_l, "cider": found.cider}
    return {
        name: _mean(means[name], CAPTION_SCORES[name]) if name in means else _bleu(found, int(name[-1]))
        for name in names
    }


def _caption_scores(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]], names: Sequence[str]
) -> dict[str, ScoreStatistics]:
    if not names:
        return {}
    found = caption_statistics(
        [tokenize(predictions[item_id]) for item_id in references],
        [[tokenize(caption) for caption in captions] for captions in references.values()],
    )
    return caption_scores(found, names)


def _bleu(found: CaptionStatistics, order: int) -> ScoreStatistics:
    lengths = np.stack([found.prediction_tokens, found.reference_tokens], axis=1)
    summands = np.concatenate([found.correct[:, :order], found.guessed[:, :order], lengths], axis=1)

    def from_sums(sums: Floats) -> Floats:
        correct, guessed = sums[:, :order], sums[:, order : 2 * order]
        ratio = (sums[:, -2] + _TINY) / (sums[:, -1] + _SMALL)
        brevity_penalty = np.exp(np.minimum(0.0, 1 - 1 / ratio))
        precisions = np.prod((correct + _TINY) / (guessed + _SMALL), axis=1)
        return np.asarray(precisions ** (1 / order) * brevity_penalty)

    def has_no_match(sums: Floats) -> np.ndarray:
        return np.asarray((sums[:, :order] == 0).any(axis=1))

    return ScoreStatistics(summands, from_sums, None, CAPTION_SCORES[f"bleu{order}"], is_void=has_no_match)


def _mean(items: Floats, label: str, higher_is_better: bool = True) -> ScoreStatistics:
    summands = np.stack([items, np.ones_like(items)], axis=1)
    return ScoreStatistics(summands, _ratio, items, label, higher_is_better)


def _ratio(sums: Floats) -> Floats:
    """First column by second; where there is nothing to divide by, the first (errors against empty references)."""
    return np.asarray(sums[:, 0] / np.where(sums[:, 1] == 0, 1.0, sums[:, 1]))


def _perplexity(sums: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(_ratio(sums)))


def _text_score(
    name: str, text_score: TextScore, predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> ScoreStatistics:
    values = [_value(name, key, text_score, predictions[key], texts) for key, texts in references.items()]
    if len({np.shape(value) for value in values}) > 1:
        raise UserError(f"The score `{name}` gives a number for some answers and a pair for others: choose one.")
    found = np.array(values, dtype=np.float64)
    if found.ndim == 1:
        return _mean(found, text_score.label, text_score.higher_is_better)
    return ScoreStatistics(found, _ratio, _ratio(found), text_score.label, text_score.higher_is_better)


def _value(
    name: str, item_id: str, text_score: TextScore, prediction: str, references: Sequence[str]
) -> float | tuple[float, float]:
    """What a score says of one answer; a recipe's own function may fail in any way."""
    try:
        value = text_score.function(prediction, references)
    except Exception as error:
        raise UserError(
            f"The score `{name}` fails for {item_id!r}, answer {prediction[:60]!r}: {type(error).__name__}: {error}. "
            "Correct it (an answer may be empty); answers that are in the run folder are scored by --stages report."
        ) from error
    parts = value if isinstance(value, tuple) else (value,)
    is_number = [isinstance(part, int | float | np.number | np.bool_) and np.isfinite(part) for part in parts]
    if len(parts) > 2 or not all(is_number):
        raise UserError(
            f"The score `{name}` gives {value!r} for {item_id!r}: it has to give a finite number, or a pair of them, "
            "numerator and denominator."
        )
    return value


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
