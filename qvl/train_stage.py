"""The stage train: rows that fit, an adapter where it belongs, proof of what moved, and what is saved."""

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers.trainer_utils import IntervalStrategy
from trl import SFTConfig

from qvl import adapters, checks, run_folder
from qvl.active_run import Run
from qvl.collators import CompletionCollator
from qvl.data import separate_completions
from qvl.encode import segments, tokenizer_of
from qvl.errors import Terminated, UserError
from qvl.examples import undecoded_examples
from qvl.files import read_jsonl, write_json_atomically, write_jsonl_atomically
from qvl.survey import describe_lengths, fit_rows, training_lengths
from qvl.trainer import build_trainer, train

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
    forward = base.__dict__.get("forward")
    model = adapters.add_adapter(base, run.settings)
    report = adapters.report_parameters(model)
    print("\n".join(report.lines()), flush=True)
    adapters.require_adapter_in_language_model(report)
    args = _trainer_arguments(run)
    run_folder.require_space(run.folder, report.num_trainable, 2 + (args.save_total_limit or 2))
    _require_good_batches(run, rows, collator)

    # Of the model as the trainer leaves it: it casts adapters.
    trainer = build_trainer(model, run.processing_class, rows, _held_out(run), args, collator)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = checks.hash_parameters(model)
    log = _TrainingLog(run, resume_from)
    result = train(trainer, log.add, resume_from)
    _leave_trainer(model, forward)
    if result.terminated:
        print("SIGTERM: checkpoint saved; go on with --resume_from_checkpoint true.", flush=True)
        raise Terminated
    after = checks.hash_parameters(model)
    verdicts = [
        checks.check_placement(report),
        checks.check_frozen(before, after, trainable),
        checks.check_adapter_moved(before, after, trainable),
    ]
    save_adapter(run, model)
    run.put_metrics("train", result.summary)
    run_folder.update_checks(run.folder, [check.as_dict() for check in verdicts])
    model.unload()
    if not run.settings.recipe.keep_checkpoints:
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
    _stop_on_failure(verdicts)
    print(f"{len(verdicts)} checks passed: adapter placed right and moved, frozen tensors unchanged.", flush=True)


def prepare_training_rows(run: Run) -> tuple[Dataset, CompletionCollator]:
    """One row per answer, fitting `max_length` by the policy chosen, and the collator for them."""
    recipe, max_length = run.settings.recipe, run.settings.training.max_length
    rows = separate_completions(run.data.train)
    lengths = training_lengths(rows, run.processing_class)
    print("\n".join(describe_lengths(lengths)), flush=True)
    fitting = fit_rows(rows, lengths, max_length, recipe.overlong)
    num_dropped = len(rows) - len(fitting)
    if num_dropped:
        print(f"--overlong drop: {num_dropped} of {len(rows)} rows are longer than {max_length} tokens and left out.")
    run.record.log_metrics(
        {"num_overlong_rows_dropped": num_dropped, "num_bad_rows_skipped": run.data.summary.num_skipped}
    )
    return fitting, CompletionCollator(run.processing_class, max_length, recipe.overlong == "truncate_text")


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
        self.rows: list[dict[str, Any]] = []
        if resume_from is not None and self.path.is_file():
            state = json.loads((resume_from / "trainer_state.json").read_text(encoding="utf-8"))
            # What was logged behind the checkpoint will be logged again.
            self.rows = [row for row in read_jsonl(self.path) if row["step"] <= state["global_step"]]

    def add(self, logs: dict[str, float], step: int) -> None:
        self.rows.append({"step": step, **logs})
        write_jsonl_atomically(self.path, self.rows)
        self.run.record.log_metrics(logs, step=step)


def _require_good_batches(run: Run, rows: Dataset, collator: CompletionCollator) -> None:
    """Shows what is trained on and checks labels and placeholders of the first batches, before step 0."""
    shown = [
        {
            "id": row["id"],
            "where": row["where"],
            "image_names": row["image_names"],
            "segments": [
                {"text": part.text, "is_target": part.is_target} for part in segments(row, run.processing_class)
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
    _stop_on_failure(verdicts)


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


def _stop_on_failure(verdicts: Sequence[checks.Check]) -> None:
    broken = checks.failed(verdicts)
    if broken:
        raise UserError("\n".join(["These checks failed, so the result cannot be trusted:", *checks.table(broken)]))


def _trainer_arguments(run: Run) -> SFTConfig:
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
        # A NaN that is logged as the average of what came before cannot be seen.
        "logging_nan_inf_filter": False,
        "resume_from_checkpoint": None,
    }
    for key, value in changes.items():
        setattr(arguments, key, value)
    return arguments


def _held_out(run: Run) -> Dataset | None:
    """Rows for the held-out loss during training, if it is asked for."""
    if run.settings.training.eval_strategy == IntervalStrategy.NO and not run.settings.training.eval_on_start:
        return None
    return separate_completions(run.data.evaluation)


def _leave_trainer(model: PeftModel, forward: Any) -> None:
    """Takes off what SFTTrainer and accelerate put on the base model, so that it generates as it did before."""
    base = model.get_base_model()
    if hasattr(model, "disable_input_require_grads"):
        model.disable_input_require_grads()
    # The name that transformers has had since 5.23, else the older one.
    getattr(base, "activation_checkpointing_disable", base.gradient_checkpointing_disable)()
    base.__dict__.pop("forward", None)
    if forward is not None:
        base.forward = forward
    base.config.use_cache = True
