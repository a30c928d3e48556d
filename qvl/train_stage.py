"""The stage train: rows that fit, an adapter where it belongs, proof of what moved, and what is saved."""

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.trainer_utils import IntervalStrategy
from trl import SFTConfig

from qvl import adapters, checks, run_folder
from qvl.active_run import Run
from qvl.answer_distributions import answer_distributions
from qvl.collators import CompletionCollator
from qvl.data import separate_completions
from qvl.encode import tokenizer_of
from qvl.errors import Terminated
from qvl.eval_generations import EvalGenerations
from qvl.examples import undecoded_examples
from qvl.features import require_frozen_vision
from qvl.files import write_json_atomically, write_jsonl_atomically
from qvl.shared_prefix import SharedPrefixCollator, marked_parts
from qvl.survey import fit_rows, training_lengths
from qvl.trainer import build_trainer, train
from qvl.training_checks import GradientWatch, check_base_kept
from qvl.training_form import lower_base_precision, training_form
from qvl.training_rows import prepare_training_rows
from qvl.turns import truncate_turns

_NUM_EXAMPLES_SHOWN = 3
_NUM_BATCHES_CHECKED = 4


def train_adapter(run: Run, resume_from: Path | None) -> None:
    """Trains an adapter, proves what it touched, and saves it.

    Raises:
        Terminated: SIGTERM came; a checkpoint was saved.
        UserError: bad settings or rows, or a check that failed.
    """
    rows, collator = prepare_training_rows(run)
    base = run.load_base()
    before_adapter = _distributions_of_first(run, base, rows)
    with training_form(run, base, collator):
        model = adapters.add_adapter(base, run.settings)
        report = adapters.report_parameters(model)
        print("\n".join(report.lines()), flush=True)
        adapters.require_adapter_in_language_model(report)
        if run.settings.recipe.cache_vision_features:
            require_frozen_vision(model)
        args = trainer_arguments(run)
        run_folder.require_space(run.folder, report.num_trainable, 2 + (args.save_total_limit or 2))
        _require_good_batches(run, rows, collator)
        lower_base_precision(run, model)

        generations = EvalGenerations(run, model, resume_from) if run.settings.recipe.eval_generations else None
        # Of the model as the trainer leaves it: it casts adapters.
        trainer = build_trainer(model, run.processing_class, rows, _held_out(run), args, collator, generations)
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        before = checks.hash_parameters(model)
        gradients = GradientWatch(model)
        trainer.add_callback(gradients)
        log = _TrainingLog(run, resume_from)
        result = train(trainer, log.add, resume_from, run.settings.recipe.early_stopping_patience)
    if result.terminated:
        print("SIGTERM: checkpoint saved; go on with --resume_from_checkpoint true.", flush=True)
        raise Terminated
    after = checks.hash_parameters(model)
    verdicts = [
        checks.check_placement(report),
        checks.check_frozen(before, after, trainable),
        checks.check_adapter_moved(before, after, trainable),
        *gradients.verdicts(),
    ]
    if run.base is not None:
        with model.disable_adapter():
            verdicts.append(check_base_kept(before_adapter, _distributions_of_first(run, model, rows)))
    save_adapter(run, model)
    run.put_metrics("train", {**result.summary, **_cost_of(generations, result.summary)})
    run_folder.update_checks(run.folder, [check.as_dict() for check in verdicts])
    model.unload()
    if not run.settings.recipe.keep_checkpoints:
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
    checks.require_passed(verdicts)
    print(f"{len(verdicts)} checks passed: adapter placed right and moved, frozen tensors unchanged.", flush=True)


def _distributions_of_first(run: Run, model: PreTrainedModel | PeftModel, rows: Dataset) -> list[torch.Tensor]:
    """What a model says along the answer of the first row, to be compared with what it says later."""
    row = separate_completions(rows.select([0]))[0]
    truncate = run.settings.recipe.overlong == "truncate_text"
    collator = CompletionCollator(run.processing_class, run.settings.training.max_length, truncate)
    return answer_distributions(model, [row], collator)


