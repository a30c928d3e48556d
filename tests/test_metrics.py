"""Caption scores against coco-caption's own scorers and tokenizer, and the bootstrap's honesty."""

import json
import math
import random
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer

from qvl.caption_statistics import CaptionStatistics, caption_statistics
from qvl.errors import UserError
from qvl.metrics import METRICS, compare, corpus_scores, describe_difference, is_clear, score, sufficient_statistics
from qvl.ptb import tokenize

Tokens = list[str]

HARD_CAPTIONS = Path(__file__).with_name("hard_captions.txt")

BASELINE = {
    "park": "a dog is running",
    "beach": "two children on sand",
    "street": "The street, at night.",
    "empty": "",
    "unicode": "café naïve 日本語 🐕",
}
FINETUNED = {
    "park": "a brown dog runs through the park",
    "beach": "two children play on the beach",
    "street": "cars drive down a busy street at night",
    "empty": "a red ball",
    "unicode": "a café with a naïve 日本語 sign",
}
REFERENCES = {
    "park": ["A brown dog runs through the park.", "The dog is running in a park."],
    "beach": ["Two children play on the beach."],
    "street": [f"Cars drive down a busy street at night, {number}." for number in range(10)],
    "empty": ["A red ball.", ""],
    "unicode": ["A café with a naïve 日本語 sign.", "🐕"],
}


def upstream_scores(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> dict[str, float]:
    """What pycocoevalcap 1.2 gives for the same tokens."""
    truth = {index: [" ".join(tokens) for tokens in captions] for index, captions in enumerate(references)}
    results = {index: [" ".join(tokens)] for index, tokens in enumerate(predictions)}
    bleu, _ = Bleu(4).compute_score(truth, results, verbose=0)
    return {
        **{f"bleu{order}": bleu[order - 1] for order in range(1, 5)},
        "rouge_l": Rouge().compute_score(truth, results)[0],
        "cider": Cider().compute_score(truth, results)[0],
    }


def scores_of(statistics: CaptionStatistics) -> dict[str, float]:
    scores = corpus_scores(statistics, np.ones((1, statistics.num_examples)))
    return {name: float(values[0]) for name, values in scores.items()}


def assert_equal_scores(ours: dict[str, float], upstream: dict[str, float]) -> None:
    for name in METRICS:
        assert math.isclose(ours[name], upstream[name], rel_tol=0, abs_tol=1e-9), (name, ours[name], upstream[name])


def java_tokens(captions: list[str], folder: Path) -> list[Tokens]:
    """pycocoevalcap's `PTBTokenizer`, in one run of Java."""
    if shutil.which("java") is None:
        pytest.skip("no Java")
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    text = folder / "captions.txt"
    text.write_text("\n".join(captions), encoding="utf-8")
    options = ["-preserveLines", "-lowerCase"]
    finished = subprocess.run(
        ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", *options, str(text)],
        capture_output=True,
        check=True,
    )
    lines = finished.stdout.decode().split("\n")[: len(captions)]
    return [
        [token for token in line.rstrip().split(" ") if token and token not in ptbtokenizer.PUNCTUATIONS]
        for line in lines
    ]


def assert_java_agrees(captions: list[str], folder: Path) -> None:
    expected = java_tokens(captions, folder)
    differences = [
        (caption, tokenize(caption), tokens)
        for caption, tokens in zip(captions, expected, strict=True)
        if tokenize(caption) != tokens
    ]
    assert not differences, f"{len(differences)} of {len(captions)}, first {differences[:5]}"


def test_tokens_equal_javas_on_all_real_captions(shared: Path, tmp_path: Path) -> None:
    captions = [
        caption
        for name in ("flickr8k", "photos")
        for line in (shared / name / "captions.jsonl").read_text(encoding="utf-8").splitlines()
        for caption in json.loads(line)["captions"]
    ]
    assert len(captions) > 3500
    assert_java_agrees(captions, tmp_path)


def test_tokens_equal_javas_on_hard_captions(tmp_path: Path) -> None:
    lines = HARD_CAPTIONS.read_text(encoding="utf-8").rstrip("\n").split("\n")
    chunks = sorted({chunk for line in lines for chunk in line.split() if chunk != "No."})
    # "No." keeps its full stop before a number, and Java looks for one on the next line.
    assert_java_agrees(lines + chunks, tmp_path)


def test_tokens_equal_javas_on_shuffled_hard_captions(tmp_path: Path) -> None:
    words = sorted(set(HARD_CAPTIONS.read_text(encoding="utf-8").split()) - {"No.", "no."})
    plain = ["A", "the", "dog", "cat", "man", "in", "on", "Two", "red", "street", "and"]
    endings = ["", "", ",", ".", "!", "?", ";", ")"]
    generator = random.Random(42)
    captions = [
        " ".join(f"{generator.choice(plain)}{generator.choice(endings)} {generator.choice(words)}" for _ in range(5))
        for _ in range(2000)
    ]
    assert_java_agrees(captions, tmp_path)


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man can't ride it, he's late.", "a man ca n't ride it he 's late"),
        ("“It’s” (a) U.S. flag — $5…", "it 's -lrb- a -rrb- u.s. flag $ 5"),
        ("I cannot; I'm gonna.", "i can not i 'm gon na"),
        ("1,000 dogs at 3.5 m", "1,000 dogs at 3.5 m"),
        ("a\nb\u2028c\u00a0d", "a b c d"),
        ("What?! No!", "what ?! no"),
        ("", ""),
        (" ... - ' ", ""),
    ],
)
def test_tokens_without_java(caption: str, tokens: str) -> None:
    assert tokenize(caption) == tokens.split()


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_has_tokens_without_blanks(text: str) -> None:
    for token in tokenize(text):
        assert token
        assert " " not in token
        assert token == token.lower()


