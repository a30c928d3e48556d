"""What BLEU, ROUGE-L and CIDEr-D need to know of each captioned item, computed for a whole set at once.

The scorers of PyPI's `pycocoevalcap` 1.2 are the reference, oddities included; here n-grams are integers in sorted
arrays instead of tuples in dictionaries, which is what makes 40,000 items take seconds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

MAX_ORDER = 4

# coco-caption's constants.
_ROUGE_BETA = 1.2
_CIDER_SIGMA = 6.0
_CIDER_SCALE = 10.0

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Tokens = Sequence[str]


@dataclass(frozen=True)
class CaptionStatistics:
    """The numbers of N items that every corpus score is a function of sums of.

    Attributes:
        correct: [N, 4] float64, the prediction's n-grams found in a reference (clipped counts), n = 1..4.
        guessed: [N, 4] float64, all n-grams of the prediction.
        prediction_tokens: [N] float64, length of the prediction.
        reference_tokens: [N] float64, length of the reference whose length is closest (of two, the shorter).
        rouge_l: [N] float64, ROUGE-L of the item.
        cider: [N] float64, CIDEr-D of the item under the document frequencies of the whole set.
    """

    correct: Floats
    guessed: Floats
    prediction_tokens: Floats
    reference_tokens: Floats
    rouge_l: Floats
    cider: Floats

    @property
    def num_examples(self) -> int:
        """The number of items, N."""
        return len(self.rouge_l)


@dataclass(frozen=True)
class _Captions:
    """All captions as one row of token ids: the N predictions first, then item by item their R references.

    Attributes:
        token_ids: [T] int64.
        lengths: [N + R] int64, tokens of each caption.
        item_of_reference: [R] int64.
        num_references: [N] int64.
    """

    token_ids: Ints
    lengths: Ints
    item_of_reference: Ints
    num_references: Ints

    @property
    def num_items(self) -> int:
        return len(self.num_references)


@dataclass(frozen=True)
class _NgramCounts:
    """How often each n-gram of one order occurs in each caption; rows are sorted by caption.

    Attributes:
        captions: [E] int64.
        ngrams: [E] int64, below `num_ngrams`.
        counts: [E] int64.
        num_ngrams: how many different n-grams there are.
    """

    captions: Ints
    ngrams: Ints
    counts: Ints
    num_ngrams: int

    def where(self, chosen: slice) -> "_NgramCounts":
        """The rows in `chosen`."""
        return _NgramCounts(self.captions[chosen], self.ngrams[chosen], self.counts[chosen], self.num_ngrams)


def caption_statistics(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> CaptionStatistics:
    """Computes the statistics of N items.

    Args:
        predictions: N tokenized captions; a caption may be empty.
        references: for each item at least one tokenized caption.
    """
    captions = _encode(predictions, references)
    num_items = captions.num_items
    prediction_lengths, reference_lengths = np.split(captions.lengths, [num_items])
    correct = np.zeros((num_items, MAX_ORDER))
    cosines = np.zeros(len(reference_lengths))
    for order, counts in enumerate(_ngram_counts(captions)):
        num_prediction_rows = int(np.searchsorted(counts.captions, num_items))
        predicted = counts.where(slice(num_prediction_rows))
        referenced = counts.where(slice(num_prediction_rows, None))
        correct[:, order], order_cosines = _compare_ngrams(predicted, referenced, captions)
        cosines += order_cosines
    similarities = cosines * _length_penalty(prediction_lengths[captions.item_of_reference], reference_lengths)
    cider = np.bincount(captions.item_of_reference, similarities, minlength=num_items)
    return CaptionStatistics(
        correct=correct,
        guessed=np.maximum(prediction_lengths[:, None] - np.arange(MAX_ORDER), 0).astype(np.float64),
        prediction_tokens=prediction_lengths.astype(np.float64),
        reference_tokens=_closest_lengths(prediction_lengths, reference_lengths, captions),
        rouge_l=np.array([_rouge_l(*item) for item in zip(predictions, references, strict=True)]),
        cider=_CIDER_SCALE * cider / MAX_ORDER / captions.num_references,
    )


def _encode(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> _Captions:
    ids: dict[str, int] = {}
    # The scorers get a caption as one string and split it at any white space for n-grams: the no-break space that
    # the Penn tokenizer writes into "4 1/2" is one, so that such a token counts as two here (but not in ROUGE-L).
    captions = [" ".join(tokens).split() for tokens in chain(predictions, chain.from_iterable(references))]
    token_ids = [ids.setdefault(token, len(ids)) for token in chain.from_iterable(captions)]
    num_references = np.array([len(item) for item in references], dtype=np.int64)
    return _Captions(
        token_ids=np.array(token_ids, dtype=np.int64),
        lengths=np.array([len(tokens) for tokens in captions], dtype=np.int64),
        item_of_reference=np.repeat(np.arange(len(num_references)), num_references),
        num_references=num_references,
    )


def _ngram_counts(captions: _Captions) -> Iterator[_NgramCounts]:
    """The counts of order 1, 2, ... `MAX_ORDER`."""
    caption_of_token = np.repeat(np.arange(len(captions.lengths)), captions.lengths)
    ends = np.cumsum(captions.lengths)
    num_tokens = len(captions.token_ids)
    starts = np.arange(num_tokens)
    tokens_left = ends[caption_of_token] - starts
    num_words = int(captions.token_ids.max(initial=0)) + 1
    ngrams = np.zeros(num_tokens, dtype=np.int64)
    for order in range(MAX_ORDER):
        # An n-gram is the (n-1)-gram at the same place plus one word; renumbering keeps the product below 2**63.
        fits = tokens_left[starts] > order
        starts, ngrams = starts[fits], ngrams[fits]
        distinct, ngrams = np.unique(ngrams * num_words + captions.token_ids[starts + order], return_inverse=True)
        num_ngrams = max(1, len(distinct))
        rows, counts = np.unique(caption_of_token[starts] * num_ngrams + ngrams, return_counts=True)
        yield _NgramCounts(rows // num_ngrams, rows % num_ngrams, counts, num_ngrams)


def _compare_ngrams(predicted: _NgramCounts, referenced: _NgramCounts, captions: _Captions) -> tuple[Floats, Floats]:
    """BLEU's clipped matches [N] and CIDEr-D's clipped cosines [R], of one order."""
    items = captions.item_of_reference[referenced.captions - captions.num_items]
    referenced_keys = items * referenced.num_ngrams + referenced.ngrams
    predicted_keys = predicted.captions * predicted.num_ngrams + predicted.ngrams
    rows = np.searchsorted(predicted_keys, referenced_keys)
    # A sentinel behind the last key: searchsorted points there for keys larger than all.
    in_references = np.append(predicted_keys, -1)[rows] == referenced_keys
    rows = rows[in_references]

    most = np.zeros(len(predicted_keys), dtype=np.int64)
    np.maximum.at(most, rows, referenced.counts[in_references])
    matches = np.minimum(predicted.counts, most)

    weights = _inverse_document_frequencies(referenced_keys, referenced.num_ngrams, captions.num_items)
    predicted_weights = predicted.counts * weights[predicted.ngrams]
    referenced_weights = referenced.counts * weights[referenced.ngrams]
    prediction_norms = np.sqrt(np.bincount(predicted.captions, predicted_weights**2, minlength=captions.num_items))
    reference_rows = referenced.captions - captions.num_items
    num_references = len(captions.item_of_reference)
    reference_norms = np.sqrt(np.bincount(reference_rows, referenced_weights**2, minlength=num_references))
    shared_weights = referenced_weights[in_references]
    products = np.minimum(predicted_weights[rows], shared_weights) * shared_weights
    # Of int64 when nothing is shared at all: bincount of an empty array ignores the type of its weights.
    cosines = np.bincount(reference_rows[in_references], products, minlength=num_references).astype(np.float64)
    norms = prediction_norms[captions.item_of_reference] * reference_norms
    np.divide(cosines, norms, out=cosines, where=norms > 0)
    return np.bincount(predicted.captions, matches, minlength=captions.num_items).astype(np.float64), cosines


def _inverse_document_frequencies(referenced_keys: Ints, num_ngrams: int, num_items: int) -> Floats:
    """[num_ngrams] log(N / items whose references hold the n-gram); an n-gram of predictions only counts as in one."""
    # Not np.unique: without counts it hashes, which takes four times as long on keys that repeat this little.
    keys = np.sort(referenced_keys)
    is_first = np.diff(keys, prepend=-1) != 0
    frequencies = np.bincount(keys[is_first] % num_ngrams, minlength=num_ngrams)
    return np.asarray(np.log(num_items) - np.log(np.maximum(frequencies, 1)))


def _length_penalty(predicted_tokens: Ints, reference_tokens: Ints) -> Floats:
    """CIDEr-D's Gaussian of the difference in length; coco-caption counts bigrams where the paper says words."""
    difference = np.maximum(predicted_tokens - 1, 0) - np.maximum(reference_tokens - 1, 0)
    return np.asarray(np.exp(-(difference.astype(np.float64) ** 2) / (2 * _CIDER_SIGMA**2)))


