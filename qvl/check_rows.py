"""Which rows the stage check compares, and which it learns by heart."""

from typing import Any

from datasets import Dataset

from qvl.active_run import Run
from qvl.data import separate_completions
from qvl.errors import UserError
from qvl.examples import undecoded_examples
from qvl.survey import fit_rows, training_lengths

_NUM_COMPARED = 32
_NUM_LEARNED = 8


def rows_to_compare(run: Run) -> list[dict[str, Any]]:
    """Evaluation rows of different images, one image each; where rows have none, the first rows without.

    Raises:
        UserError: fewer than two.
    """
    dataset = separate_completions(run.in_words(run.data.evaluation))
    with_image: dict[str, int] = {}
    without: list[int] = []
    for index, row in enumerate(undecoded_examples(dataset)):
        if len(row["image_names"]) == 1:
            with_image.setdefault(row["image_names"][0], index)
        elif not row["image_names"]:
            without.append(index)
    chosen = list(with_image.values()) if len(with_image) > 1 else without
    if len(chosen) < 2:
        raise UserError(
            "The stage check compares rows: it needs two evaluation rows of different images with one image each, or "
            f"two rows without images; there are {len(with_image)} and {len(without)}. Raise --num_eval_examples."
        )
    return [dataset[index] for index in chosen[:_NUM_COMPARED]]


def rows_to_learn(run: Run) -> Dataset:
    """The first training rows that fit, one answer to each prompt: different answers cannot all be known by heart."""
    separate = separate_completions(run.in_words(run.data.train))
    separate = separate.select(range(min(len(separate), 16 * _NUM_LEARNED)))
    lengths = training_lengths(separate, run.processing_class)
    fitting = fit_rows(separate, lengths, run.settings.training.max_length, "drop")
    first: dict[Any, int] = {}
    for index, row in enumerate(undecoded_examples(fitting)):
        first.setdefault(tuple(row["image_names"]) or row["id"], index)
    return fitting.select(list(first.values())[:_NUM_LEARNED])