def save_adapter(run: Run, model: PeftModel) -> None:
    """Writes adapter/: weights, processor with template and pixel budget, what the base was. Whole or not at all."""
    final, beside = run.folder / "adapter", run.folder / ".adapter-in-writing"
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    run.processing_class.save_pretrained(beside)
    options = run.settings.model
    # The base may have been loaded from a folder of this machine; the adapter names what the user asked for.
    config = json.loads((beside / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": options.model_name_or_path, "revision": options.model_revision}
    write_json_atomically(beside / "adapter_config.json", config)
    write_json_atomically(
        beside / "trained_with.json",
        {
            "base_model_name_or_path": options.model_name_or_path,
            "revision": options.model_revision,
            "commit": getattr(model.get_base_model().config, "_commit_hash", None),
            "dtype": options.dtype,
            "load_in_4bit": options.load_in_4bit,
            "load_in_8bit": options.load_in_8bit,
            "base_precision": run.settings.recipe.base_precision,
            "bnb_4bit_quant_type": options.bnb_4bit_quant_type,
            "use_bnb_nested_quant": options.use_bnb_nested_quant,
            "attn_implementation": options.attn_implementation,
            "size": dict(getattr(getattr(run.processing_class, "image_processor", None), "size", None) or {}),
            "max_length": run.settings.training.max_length,
        },
    )
    shutil.rmtree(final, ignore_errors=True)
    beside.rename(final)


class _TrainingLog:
    """training_log.jsonl and MLflow, fed with the same numbers at every logging step."""

    def __init__(self, run: Run, resume_from: Path | None) -> None:
        self.run = run
        self.path = run.folder / "training_log.jsonl"
        self.rows = run_folder.rows_before_checkpoint(self.path, resume_from)

    def add(self, logs: dict[str, float], step: int) -> None:
        self.rows.append({"step": step, **logs})
        write_jsonl_atomically(self.path, self.rows)
        self.run.record.log_metrics(logs, step=step)


def _require_good_batches(run: Run, rows: Dataset, collator: CompletionCollator | SharedPrefixCollator) -> None:
    """Shows what is trained on and checks labels and placeholders of the first batches, before step 0."""
    shown = [
        {
            "id": row["id"],
            "where": row["where"],
            "image_names": row["image_names"],
            "segments": [
                {"text": part.text, "is_target": part.is_target} for part in marked_parts(row, run.processing_class)
            ],
        }
        for row in _first_of_different_images(rows)
    ]
    write_json_atomically(run.folder / "training_examples.json", shown)
    print("\n".join(_marked_lines(shown[0])), flush=True)

    size = run.settings.training.per_device_train_batch_size
    starts = range(0, min(len(rows), size * _NUM_BATCHES_CHECKED), size)
    batches = [collator([rows[i] for i in range(s, min(s + size, len(rows)))]) for s in starts]
    tokenizer = tokenizer_of(run.processing_class)
    image_id = getattr(run.processing_class, "image_token_id", None)
    forbidden = {"padding": tokenizer.pad_token_id} | ({"image": image_id} if image_id is not None else {})
    image_processor = getattr(run.processing_class, "image_processor", None)
    verdicts = [
        *checks.check_labels(batches, forbidden),
        checks.check_placeholders(batches[0], image_id, getattr(image_processor, "merge_size", 1)),
    ]
    run_folder.update_checks(run.folder, [check.as_dict() for check in verdicts])
    checks.require_passed(verdicts)


def _first_of_different_images(rows: Dataset) -> list[dict[str, Any]]:
    """The first rows, one of each image: five captions of one photo would show the same thing five times."""
    found: dict[Any, dict[str, Any]] = {}
    for row in undecoded_examples(rows):
        found.setdefault(tuple(row["image_names"]) or row["id"], row)
        if len(found) == _NUM_EXAMPLES_SHOWN:
            break
    return list(found.values())


def _marked_lines(example: dict[str, Any]) -> list[str]:
    text = "".join(f"[[{part['text']}]]" if part["is_target"] else part["text"] for part in example["segments"])
    return [f"First training example ({example['where']}), trained on what stands in [[ ]]:", *_indented(text)]


def _indented(text: str) -> list[str]:
    return [f"  | {line}" for line in text.split("\n")]


def trainer_arguments(run: Run) -> SFTConfig:
    """SFTConfig for the trainer: its folder is checkpoints/, and what qvl has done already is taken out.

    A shallow copy: `dataclasses.replace` would run __post_init__ on its own results.
    """
    training = run.settings.training
    arguments = copy.copy(training)
    changes: dict[str, Any] = {
        "output_dir": str(run.folder / "checkpoints"),
        "report_to": [name for name in training.report_to if name != "mlflow"],
        # Already applied: the model is loaded, the template is set, rows fit.
        "model_init_kwargs": None,
        "chat_template_path": None,
        "max_length": None,
        # The collator makes the labels, SFTTrainer would look for a template of its own.
        "assistant_only_loss": False,
        "completion_only_loss": None,
        # The collator packs, SFTTrainer would refuse it for images.
        "padding_free": False,
        # It does so for text-only models; the collator takes the rows as they are.
        "dataset_kwargs": {"skip_prepare_dataset": True},
        # A NaN that is logged as the average of what came before cannot be seen.
        "logging_nan_inf_filter": False,
        "resume_from_checkpoint": None,
    }
    for key, value in changes.items():
        setattr(arguments, key, value)
    return arguments


def _held_out(run: Run) -> Dataset | None:
    """Rows for the held-out loss during training, if it is asked for; those too long go the way of training rows."""
    training, recipe = run.settings.training, run.settings.recipe
    if training.eval_strategy == IntervalStrategy.NO and not training.eval_on_start:
        return None
    rows = separate_completions(run.for_model(run.data.evaluation))
    lengths = training_lengths(rows, run.processing_class)
    if recipe.overlong == "truncate_turns" and training.max_length is not None:
        return truncate_turns(rows, lengths, training.max_length, run.processing_class).dataset
    return fit_rows(rows, lengths, training.max_length, recipe.overlong)


def _cost_of(generations: EvalGenerations | None, summary: Mapping[str, Any]) -> dict[str, float]:
    """What the answers while training took: seconds, and their share of the training."""
    if generations is None:
        return {}
    seconds = generations.seconds
    return {"eval_generations_seconds": seconds, "eval_generations_share": seconds / summary["seconds"]}
