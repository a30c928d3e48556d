"""Intervals, paired differences and what they say in words."""

import math
import time
from dataclasses import replace

import numpy as np
import pytest
from captions import random_items
from pycocoevalcap.bleu.bleu import Bleu

from qvl.bootstrap import compare, intervals
from qvl.metrics import CAPTION_SCORES, ScoreStatistics, loss_statistics, score_statistics
from qvl.ptb import tokenize

Statistics = dict[str, ScoreStatistics]


def pair(num_items: int, seed: int, improved: int, *names: str) -> tuple[Statistics, Statistics]:
    """Scores of random captions, and of the same with every `improved`-th one made its first reference."""
    predictions, references = random_items(num_items, seed)
    better = {key: references[key][0] if int(key) % improved == 0 else text for key, text in predictions.items()}
    return score_statistics(predictions, references, names), score_statistics(better, references, names)


def test_a_better_model_is_found_better() -> None:
    before, after = pair(200, 0, 2, "bleu4", "cer")
    found = compare(before, after, range(200), seed=42, num_resamples=500)
    difference = found["bleu4"]
    assert difference["verdict"] == "better"
    assert 0 < difference["low"] < difference["mean"] < difference["high"]
    assert difference["mean"] == pytest.approx(after["bleu4"].value - before["bleu4"].value)
    assert difference["p_value"] == pytest.approx(2 / 501)
    # Fewer errors are better too, and more of them are worse.
    assert found["cer"]["verdict"] == "better"
    assert found["cer"]["high"] < 0
    assert compare(after, before, range(200), seed=42, num_resamples=100)["cer"]["verdict"] == "worse"


def test_what_guards_a_division_by_zero_leaves_is_no_difference() -> None:
    references = {str(item): ["a dog runs over the wide green field"] for item in range(20)}
    long, short = (dict.fromkeys(references, text) for text in ("this one says nothing of it at all", "no"))
    before, after = (score_statistics(answers, references, ["bleu4"]) for answers in (long, short))
    assert 0 < before["bleu4"].value != after["bleu4"].value > 0
    found = compare(before, after, range(20), seed=0, num_resamples=100)["bleu4"]
    assert (found["mean"], found["p_value"], found["verdict"]) == (0.0, 1.0, "no clear difference")


def test_what_is_no_finite_number_is_left_out() -> None:
    sound, overflows = loss_statistics([1.0, 2.0], [1, 1]), loss_statistics([1.0, 2000.0], [1, 1])
    assert set(intervals(overflows, range(2), seed=0, num_resamples=50)) == {"loss"}
    assert set(compare(sound, overflows, range(2), seed=0, num_resamples=50)) == {"loss"}


def test_no_difference_is_said_in_words() -> None:
    before, _ = pair(60, 1, 2, "cider")
    found = compare(before, before, range(60), seed=42, num_resamples=200)["cider"]
    assert {key: found[key] for key in ("mean", "low", "high", "p_value")} == {  # type: ignore[literal-required]
        "mean": 0.0,
        "low": 0.0,
        "high": 0.0,
        "p_value": 1.0,
    }
    assert found["verdict"] == "no clear difference"


def test_a_difference_within_the_noise_is_no_clear_one() -> None:
    generator = np.random.default_rng(3)
    before, after = (loss_statistics(generator.normal(2, 1, 50).tolist(), [1] * 50) for _ in range(2))
    found = compare(before, after, range(50), seed=0)["loss"]
    assert found["low"] < 0 < found["high"]
    assert 0.05 < found["p_value"] <= 1
    assert found["verdict"] == "no clear difference"


def test_a_score_of_zero_has_no_relative_change() -> None:
    references = {"a": ["a red ball"], "b": ["two dogs"]}
    nothing, something = (score_statistics(dict.fromkeys("ab", text), references, ["bleu1"]) for text in ("", "a red"))
    assert compare(nothing, something, range(2), seed=0, num_resamples=50)["bleu1"]["relative"] is None