def test_scores_equal_the_recorded_ones(shared: Path) -> None:
    fixture = json.loads((shared / "metrics" / "photos15_fixture.json").read_text(encoding="utf-8"))
    predictions = {key: value[0] if isinstance(value, list) else value for key, value in fixture["hyps"].items()}
    scores = score(predictions, fixture["refs"])
    assert scores["bleu4"] == pytest.approx(0.100342, abs=1e-6)
    assert scores["rouge_l"] == pytest.approx(0.342664, abs=1e-6)
    assert scores["cider"] == pytest.approx(0.594329, abs=1e-6)


def test_scores_equal_upstreams_on_real_captions(shared: Path) -> None:
    lines = (shared / "flickr8k" / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    captions = [[tokenize(caption) for caption in json.loads(line)["captions"]] for line in lines]
    predictions = [item[0] for item in captions]
    for references in ([item[1:] for item in captions], [item[1:2] for item in captions]):
        statistics = caption_statistics(predictions, references)
        assert_equal_scores(scores_of(statistics), upstream_scores(predictions, references))


def test_scores_equal_upstreams_on_the_edges() -> None:
    predictions = [tokenize(BASELINE[key]) for key in REFERENCES]
    references = [[tokenize(caption) for caption in captions] for captions in REFERENCES.values()]
    scores = score(BASELINE, REFERENCES)
    assert scores["num_examples"] == len(REFERENCES)
    assert_equal_scores(scores, upstream_scores(predictions, references))


short_captions = st.lists(st.sampled_from(["a", "dog", "runs", "red", "4\u00a01/2"]), max_size=7)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(short_captions, st.lists(short_captions, min_size=1, max_size=4)), min_size=1, max_size=5
    ).filter(
        # Upstream's CIDEr stops on references without a single word.
        lambda items: any(any(captions) for _, captions in items)
    )
)
def test_scores_equal_upstreams_on_any_tokens(items: list[tuple[Tokens, list[Tokens]]]) -> None:
    predictions, references = [item[0] for item in items], [item[1] for item in items]
    statistics = caption_statistics(predictions, references)
    assert_equal_scores(scores_of(statistics), upstream_scores(predictions, references))


def test_nothing_but_empty_captions_has_a_score() -> None:
    scores = score({"x": ""}, {"x": [""]})
    assert scores["cider"] == 0.0
    assert scores["rouge_l"] == 1.0


def test_order_of_the_ids_does_not_matter() -> None:
    shuffled = dict(reversed(BASELINE.items()))
    assert score(shuffled, REFERENCES) == score(BASELINE, REFERENCES)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ({"a": "x"}, {"a": ["x"], "b": ["y"]}, "1 without a prediction ('b')"),
        ({"a": "x", "c": "y"}, {"a": ["x"]}, "1 predicted without references ('c')"),
        ({"a": "x"}, {"a": []}, "1 with an empty list of references ('a')"),
        ({}, {str(index): ["x"] for index in range(7)}, "7 without a prediction ('0', '1', '2', '3', '4', ...)"),
        ({}, {}, "nothing to score"),
    ],
)
def test_ids_that_do_not_match_are_named(
    predictions: dict[str, str], references: dict[str, list[str]], message: str
) -> None:
    with pytest.raises(UserError) as error:
        score(predictions, references)
    assert message in str(error.value)