def _closest_lengths(prediction_lengths: Ints, reference_lengths: Ints, captions: _Captions) -> Floats:
    distances = np.abs(reference_lengths - prediction_lengths[captions.item_of_reference])
    # One integer to minimise: the distance, then the length.
    base = int(reference_lengths.max()) + 1
    first_references = np.cumsum(captions.num_references) - captions.num_references
    closest: Ints = np.minimum.reduceat(distances * base + reference_lengths, first_references) % base
    return closest.astype(np.float64)


def _rouge_l(prediction: Tokens, references: Sequence[Tokens]) -> float:
    """ROUGE-L (Lin 2004, beta 1.2) of the best recall and the best precision, be they of different references."""
    # The scorer's `"".split(" ")` is one empty word: an empty prediction equals an empty reference.
    prediction = prediction or [""]
    precision = recall = 0.0
    for reference in references:
        reference = reference or [""]
        common = _longest_common_subsequence(prediction, reference)
        precision = max(precision, common / len(prediction))
        recall = max(recall, common / len(reference))
    if precision == 0:
        return 0.0
    return (1 + _ROUGE_BETA**2) * precision * recall / (recall + _ROUGE_BETA**2 * precision)


def _longest_common_subsequence(first: Tokens, second: Tokens) -> int:
    """Its length, a row of the usual table at a time as the bits of one integer (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for place, token in enumerate(second):
        places[token] = places.get(token, 0) | 1 << place
    full = (1 << len(second)) - 1
    unmatched = full
    for token in first:
        if token in places:
            hits = unmatched & places[token]
            unmatched = (unmatched + hits | unmatched - hits) & full
    return len(second) - unmatched.bit_count()
