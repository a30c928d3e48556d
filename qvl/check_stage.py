"""The stage check: is this model, quantized and adapted like this, safe to train? Measured before hours go into it."""

import copy
import dataclasses
import gc
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
from trl import SFTConfig

from qvl import (
    adapters,
    behaviour_checks,
    checks,
    generation_checks,
    merge_checks,
    model_checks,
    number_checks,
    run_folder,
    training_checks,
    unsloth_loader,
)
from qvl.active_run import Run
from qvl.answer_distributions import answer_distributions
from qvl.check_rows import rows_to_compare, rows_to_learn
from qvl.checks import Check
from qvl.clip_llm import is_composed
from qvl.collators import CompletionCollator
from qvl.compiled_layers import plain_layers
from qvl.data import prompt_messages
from qvl.free_photos import caption_photos, photo_paths
from qvl.generate import Decoding
from qvl.held_out import held_out_losses
from qvl.models import (
    comes_quantized,
    load_base,
    load_config,
    own_quantization,
    skeleton,
    switch_checkpointing_off,
)
from qvl.train_stage import lora_placement, trainer_arguments
from qvl.trained_parts import round_to_base, take_off, trained_parts
from qvl.trainer import build_trainer, train
from qvl.training_form import ready_for_compiling, training_form

_NUM_COMPARED = 8
_MOST_OVERFIT_STEPS = 60
# The recipes' own; with a careful run's rate eight rows would take longer to know by heart than there are steps.
_LEAST_OVERFIT_RATE = 2e-4
# Of the loss that has to be reached; with dropout the loss that training logs is above the one that is checked.
_STOP_SHARE = 0.5
# Room for what loading needs beside the weights.
_LOADING_MARGIN = 1.25


def check(run: Run) -> None:
    """Runs all checks, prints their table, writes checks.json, logs them to MLflow, and captions the free photos.

    Raises:
        FailedCheckError: one failed; the process ends with 1.
        UserError: too few rows to check with.
    """
    verdicts, captions = all_checks(run)
    print("\n".join([f"{len(verdicts)} checks:", *checks.table(verdicts)]), flush=True)
    run.record.log_metrics(
        {**{f"check_{c.name}": c.value for c in verdicts}, "num_checks_failed": len(checks.failed(verdicts))}
    )
    if captions:
        model = "model with the adapter" if is_composed(run.settings) else "base model"
        print("\n".join([f"The free photos, as the {model} sees them:", *captions]), flush=True)
    checks.require_passed(verdicts)


def all_checks(run: Run, has_learned: bool = True) -> tuple[list[Check], list[str]]:
    """Every check that applies to the run's model.

    The base model is given up: merging has changed it, and the next stage loads it anew.

    Args:
        run: its `base`, if it is set already, is what is checked.
        has_learned: False for random weights, which make next to nothing of a prompt, know no captions, end no answer,
            and have no full precision to be compared with.

    Returns:
        The verdicts, and captions of the free photos by the base model, or by a composition with `--adapter` (none from
        a text-only model, nor from a composition whose projector is still as it was drawn).
    """
    try:
        with unsloth_loader.uncompiled(run.settings):
            stage = _CheckStage(run, has_learned)
            stage.before_training()
            stage.after_training(stage.train())
        return stage.verdicts, stage.captions
    finally:
        run.base = None
        if run.kept is not None:
            run.kept.free()
        gc.collect()