def test_a_relative_change_follows_from_the_scores() -> None:
    before, after = pair(100, 3, 5, "rouge_l")
    relative = compare(before, after, range(100), seed=42, num_resamples=300)["rouge_l"]["relative"]
    assert relative is not None
    assert relative["mean"] == pytest.approx(after["rouge_l"].value / before["rouge_l"].value - 1)
    assert 0 < relative["low"] < relative["mean"] < relative["high"]


def test_the_seed_decides_the_resamples() -> None:
    before, after = pair(50, 4, 2, "bleu4")
    first = compare(before, after, range(50), seed=1, num_resamples=100)
    assert compare(before, after, range(50), seed=1, num_resamples=100) == first
    assert compare(before, after, range(50), seed=2, num_resamples=100) != first


def test_a_resample_scores_as_the_items_it_holds() -> None:
    """Two items give three different resamples; the ends of a wide interval are scores of such sets."""
    predictions = {"a": "a dog runs in the park", "b": "a cat sleeps on two mats here"}
    references = {"a": ["a brown dog runs in the park"], "b": ["a cat sleeps on a mat"]}
    found = intervals(score_statistics(predictions, references, ["bleu2"]), range(2), seed=0, num_resamples=400)

    def upstream(*keys: str) -> float:
        truth = {number: [" ".join(tokenize(references[key][0]))] for number, key in enumerate(keys)}
        guess = {number: [" ".join(tokenize(predictions[key]))] for number, key in enumerate(keys)}
        return float(Bleu(4).compute_score(truth, guess, verbose=0)[0][1])

    alone = sorted([upstream("a", "a"), upstream("b", "b")])
    assert found["bleu2"]["low"] == pytest.approx(alone[0], abs=1e-9)
    assert found["bleu2"]["high"] == pytest.approx(alone[1], abs=1e-9)
    assert found["bleu2"]["mean"] == pytest.approx(upstream("a", "b"), abs=1e-9)


def test_rows_of_one_image_are_drawn_together() -> None:
    """Each image's ten questions are answered alike, so there are 20 observations and not 200."""
    generator = np.random.default_rng(0)
    losses = np.repeat(generator.normal(2, 1, 20), 10).tolist()
    statistics = {"loss": loss_statistics(losses, [1] * 200)["loss"]}
    by_image = intervals(statistics, np.repeat(range(20), 10).tolist(), seed=0)["loss"]
    by_row = intervals(statistics, range(200), seed=0)["loss"]
    ratio = (by_image["high"] - by_image["low"]) / (by_row["high"] - by_row["low"])
    assert ratio == pytest.approx(math.sqrt(10), rel=0.2)


def test_intervals_hold_the_true_value_about_as_often_as_they_say() -> None:
    """Of 200 sets of 80 items drawn from 4,000, 90 to 99% have an interval that holds the difference of the 4,000."""
    predictions, references = random_items(4000, seed=5)
    other = {key: captions[1] if int(key) % 3 else captions[0] for key, captions in references.items()}
    models = [score_statistics(texts, references, ["rouge_l"])["rouge_l"] for texts in (predictions, other)]
    truth = models[1].value - models[0].value
    generator = np.random.default_rng(6)
    held = 0
    for number in range(200):
        chosen = generator.choice(4000, size=80, replace=False)
        drawn = [{"rouge_l": replace(model, summands=model.summands[chosen])} for model in models]
        found = compare(*drawn, range(80), seed=number, num_resamples=400)["rouge_l"]
        held += found["low"] <= truth <= found["high"]
    assert 0.90 <= held / 200 <= 0.99


def test_a_thousand_resamples_of_a_thousand_items_take_less_than_five_seconds() -> None:
    names = [*CAPTION_SCORES, "exact_match", "anls", "cer"]
    before, after = pair(1000, 8, 2, *names)
    losses = loss_statistics(list(range(1000)), [7] * 1000)
    start = time.process_time()
    compare(before | losses, after | losses, range(1000), seed=42)
    assert time.process_time() - start < 5
