"""Caption scores against coco-caption's own scorers and tokenizer."""

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
from captions import random_items
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer

from qvl.caption_statistics import caption_statistics
from qvl.errors import UserError
from qvl.metrics import CAPTION_SCORES, caption_scores, choose_scores, loss_statistics, score, score_statistics
from qvl.ptb import tokenize
from qvl.text_scores import TextScore

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


def scores_of_tokens(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> dict[str, float]:
    found = caption_scores(caption_statistics(predictions, references))
    return {name: statistics.value for name, statistics in found.items()}


def assert_equal_scores(ours: dict[str, float], upstream: dict[str, float]) -> None:
    for name in CAPTION_SCORES:
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
        assert_equal_scores(scores_of_tokens(predictions, references), upstream_scores(predictions, references))


def test_scores_equal_upstreams_on_the_edges() -> None:
    predictions = [tokenize(BASELINE[key]) for key in REFERENCES]
    references = [[tokenize(caption) for caption in captions] for captions in REFERENCES.values()]
    scores = score(BASELINE, REFERENCES)
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
    assert_equal_scores(scores_of_tokens(predictions, references), upstream_scores(predictions, references))


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


def test_scores_against_the_first_reference_stand_beside_those_against_all() -> None:
    found = score_statistics(FINETUNED, REFERENCES, ["bleu4", "anls", "cider"], with_first_reference=True)
    assert list(found) == ["bleu4", "anls", "cider", "bleu4_first_reference", "cider_first_reference"]
    first = score(FINETUNED, {key: texts[:1] for key, texts in REFERENCES.items()}, ["bleu4", "cider"])
    for name, value in first.items():
        assert found[f"{name}_first_reference"].value == value
    assert found["cider_first_reference"].value != found["cider"].value
    single = {key: texts[:1] for key, texts in REFERENCES.items()}
    assert list(score_statistics(FINETUNED, single, ["bleu4"], with_first_reference=True)) == ["bleu4"]


def test_every_score_takes_empty_answers_unicode_one_and_ten_references() -> None:
    names = [*CAPTION_SCORES, "exact_match", "anls", "cer"]
    for predictions in (BASELINE, FINETUNED, dict.fromkeys(REFERENCES, "")):
        scores = score(predictions, REFERENCES, names)
        assert list(scores) == names
        assert all(math.isfinite(value) and value >= 0 for value in scores.values())


def test_a_recipes_own_score_is_a_mean_or_a_ratio_of_sums() -> None:
    own = {
        "long": TextScore(lambda prediction, references: float(len(prediction) > 10), "long answers"),
        "spread": TextScore(lambda prediction, references: (len(prediction), len(references)), "letters per reference"),
    }
    texts, references = {"a": "short", "b": "long enough"}, {"a": ["x"], "b": ["x", "y", "z"]}
    assert score(texts, references, ["spread", "long"], own) == {"spread": 16 / 4, "long": 0.5}


@pytest.mark.parametrize(("value", "message"), [(math.nan, "gives nan for 'a'"), ("good", "gives 'good' for 'a'")])
def test_a_recipes_own_score_that_is_no_number_is_named(value: object, message: str) -> None:
    own = {"mine": TextScore(lambda prediction, references: value, "mine")}  # type: ignore[arg-type,return-value]
    with pytest.raises(UserError, match=message):
        score({"a": "x"}, {"a": ["x"]}, ["mine"], own)


def test_a_recipes_own_score_that_fails_is_named_with_its_answer() -> None:
    own = {"mean length": TextScore(lambda prediction, references: 1 / len(prediction), "mine")}
    with pytest.raises(UserError, match=r"`mean length` fails for 'b', answer '': ZeroDivisionError: division by zero"):
        score({"a": "x", "b": ""}, {"a": ["x"], "b": ["y"]}, ["mean length"], own)


def test_a_recipes_own_score_may_be_numpys() -> None:
    own = {"same": TextScore(lambda prediction, references: np.bool_(prediction == "x"), "same")}
    assert score({"a": "x", "b": ""}, {"a": ["x"], "b": ["y"]}, ["same"], own) == {"same": 0.5}


def test_unknown_scores_name_the_nearest_one() -> None:
    own = {"brevity": TextScore(lambda prediction, references: 1.0, "brevity")}
    assert choose_scores(["brevity", "bleu4", "brevity"], own) == ["brevity", "bleu4"]
    with pytest.raises(UserError, match=r"--scores blue4 is no score\. Did you mean `bleu4`\?"):
        choose_scores(["blue4"], own)
    with pytest.raises(UserError, match=r"Did you mean `brevity`\?"):
        choose_scores(["brevty"], own)
    with pytest.raises(UserError, match="rename it"):
        choose_scores(["cer"], {"cer": own["brevity"]})


def test_loss_and_perplexity_weigh_tokens_and_not_answers() -> None:
    found = loss_statistics([3.0, 1.0], [1, 7])
    assert found["loss"].value == pytest.approx(4 / 8)
    assert found["perplexity"].value == pytest.approx(math.exp(0.5))
    assert not found["loss"].higher_is_better


@pytest.mark.slow
def test_forty_thousand_items_take_less_than_twenty_seconds() -> None:
    predictions, references = random_items(40_000, seed=7)
    start = time.process_time()
    score(predictions, references)
    assert time.process_time() - start < 20