class _CheckStage:
    """The checks in their order, and what they share: models, rows and verdicts."""

    def __init__(self, run: Run, has_learned: bool) -> None:
        self.run = run
        self.has_learned = has_learned
        self.is_composed = is_composed(run.settings)
        # The projector of a composition begins at random: before a training of its own no answer follows anything.
        self.judges_answers = has_learned and (not self.is_composed or run.settings.recipe.adapter is not None)
        self.verdicts: list[Check] = []
        self.captions: list[str] = []
        self.collator = CompletionCollator(run.processing_class, max_length=None)
        self.rows = rows_to_compare(run)
        self.compared = self.rows[: min(_NUM_COMPARED, max(2, run.settings.training.per_device_eval_batch_size))]
        self.sees_images = bool(self.rows[0]["images"])
        self.base = run.load_base()
        options = run.settings.model
        self.bits = model_checks.quantized_bits(self.base, options.load_in_4bit, options.load_in_8bit)
        self.full = self._load_full_weights()
        self.base_distributions = self._measure(self.base)

    def before_training(self) -> None:
        """The base: how it is put together, what it looks at, how it answers."""
        self._note(model_checks.check_quantization(self.base, self.bits))
        if self.bits == 4:
            # "auto" is the checkpoint's own.
            dtype = getattr(torch, str(self.run.settings.model.dtype), self.base.dtype)
            self._note([model_checks.check_footprint(self.base, dtype, _is_nested(self.base))])
        image_id = getattr(self.run.processing_class, "image_token_id", None)
        if image_id is not None:
            self._note([model_checks.check_image_places(self.base, self.collator, image_id)])
        if self.full is not None:
            of_full = self._measure(self.full)
            self._note([number_checks.check_quantization_divergence(self.base_distributions, of_full)])
        if self.has_learned and not self.judges_answers:
            print(
                "Not checked: whether answers follow text and images, and how they end. The projector is still as it "
                "was drawn; --adapter RUN/adapter checks a trained one.",
                flush=True,
            )
        with self._as_they_answer() as (model, full):
            self._note(behaviour_checks.check_routing(model, self.compared, self.collator, self.judges_answers))
            self._check_alignment(model, full, "before_training")
            if self.judges_answers:
                self._check_generation(model)
                self.captions = self._caption_photos(model)

    def train(self) -> PeftModel:
        """A fresh adapter, its place, its gradients, and a few rows learned by heart."""
        run = self.run
        rows = rows_to_learn(run)
        parts = trained_parts(self.base, run.settings)
        with training_form(run, self.base, self.collator):
            model = adapters.add_adapter(self.base, run.settings)
            self._note(lora_placement(run, model, parts))
            self._note([checks.check_placement(adapters.report_parameters(model, parts))])
            self._note(checks.check_parts_trained(model, parts))
            with plain_layers(self.base):
                self._check_finite(model, rows)
                loss_before = _mean_loss(model, rows, self.collator)
            ready_for_compiling(run, model)
            with tempfile.TemporaryDirectory() as folder:
                args = _overfit_arguments(run, Path(folder), len(rows))
                trainer = build_trainer(model, run.processing_class, rows, None, args, self.collator, parts=parts)
                trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
                before = checks.hash_parameters(model)
                watch = training_checks.GradientWatch(model)
                goal = _STOP_SHARE * training_checks.MOST_OVERFIT_RATIO * loss_before
                trainer.add_callback(watch)
                trainer.add_callback(training_checks.StopWhenLearned(goal))
                result = train(trainer, lambda logs, step: None, None)
        after = checks.hash_parameters(model)
        round_to_base(model)
        self._note([checks.check_frozen(before, after, trainable)])
        self._note([checks.check_adapter_moved(before, after, trainable), *watch.verdicts()])
        if self.has_learned:
            num_steps = int(result.summary["num_steps"] or 0)
            loss_after = _mean_loss(model, rows, self.collator)
            self._note([training_checks.check_overfit(loss_before, loss_after, len(rows), num_steps)])
        return model

    def after_training(self, model: PeftModel) -> None:
        """The adapter: the base below it, saved and loaded, what it looks at, merged."""
        with model.disable_adapter():
            self._note([training_checks.check_base_kept(self.base_distributions, self._measure(model))])
        with tempfile.TemporaryDirectory() as folder:
            model, verdict = training_checks.check_save_load(model, self._measure, Path(folder))
            self._note([verdict])
            full = adapters.load_adapter(self.full, Path(folder)) if self.full is not None else None
        self._check_alignment(model, full, "after_training")
        if full is not None:
            self._note([merge_checks.check_merge(full, self._measure, is_4bit=False)])
            self.full = full = None
        if self.bits != 8:  # peft merges into 8-bit weights only with their outliers rounded away
            self._note([merge_checks.check_merge(model, self._measure, is_4bit=self.bits == 4)])

    @contextmanager
    def _as_they_answer(self) -> Iterator[tuple[Any, Any]]:
        """Base and full weights in the form whose answers are judged: those of a composition under `--adapter`."""
        adapter = self.run.settings.recipe.adapter
        if not self.is_composed or adapter is None:
            yield self.base, self.full
            return
        model = adapters.load_adapter(self.base, Path(adapter)).eval()
        full = adapters.load_adapter(self.full, Path(adapter)).eval() if self.full is not None else None
        try:
            yield model, full
        finally:
            take_off(model)
            if full is not None:
                take_off(full)

    def _note(self, verdicts: Iterable[Check]) -> None:
        """Keeps verdicts, on disk at once: a later check may run out of memory."""
        self.verdicts += (found := list(verdicts))
        run_folder.update_checks(self.run.folder, [verdict.as_dict() for verdict in found])

    def _measure(self, model: PreTrainedModel | PeftModel) -> list[torch.Tensor]:
        return answer_distributions(model, self.compared, self.collator)

    def _check_alignment(self, model: Any, full: Any, when: str) -> None:
        if not (self.sees_images and self.judges_answers):
            return
        size = len(self.compared)
        found = behaviour_checks.measure_alignment(model, self.rows, self.collator, size)
        self._note(behaviour_checks.check_alignment(found, when))
        if full is not None:
            of_full = behaviour_checks.measure_alignment(full, self.rows, self.collator, size)
            self._note(behaviour_checks.check_alignment_kept(found, of_full, when))

    def _check_finite(self, model: PeftModel, rows: Dataset) -> None:
        training = self.run.settings.training
        batch = self.collator([rows[index] for index in range(min(training.per_device_train_batch_size, len(rows)))])
        model.train()
        with _checkpointing(self.base) if training.gradient_checkpointing else nullcontext():
            self._note(number_checks.check_finite(model, batch))

    def _check_generation(self, model: PreTrainedModel | PeftModel) -> None:
        settings = self.run.settings
        prompts = [
            {"prompt": prompt_messages(row), "images": row["images"], "tools": row.get("tools")}
            for row in self.compared
        ]
        decoding = Decoding(settings.recipe.max_new_tokens, batch_size=len(prompts), seed=settings.training.seed)
        self._note(generation_checks.check_generation(model, self.run.processing_class, prompts, decoding))

    def _caption_photos(self, model: PreTrainedModel | PeftModel) -> list[str]:
        settings = self.run.settings
        size = min(_NUM_COMPARED, settings.training.per_device_eval_batch_size)
        decoding = Decoding(settings.recipe.max_new_tokens, batch_size=size, seed=settings.training.seed)
        captions = caption_photos(model, self.run.processing_class, settings.recipe.instruction, decoding)
        # None from a text-only model.
        return [f"  {path.stem}: {caption}" for path, caption in zip(photo_paths(), captions, strict=False)]

    def _load_full_weights(self) -> PreTrainedModel | None:
        """The same model without quantization, where there are such weights and they fit beside."""
        options = self.run.settings.model
        if not (self.bits and self.has_learned):
            return None
        if comes_quantized(self.run.settings):
            print("Not compared with full weights: this checkpoint comes quantized.", flush=True)
            return None
        needed = _full_bytes(self.run)
        free = free_bytes(self.run.device)
        if needed > free:
            sizes = f"{needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
            print(f"Not compared with full weights: they would need {sizes}.", flush=True)
            return None
        settings = copy.copy(self.run.settings)
        settings.model = dataclasses.replace(options, load_in_4bit=False, load_in_8bit=False)
        return load_base(settings, self.run.device).eval()


