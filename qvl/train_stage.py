"""The stage train: rows that fit, an adapter where it belongs, proof of what moved, and what is saved."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.trainer_utils import IntervalStrategy
from trl import SFTConfig

from qvl import adapters, checks, run_folder, unsloth_loader
from qvl.active_run import Run
from qvl.adapter_checks import check_lora_placement
from qvl.adapter_origin import TRAINED_WITH, origin
from qvl.answer_distributions import answer_distributions
from qvl.checks import Check
from qvl.clip_llm import composition_record, is_composed
from qvl.collators import CompletionCollator
from qvl.data import separate_completions
from qvl.encode import tokenizer_of
from qvl.errors import Terminated, UserError
from qvl.eval_generations import EvalGenerations
from qvl.examples import undecoded_examples
from qvl.features import require_frozen_vision
from qvl.files import write_json_atomically, write_jsonl_atomically
from qvl.models import load_config
from qvl.processes import gathered, is_main, num_processes, on_main
from qvl.sharding import Sharding, load_whole_models, sharding, trained_weights
from qvl.shared_prefix import SharedPrefixCollator, marked_parts
from qvl.survey import fit_rows, training_lengths
from qvl.trained_parts import TrainedPart, names_of_trained_parts, round_to_base, take_off, trained_parts
from qvl.trainer import build_trainer, train
from qvl.training_checks import GradientWatch, check_base_kept
from qvl.training_form import checkpointing_arguments, lower_base_precision, ready_for_compiling, training_form
from qvl.training_phases import phase_switches
from qvl.training_rows import packed_if_wanted, prepare_training_rows, require_rows_of_before
from qvl.turns import truncate_turns

_NUM_EXAMPLES_SHOWN = 3
_NUM_BATCHES_CHECKED = 4


def train_adapter(run: Run, resume_from: Path | None) -> None:
    """Trains an adapter, proves what it touched, and saves it.

    Raises:
        Terminated: SIGTERM came; a checkpoint was saved.
        UserError: bad settings or rows, or a check that failed.
    """
    try:
        _train_adapter(run, resume_from)
    finally:
        load_whole_models()


def _train_adapter(run: Run, resume_from: Path | None) -> None:
    _require_images_for_parts(run)
    if resume_from is not None:
        on_main(lambda: require_rows_of_before(run))
    rows, collator = prepare_training_rows(run)
    trained_rows = packed_if_wanted(run, rows, collator)
    _say_what_comes_twice(run, len(trained_rows))
    kind = sharding()
    base = run.load_base_to_train()
    before_adapter = _distributions_of_first(run, base, rows) if run.base is not None else []
    parts = trained_parts(base, run.settings)
    with training_form(run, base, collator):
        model = adapters.add_adapter(base, run.settings)
        report = adapters.report_parameters(model, parts)
        print("\n".join(report.lines()), flush=True)
        adapters.require_adapter_in_language_model(report)
        placement = lora_placement(run, model, parts)
        checks.require_passed(placement)
        phases = phase_switches(run.settings, model, parts)
        if run.settings.recipe.cache_vision_features:
            require_frozen_vision(model)
        args = trainer_arguments(run)
        run_folder.require_space(run.folder, report.num_trainable, 2 + (args.save_total_limit or 2))
        _require_good_batches(run, rows, collator)
        lower_base_precision(run, model)
        ready_for_compiling(run, model)

        generations = EvalGenerations(run, model, resume_from) if run.settings.recipe.eval_generations else None
        # Of the model as the trainer leaves it: it casts adapters.
        trainer = build_trainer(
            model, run.processing_class, trained_rows, _held_out(run), args, collator, generations, parts
        )
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        before = checks.hash_parameters(model)
        gradients = GradientWatch(model)
        if kind is Sharding.NOTHING:
            # Elsewhere a process has a piece of each gradient, or none any more when callbacks look.
            trainer.add_callback(gradients)
        for callback in (*phases, *run.callbacks):
            trainer.add_callback(callback)
        on_main(lambda: run_folder.forget_adapter(run.folder, keeps_samples=resume_from is not None))
        log = _TrainingLog(run, resume_from)
        result = train(trainer, log.add, resume_from, run.settings.recipe.early_stopping_patience)
    if result.terminated:
        print("SIGTERM: checkpoint saved; go on with --resume_from_checkpoint true.", flush=True)
        raise Terminated
    after = checks.hash_parameters(model)
    round_to_base(model)
    verdicts = [
        checks.check_placement(adapters.report_parameters(model, parts)),
        # The end of a phase may leave LoRA frozen, which is then not missing.
        *(placement if phases else lora_placement(run, model, parts)),
        *checks.check_parts_trained(model, parts),
        checks.check_frozen(before, after, trainable),
        checks.check_adapter_moved(before, after, trainable),
        *gradients.verdicts(),
        *(checks.check_same_everywhere(gathered(after)) if num_processes() > 1 else []),
        *(verdict for switch in phases for verdict in switch.verdicts()),
    ]
    if run.base is not None:
        with model.disable_adapter():
            verdicts.append(check_base_kept(before_adapter, _distributions_of_first(run, model, rows)))
    weights = trained_weights(model) if kind is not Sharding.NOTHING else None
    on_main(lambda: save_adapter(run, model, weights))
    run.put_metrics("train", {**result.summary, **run.predicted_peak("train"), **_cost_of(generations, result.summary)})
    if is_main():
        run_folder.update_checks(run.folder, [check.as_dict() for check in verdicts])
    take_off(model)
    if is_main() and not run.settings.recipe.keep_checkpoints:
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
    checks.require_passed(verdicts)
    print(f"{len(verdicts)} checks passed: adapter placed right and moved, frozen tensors unchanged.", flush=True)


def _require_images_for_parts(run: Run) -> None:
    """Stops where a part that only images go through is to be trained, and no row has one."""
    parts = names_of_trained_parts(run.settings)
    if parts and not run.data.summary.train.num_images:
        raise UserError(
            f"--train_{parts[0]}: no training row of {run.data.summary.dataset_name} has an image, and nothing else "
            f"reaches the {parts[0]}. Name rows with images, or train LoRA alone: --train_{parts[0]} false"
            + (" --phase instruct." if "align" in run.settings.recipe.phase else ".")
        )


def lora_placement(run: Run, model: PeftModel, parts: Sequence[TrainedPart]) -> list[Check]:
    """LoRA on the layers that the flags name; no verdict on an `--adapter`, which has its own, or a model in pieces."""
    options = run.settings.model
    if run.settings.recipe.adapter is not None or sharding() is not Sharding.NOTHING:
        return []
    return check_lora_placement(model, options.lora_target_modules, options.lora_r, parts)


def _distributions_of_first(run: Run, model: PreTrainedModel | PeftModel, rows: Dataset) -> list[torch.Tensor]:
    """What a model says along the answer of the first row, to be compared with what it says later."""
    row = separate_completions(rows.select([0]))[0]
    truncate = run.settings.recipe.overlong == "truncate_text"
    collator = CompletionCollator(run.processing_class, run.settings.training.max_length, truncate)
    with unsloth_loader.uncompiled(run.settings):
        return answer_distributions(model, [row], collator)


def save_adapter(run: Run, model: PeftModel, weights: Mapping[str, torch.Tensor] | None = None) -> None:
    """Writes adapter/: weights, processor with template and pixel budget, what the base was. Whole or not at all.

    Args:
        run: of the training.
        model: adapter on its base.
        weights: what was trained, by name, where the model itself holds pieces only.
    """
    final, beside = run.folder / "adapter", run.folder / ".adapter-in-writing"
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside, state_dict=weights)
    if is_composed(run.settings):
        adapters.round_adapter_weights(beside, model.dtype)
    run.processing_class.save_pretrained(beside)
    options = run.settings.model
    # The base may have been loaded from a folder of this machine; the adapter names what the user asked for.
    config = json.loads((beside / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": options.model_name_or_path, "revision": options.model_revision}
    write_json_atomically(beside / "adapter_config.json", config)
    write_json_atomically(
        beside / TRAINED_WITH,
        {
            **origin(run.settings, run.processing_class, getattr(model.get_base_model().config, "_commit_hash", None)),
            "dtype": options.dtype,
            "load_in_4bit": options.load_in_4bit,
            "load_in_8bit": options.load_in_8bit,
            "base_precision": run.settings.recipe.base_precision,
            "loader": run.settings.recipe.loader,
            "bnb_4bit_quant_type": options.bnb_4bit_quant_type,
            "use_bnb_nested_quant": options.use_bnb_nested_quant,
            "attn_implementation": options.attn_implementation,
            "size": dict(getattr(getattr(run.processing_class, "image_processor", None), "size", None) or {}),
            "max_length": run.settings.training.max_length,
            **composition_record(run.settings, model.get_base_model()),
        },
    )
    shutil.rmtree(final, ignore_errors=True)
    beside.rename(final)


def _say_what_comes_twice(run: Run, num_rows: int) -> None:
    """Every process trains on as many batches: what is missing for that is taken from the start of the epoch."""
    training = run.settings.training
    global_batch = training.per_device_train_batch_size * num_processes()
    missing = -num_rows % global_batch
    if num_processes() > 1 and missing and not training.dataloader_drop_last:
        print(
            f"{num_rows} rows do not fill batches of {num_processes()} x {training.per_device_train_batch_size}: "
            f"{missing} of them come twice in each epoch (--dataloader_drop_last leaves out the last batch instead).",
            flush=True,
        )


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
    if is_main():
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
        checks.check_placeholders(
            batches[0],
            image_id,
            getattr(image_processor, "merge_size", 1),
            getattr(load_config(run.settings), "image_seq_length", None),
        ),
    ]
    if is_main():
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
        "packing": False,
        # It does so for text-only models; the collator takes the rows as they are.
        "dataset_kwargs": {"skip_prepare_dataset": True},
        # A NaN that is logged as the average of what came before cannot be seen.
        "logging_nan_inf_filter": False,
        "resume_from_checkpoint": None,
        **checkpointing_arguments(run.settings),
        # A batch goes to the GPU while that is still busy with the one before.
        "accelerator_config": dataclasses.replace(
            training.accelerator_config,
            non_blocking=training.accelerator_config.non_blocking or training.dataloader_pin_memory,
        ),
    }
    if num_processes() > 1 and training.ddp_find_unused_parameters is None:
        # Upstream looks at each step for what had no gradient. LoRA layers always have one; a projector has none where
        # a batch has no picture.
        changes["ddp_find_unused_parameters"] = bool(names_of_trained_parts(run.settings))
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
