"""Scores of single answers against the formulas they are named after."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl.metrics import score
from qvl.text_scores import anls, character_errors, edit_distance, exact_match


def table_distance(first: str, second: str) -> int:
    """Levenshtein's recurrence, as in any textbook."""
    row = list(range(len(second) + 1))
    for number, a in enumerate(first, start=1):
        previous, row = row, [number]
        for place, b in enumerate(second, start=1):
            row.append(min(previous[place] + 1, row[-1] + 1, previous[place - 1] + (a != b)))
    return row[-1]


texts = st.text(alphabet="abcé日🐕 ", max_size=80)


@settings(max_examples=400, deadline=None)
@given(texts, texts)
def test_the_edit_distance_is_levenshteins(first: str, second: str) -> None:
    assert edit_distance(first, second) == table_distance(first, second)


@pytest.mark.parametrize(
    ("prediction", "references", "value"),
    [
        ("12.40", ["12.40"], 1.0),
        (" 12.40\n", ["no", "12.40"], 1.0),
        ("Dog", ["dog"], 0.0),
        ("caf\u0065\u0301", ["caf\u00e9"], 1.0),
        ("", ["x"], 0.0),
        ("", [""], 1.0),
    ],
)
def test_exact_match(prediction: str, references: list[str], value: float) -> None:
    assert exact_match(prediction, references) == value


@pytest.mark.parametrize(
    ("prediction", "references", "value"),
    [
        ("Coca Cola", ["coca cola"], 1.0),
        ("coca colo", ["pepsi", "coca cola"], 1 - 1 / 9),
        # 2 of 4 letters: a normalized distance of 0.5 is no longer below the threshold.
        ("abcd", ["abxy"], 0.0),
        ("abcde", ["abcxy"], 1 - 2 / 5),
        ("", ["x"], 0.0),
        ("", [""], 1.0),
    ],
)
def test_anls_is_that_of_st_vqa(prediction: str, references: list[str], value: float) -> None:
    assert anls(prediction, references) == pytest.approx(value)


def test_character_errors_are_those_of_the_nearest_reference() -> None:
    assert character_errors("kitten", ["sitting"]) == (3.0, 7.0)
    assert character_errors("kitten", ["completely else", "mitten"]) == (1.0, 6.0)
    assert character_errors("", ["abc"]) == (3.0, 3.0)
    assert character_errors("ab", [""]) == (2.0, 0.0)


def test_the_character_error_rate_is_a_ratio_of_sums() -> None:
    predictions, references = {"a": "kitten", "b": "a longer answer"}, {"a": ["sitting"], "b": ["a longer answer"]}
    assert score(predictions, references, ["cer"])["cer"] == pytest.approx(3 / (7 + 15))
    assert score(predictions, references, ["exact_match", "anls"]) == pytest.approx(
        {"exact_match": 0.5, "anls": (4 / 7 + 1) / 2}
    )


@pytest.mark.parametrize("name", ["anls", "cer", "exact_match"])
def test_forty_thousand_answers_take_less_than_twenty_seconds(name: str) -> None:
    """A tenth of them, in a tenth of the time: answers are scored one by one."""
    predictions = {str(index): f"a brown dog number {index} runs through the park" for index in range(4_000)}
    references = {
        key: [f"one dog runs in park {key}", text[::-1], "two cats", text] for key, text in predictions.items()
    }
    start = time.process_time()
    assert score(predictions, references, [name])[name] == (0.0 if name == "cer" else 1.0)
    assert time.process_time() - start < 2