@contextmanager
def _checkpointing(base: PreTrainedModel) -> Iterator[None]:
    """Activation checkpointing as transformers does it; what does not fit without it in training fits here too."""
    # The name that transformers has had since 5.23, else the older one.
    getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)()
    try:
        yield
    finally:
        switch_checkpointing_off(base)


def _full_bytes(run: Run) -> int:
    empty = skeleton(load_config(run.settings))
    dtype = getattr(torch, str(run.settings.model.dtype), torch.float32)
    return int(sum(parameter.numel() for parameter in empty.parameters()) * dtype.itemsize * _LOADING_MARGIN)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device; on a CPU a cautious number, the pages that not even the disk cache holds."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _is_nested(base: PreTrainedModel) -> bool:
    """Whether scales are quantized too: as the model is, for a checkpoint that comes quantized ignores the flags."""
    return bool(own_quantization(base.config)["bnb_4bit_use_double_quant"])


def _mean_loss(model: PeftModel, rows: Dataset, collator: CompletionCollator) -> float:
    losses, num_tokens = held_out_losses(model, rows, collator, batch_size=1, num_workers=0)
    return sum(losses) / sum(num_tokens)


def _overfit_arguments(run: Run, folder: Path, num_rows: int) -> SFTConfig:
    """The run's own arguments, for many steps over all rows at a time and at a constant rate that is high enough."""
    arguments = trainer_arguments(run)
    size = min(arguments.per_device_train_batch_size, num_rows)
    changes: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": _MOST_OVERFIT_STEPS,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": -(-num_rows // size),
        "learning_rate": max(arguments.learning_rate, _LEAST_OVERFIT_RATE),
        "lr_scheduler_type": SchedulerType.CONSTANT,
        "warmup_steps": 0,
        "logging_steps": 1,
        "logging_strategy": IntervalStrategy.STEPS,
        "eval_strategy": IntervalStrategy.NO,
        "eval_on_start": False,
        "save_strategy": SaveStrategy.NO,
        "load_best_model_at_end": False,
        "report_to": [],
        "dataloader_num_workers": 0,
        "dataloader_persistent_workers": False,
        "dataloader_prefetch_factor": None,
    }
    for key, value in changes.items():
        setattr(arguments, key, value)
    return arguments
