"""The histogram of row lengths counts every row once, whatever the lengths."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from qvl.survey import RowLength
from qvl.token_lengths import length_histogram, summarize_lengths

ROWS = st.lists(
    st.integers(1, 100_000).flatmap(lambda tokens: st.tuples(st.just(tokens), st.integers(1, tokens))), min_size=1
)


@settings(max_examples=40, deadline=None)
@given(ROWS)
def test_every_row_is_in_one_bin(rows: list[tuple[int, int]]) -> None:
    lengths = [RowLength("row", tokens, 0, targets, 1) for tokens, targets in rows]
    summary = summarize_lengths(lengths, 2048)
    bins = summary["bins"]
    assert sum(row["count"] for row in bins) == summary["num_rows"] == len(rows)
    assert len(bins) <= 25
    assert bins[0]["count"] > 0 and bins[-1]["count"] > 0
    for row in bins:
        assert row["count"] == sum(row["from"] <= tokens < row["to"] for tokens, _ in rows)
    assert summary["num_tokens"] == sum(tokens for tokens, _ in rows)
    assert 0 < summary["trained_share"] == sum(targets for _, targets in rows) / summary["num_tokens"] <= 1
    heights = [float(height) for height in re.findall(r'<rect [^>]* height="([\d.]+)"', length_histogram(summary))]
    assert len(heights) == len(bins)
    assert max(heights) == heights[[row["count"] for row in bins].index(max(row["count"] for row in bins))]


def test_the_histogram_says_what_it_shows() -> None:
    lengths = [RowLength("row", tokens, 0, 10, 1) for tokens in (20, 20, 60)]
    plot = length_histogram(summarize_lengths(lengths, None))
    assert 'aria-label="3 training rows of 20 to 61 tokens, 30.0% of the tokens trained on"' in plot
    assert "<title>20 to 21 tokens: 2 rows</title>" in plot
