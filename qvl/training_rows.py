"""From examples to what the trainer iterates over: rows that fit, answers beside their prompt, and their collator."""

import dataclasses
import json
from collections.abc import Sequence

from datasets import Dataset
from transformers import PretrainedConfig

from qvl import unsloth_loader
from qvl.active_run import Run
from qvl.collators import CompletionCollator
from qvl.data import separate_completions
from qvl.errors import UserError
from qvl.examples import joined_completions, undecoded_examples, with_lengths
from qvl.files import write_json_atomically
from qvl.image_crop import describe_crop
from qvl.models import load_config
from qvl.packing import packed_rows
from qvl.positions import positions_of
from qvl.processes import is_main, num_processes
from qvl.settings import Settings
from qvl.shared_prefix import SharedPrefixCollator, segment_refusal
from qvl.survey import RowLength, describe_lengths, fit_rows, training_lengths
from qvl.token_lengths import summarize_lengths
from qvl.turns import truncate_turns

# Rows on a GPU are as long as a multiple of this: SDPA copies a mask whose rows are not aligned.
LENGTH_MULTIPLE_TOKENS = 16
# Optimizer steps below which a training is hardly one.
_FEW_STEPS = 10


def prepare_training_rows(run: Run) -> tuple[Dataset, CompletionCollator | SharedPrefixCollator]:
    """Rows fitting `max_length` by the policy chosen, with a column `length` to group them by, and their collator.

    Answers to one prompt share a row where the model can train so and `--no_shared_prefix` is not given.

    Raises:
        UserError: rows that do not fit, or `--padding_free` with a model that cannot tell samples in a row apart.
    """
    recipe, training = run.settings.recipe, run.settings.training
    separate = separate_completions(run.for_model(run.data.train))
    lengths = training_lengths(separate, run.processing_class)
    print("\n".join([*describe_lengths(lengths), *describe_crop(run.data.train, run.processing_class)]), flush=True)
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
    if is_main():
        summary = summarize_lengths(lengths, training.max_length)
        fingerprint = run.data.summary.train.fingerprint
        write_json_atomically(run.folder / "token_lengths.json", {**summary, "data_fingerprint": fingerprint})
    truncate = recipe.overlong == "truncate_text"
    joined = joined_completions(fitting, recipe.captions_per_step) if recipe.shared_prefix else fitting
    if not _knows_segments(run, would_share=len(joined) < len(fitting) or training.packing):
        rows = with_lengths(fitting, [length.num_tokens for length in lengths])
        return rows, CompletionCollator(run.processing_class, training.max_length, truncate)
    joined_tokens = [length.num_tokens for length in joined_lengths(joined, lengths)]
    return with_lengths(joined, joined_tokens), SharedPrefixCollator(
        run.processing_class,
        positions_of(load_config(run.settings)),
        training.max_length,
        truncate,
        padding_free=training.padding_free or training.packing,
        pad_to_multiple_of=LENGTH_MULTIPLE_TOKENS if run.device.type == "cuda" else 1,
    )


def require_rows_of_before(run: Run) -> None:
    """Stops a training that is resumed on other rows: it skips as many as were trained on, which would be others.

    Raises:
        UserError: the rows have changed.
    """
    path = run.folder / "token_lengths.json"
    before = json.loads(path.read_text(encoding="utf-8")).get("data_fingerprint") if path.is_file() else None
    if before not in (None, run.data.summary.train.fingerprint):
        raise UserError(
            f"The training rows of {run.data.summary.dataset_name} are not those that {run.folder} was trained on up "
            "to its checkpoint: others would be skipped than those that were. Put them back as they were, or train "
            "further in another folder: --adapter with the checkpoint."
        )


def packed_if_wanted(run: Run, rows: Dataset, collator: CompletionCollator | SharedPrefixCollator) -> Dataset:
    """What the trainer iterates over: the rows, or with `--packing` rows of several of them, up to `--max_length`.

    Where the model cannot train on samples that share a row, nothing is packed; `prepare_training_rows` has said so.

    Args:
        run: whose flags count.
        rows: from `prepare_training_rows`.
        collator: from there too.

    Raises:
        UserError: `--packing` without a length to fill rows up to.
    """
    training = run.settings.training
    if not training.packing or not isinstance(collator, SharedPrefixCollator):
        return rows
    if training.max_length is None:
        raise UserError("--packing fills rows up to --max_length, which is none: give it, or leave --packing out.")
    packed = packed_rows(rows, training.max_length)
    num_tokens = sum(packed.with_format(None)["length"])
    num_per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * num_processes()
    steps = [-(-len(dataset) // num_per_step) for dataset in (packed, rows)]
    print(
        f"--packing: {len(rows)} rows in {len(packed)} of up to {training.max_length} tokens, which are "
        f"{num_tokens / (len(packed) * training.max_length):.0%} full; an epoch has {steps[0]} optimizer steps of "
        f"{num_per_step} of them, in place of {steps[1]}.",
        flush=True,
    )
    if training.max_steps <= 0 and steps[0] * training.num_train_epochs < _FEW_STEPS:
        print(
            "That is little to learn in: lower --gradient_accumulation_steps, or train longer or with --packing false.",
            flush=True,
        )
    return packed


def row_sharing_refusal(settings: Settings, config: PretrainedConfig) -> str | None:
    """Why samples cannot share a row in training; None where they can.

    Args:
        settings: of the run.
        config: of its model.
    """
    if unsloth_loader.is_chosen(settings):
        return unsloth_loader.NO_SEGMENTS
    return segment_refusal(config, settings.model.attn_implementation)


def _knows_segments(run: Run, would_share: bool) -> bool:
    """Whether the model can train on samples that share a row; says why not where that costs something.

    Raises:
        UserError: it cannot, and `--padding_free` asks for it.
    """
    refusal = row_sharing_refusal(run.settings, load_config(run.settings))
    if refusal is None:
        return True
    if run.settings.training.padding_free:
        raise UserError(f"--padding_free cannot be used here: {refusal}.")
    if would_share:
        print(f"Every answer is trained in a row of its own, which is slower: {refusal}.", flush=True)
    return False


def joined_lengths(joined: Dataset, lengths: Sequence[RowLength]) -> list[RowLength]:
    """Lengths of joined rows: that of the first answer's, and of each further answer with the copy it begins with.

    Args:
        joined: rows from `joined_completions`.
        lengths: of the separate rows they were made of.
    """
    remaining = iter(lengths)
    result = []
    for row in undecoded_examples(joined):
        first = next(remaining)
        further = [next(remaining).num_target_tokens for _ in row.get("completions", [None])[1:]]
        num_tokens = first.num_tokens + sum(further) + len(further)
        num_targets = first.num_target_tokens + sum(further)
        result.append(dataclasses.replace(first, num_tokens=num_tokens, num_target_tokens=num_targets))
    return result