def random_items(num_items: int, seed: int) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Predictions and four references of 11 words from a vocabulary of 3,375 with a natural skew."""
    letters = "bcdfghjklmnprst"
    vocabulary = np.array([f"{first}a{second}o{third}" for first in letters for second in letters for third in letters])
    generator = np.random.default_rng(seed)
    words = vocabulary[(len(vocabulary) * generator.random((num_items, 5, 11)) ** 3).astype(int)]
    captions = [[" ".join(caption) + "." for caption in item] for item in words.tolist()]
    return (
        {str(index): item[0] for index, item in enumerate(captions)},
        {str(index): item[1:] for index, item in enumerate(captions)},
    )


def test_a_resample_scores_as_the_items_it_holds() -> None:
    statistics = sufficient_statistics(BASELINE, REFERENCES)
    weights = np.array([[2.0, 0.0, 1.0, 1.0, 1.0]])
    kept = [0, 0, 2, 3, 4]
    keys = list(REFERENCES)
    predictions = [tokenize(BASELINE[keys[index]]) for index in kept]
    references = [[tokenize(caption) for caption in REFERENCES[keys[index]]] for index in kept]
    upstream = upstream_scores(predictions, references)
    resampled = corpus_scores(statistics, weights)
    for name in ("bleu1", "bleu2", "bleu3", "bleu4", "rouge_l"):
        assert resampled[name][0] == pytest.approx(upstream[name], abs=1e-9)
    # Its own document frequencies would give another CIDEr: those of the whole set stay.
    assert resampled["cider"][0] == pytest.approx(statistics.cider[kept].mean(), abs=1e-12)


def test_a_better_model_is_found_better() -> None:
    predictions, references = random_items(200, seed=0)
    better = {key: references[key][0] if int(key) % 2 else text for key, text in predictions.items()}
    comparison = compare(predictions, better, references, num_resamples=500)["bleu4"]
    difference = comparison["difference"]
    assert is_clear(difference)
    assert difference["low"] < difference["mean"] < difference["high"]
    assert difference["mean"] == pytest.approx(comparison["b"]["mean"] - comparison["a"]["mean"])
    assert difference["p_value"] == pytest.approx(2 / 501)
    assert describe_difference(comparison).startswith("+")


def test_no_difference_is_said_in_words() -> None:
    predictions, references = random_items(60, seed=1)
    comparison = compare(predictions, predictions, references, num_resamples=200)["cider"]
    assert comparison["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0}
    assert describe_difference(comparison).startswith("no clear difference: ")


def test_a_score_of_zero_has_no_relative_change() -> None:
    nothing = dict.fromkeys(REFERENCES, "")
    comparison = compare(nothing, FINETUNED, REFERENCES, num_resamples=50)["bleu1"]
    assert comparison["relative"] is None
    assert "%)" not in describe_difference(comparison)


def test_a_relative_change_follows_from_the_scores() -> None:
    predictions, references = random_items(100, seed=3)
    better = {key: references[key][0] if int(key) % 5 == 0 else text for key, text in predictions.items()}
    comparison = compare(predictions, better, references, num_resamples=300)["rouge_l"]
    relative = comparison["relative"]
    assert relative is not None
    assert relative["mean"] == pytest.approx(comparison["b"]["mean"] / comparison["a"]["mean"] - 1)
    assert 0 < relative["low"] < relative["mean"] < relative["high"]


def test_the_seed_decides_the_resamples() -> None:
    predictions, references = random_items(50, seed=4)
    other = {key: captions[0] for key, captions in references.items()}
    first = compare(predictions, other, references, num_resamples=100, seed=1)
    assert compare(predictions, other, references, num_resamples=100, seed=1) == first
    assert compare(predictions, other, references, num_resamples=100, seed=2) != first


def test_intervals_hold_the_true_value_about_as_often_as_they_say() -> None:
    """Of 300 sets of 80 items drawn from 4,000, 91 to 99% have an interval that holds the mean of the 4,000."""
    predictions, references = random_items(4000, seed=5)
    other = {key: captions[1] if int(key) % 3 else captions[0] for key, captions in references.items()}
    first, second = (sufficient_statistics(texts, references).rouge_l for texts in (predictions, other))
    truth = float(np.mean(second - first))
    generator = np.random.default_rng(6)
    held = 0
    for _ in range(300):
        chosen = generator.choice(4000, size=80, replace=False)
        differences = (second - first)[chosen]
        resampled = differences[generator.integers(80, size=(1000, 80))].mean(axis=1)
        low, high = np.percentile(resampled, [2.5, 97.5])
        held += low <= truth <= high
    assert 0.91 <= held / 300 <= 0.99


@pytest.mark.slow
def test_forty_thousand_items_take_less_than_twenty_seconds() -> None:
    predictions, references = random_items(40_000, seed=7)
    start = time.process_time()
    score(predictions, references)
    assert time.process_time() - start < 20


def test_a_thousand_resamples_of_a_thousand_items_take_less_than_five_seconds() -> None:
    predictions, references = random_items(1000, seed=8)
    other = {key: captions[0] for key, captions in references.items()}
    start = time.process_time()
    compare(predictions, other, references, num_resamples=1000)
    assert time.process_time() - start < 5
