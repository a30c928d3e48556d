"""From examples to what the trainer iterates over: rows that fit, answers beside their prompt, and their collator."""

from collections.abc import Iterator, Sequence

from datasets import Dataset

from qvl.active_run import Run
from qvl.collators import CompletionCollator
from qvl.data import separate_completions
from qvl.errors import UserError
from qvl.examples import joined_completions, undecoded_examples, with_lengths
from qvl.files import write_json_atomically
from qvl.models import load_config
from qvl.positions import positions_of
from qvl.shared_prefix import SharedPrefixCollator, segment_refusal
from qvl.survey import RowLength, describe_lengths, fit_rows, training_lengths
from qvl.token_lengths import summarize_lengths
from qvl.turns import truncate_turns

# Rows on a GPU are as long as a multiple of this: SDPA copies a mask whose rows are not aligned.
_LENGTH_MULTIPLE_TOKENS = 16


def prepare_training_rows(run: Run) -> tuple[Dataset, CompletionCollator | SharedPrefixCollator]:
    """Rows fitting `max_length` by the policy chosen, with a column `length` to group them by, and their collator.

    Answers to one prompt share a row where the model can train so and `--no_shared_prefix` is not given.

    Raises:
        UserError: rows that do not fit, or `--padding_free` with a model that cannot tell samples in a row apart.
    """
    recipe, training = run.settings.recipe, run.settings.training
    separate = separate_completions(run.for_model(run.data.train))
    lengths = training_lengths(separate, run.processing_class)
    print("\n".join(describe_lengths(lengths)), flush=True)
    if recipe.overlong == "truncate_turns" and training.max_length is not None:
        shortened = truncate_turns(separate, lengths, training.max_length, run.processing_class)
        separate, lengths = shortened.dataset, shortened.lengths
        if shortened.num_rows:
            counts = f"{shortened.num_answers} answers at the ends of {shortened.num_rows} conversations"
            print(f"--overlong truncate_turns: {counts} are beyond {training.max_length} tokens and left out.")
        run.record.log_metrics({"num_rows_shortened": shortened.num_rows, "num_answers_cut_off": shortened.num_answers})
    fitting = fit_rows(separate, lengths, training.max_length, recipe.overlong)
    num_dropped = len(separate) - len(fitting)
    if num_dropped:
        print(
            f"--overlong drop: {num_dropped} of {len(separate)} rows are longer than {training.max_length} tokens and "
            "left out."
        )
        lengths = [length for length in lengths if length.num_tokens <= training.max_length]
    run.record.log_metrics(
        {"num_overlong_rows_dropped": num_dropped, "num_bad_rows_skipped": run.data.summary.num_skipped}
    )
    write_json_atomically(run.folder / "token_lengths.json", summarize_lengths(lengths, training.max_length))
    truncate = recipe.overlong == "truncate_text"
    joined = joined_completions(fitting, recipe.captions_per_step) if recipe.shared_prefix else fitting
    if not _knows_segments(run, would_share=len(joined) < len(fitting)):
        rows = with_lengths(fitting, [length.num_tokens for length in lengths])
        return rows, CompletionCollator(run.processing_class, training.max_length, truncate)
    return with_lengths(joined, list(_joined_lengths(joined, lengths))), SharedPrefixCollator(
        run.processing_class,
        positions_of(load_config(run.settings)),
        training.max_length,
        truncate,
        padding_free=training.padding_free,
        pad_to_multiple_of=_LENGTH_MULTIPLE_TOKENS if run.device.type == "cuda" else 1,
    )


def _knows_segments(run: Run, would_share: bool) -> bool:
    """Whether the model can train on samples that share a row; says why not where that costs something.

    Raises:
        UserError: it cannot, and `--padding_free` asks for it.
    """
    refusal = segment_refusal(load_config(run.settings), run.settings.model.attn_implementation)
    if refusal is None:
        return True
    if run.settings.training.padding_free:
        raise UserError(f"--padding_free cannot be used here: {refusal}.")
    if would_share:
        print(f"Every answer is trained in a row of its own, which is slower: {refusal}.", flush=True)
    return False


def _joined_lengths(joined: Dataset, lengths: Sequence[RowLength]) -> Iterator[int]:
    """Tokens of each joined row: those of the first answer's, and each further answer with the copy it begins with."""
    remaining = iter(lengths)
    for row in undecoded_examples(joined):
        num_tokens = next(remaining).num_tokens
        for _ in row.get("completions", [None])[1:]:
            num_tokens += next(remaining).num_target_tokens + 1
        yield num_tokens
