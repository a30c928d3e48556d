"""Scores of single answers that need no corpus: exact match, ANLS, character error rate, and a recipe's own.

No library is needed for the edit distance: with a row of the usual table as the bits of one integer it takes 15 lines,
and 40,000 answers with four references a few seconds.
"""

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_ANLS_THRESHOLD = 0.5

TextScoreFunction = Callable[[str, Sequence[str]], float | tuple[float, float]]


@dataclass(frozen=True)
class TextScore:
    """A score that is defined by single answers.

    Attributes:
        function: takes an answer and its references, gives the answer's value; the score of a set is their mean. Or it
            gives (numerator, denominator), and the score of a set is the ratio of their sums, as an error rate is.
        label: the name that tables show.
        higher_is_better: False for errors.
    """

    function: TextScoreFunction
    label: str
    higher_is_better: bool = True


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the answer is one of the references, white space around it left out; case counts."""
    return float(_plain(prediction) in map(_plain, references))


def anls(prediction: str, references: Sequence[str]) -> float:
    """Normalized Levenshtein similarity to the nearest reference, 0 below one half; case does not count.

    Its mean over a set is ANLS of Biten et al., "Scene Text Visual Question Answering" (ICCV 2019), equation 1, with
    their threshold 0.5: s = 1 - d / max(length) if d / max(length) < 0.5, else 0, the best over the references.
    """
    answer = _plain(prediction).lower()
    return max(_similarity(answer, _plain(reference).lower()) for reference in references)


def character_errors(prediction: str, references: Sequence[str]) -> tuple[float, float]:
    """Edits to the nearest reference (least per character), and the length of that reference in characters.

    The ratio of their sums over a set is the character error rate; with one reference each it is the usual one
    (substitutions, deletions and insertions by the characters of the reference; may pass 1).
    """
    answer = _plain(prediction)
    pairs = [(edit_distance(answer, text), len(text)) for text in map(_plain, references)]
    edits, length = min(pairs, key=lambda pair: pair[0] / max(pair[1], 1))
    return float(edits), float(length)


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance in code points (Hyyrö 2003, after Myers 1999: a column of the table in one integer)."""
    if not second:
        return len(first)
    places: dict[str, int] = {}
    for place, character in enumerate(second):
        places[character] = places.get(character, 0) | 1 << place
    full, last = (1 << len(second)) - 1, 1 << (len(second) - 1)
    more, less, distance = full, 0, len(second)
    for character in first:
        matches = places.get(character, 0) | less
        diagonal = (((matches & more) + more) ^ more) | matches
        wider, narrower = less | ~(diagonal | more) & full, more & diagonal
        distance += bool(wider & last) - bool(narrower & last)
        wider = (wider << 1 | 1) & full
        narrower = (narrower << 1) & full
        more, less = narrower | ~(diagonal | wider) & full, wider & diagonal
    return distance


TEXT_SCORES = {
    "exact_match": TextScore(exact_match, "exact match"),
    "anls": TextScore(anls, "ANLS"),
    "cer": TextScore(character_errors, "character error rate", higher_is_better=False),
}


def _plain(text: str) -> str:
    """The same letters are the same code points, and white space at the ends does not count."""
    return unicodedata.normalize("NFC", text).strip()


def _similarity(first: str, second: str) -> float:
    longest = max(len(first), len(second))
    distance = edit_distance(first, second) / longest if longest else 0.0
    return 1 - distance if distance < _ANLS_THRESHOLD else 0.0
