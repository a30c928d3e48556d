"""What a command may not change of the run that it goes on with, and what that run's settings.yaml says afterwards."""

import copy
import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from qvl.errors import UserError
from qvl.flags import STAGES
from qvl.settings import Settings

# In the checkpoint's optimizer and schedule, which a resumed training goes on with whatever the flags say.
_OPTIMIZATION = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "warmup_ratio",
    "weight_decay",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
)
_ADAPTER = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_modules_to_save",
    "use_rslora",
    "use_dora",
)
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_examples")
# What decides which rows come when: a resumed training skips as many batches as were trained on.
_ROWS = (
    "dataset_name",
    "dataset_config",
    "dataset_revision",
    "dataset_train_split",
    "datasets",
    "captions_per_image",
    "captions_per_step",
    "shared_prefix",
    "packing",
    "max_length",
    "overlong",
    "seed",
    "data_seed",
    "train_sampling_strategy",
)
_LENGTH = ("num_train_epochs", "max_steps")


def continued(settings: Settings, own: Mapping[str, Any], folder: Path, overrides: Collection[str]) -> Settings:
    """The settings of a command that goes on with a run.

    Args:
        settings: resolved, the run's own below the flags given now.
        own: the run's settings.yaml.
        folder: the run's.
        overrides: names of what a sweep passes, which sees to it itself.

    Returns:
        The same, to score the adapter that the run has trained, and not the one it may have begun with.

    Raises:
        UserError: a flag that the training behind or before this command does not take any more.
    """
    trains = "train" in settings.recipe.stages
    if settings.training.resume_from_checkpoint and not trains:
        raise UserError(
            f"--resume_from_checkpoint goes on with a training, and the stages {' '.join(settings.recipe.stages)} have "
            "none: add train to --stages, or leave --resume_from_checkpoint out."
        )
    fixed = (*_OPTIMIZATION, *_ADAPTER, *_BATCH, *(_ROWS if trains else _LENGTH))
    now = settings.as_dict()
    for key in fixed:
        if key in own and key in now and key not in overrides and own[key] != now[key]:
            raise UserError(_refusal(key, own[key], now[key], folder, trains))
    if trains or settings.recipe.adapter != own.get("adapter") or not (folder / "adapter").is_dir():
        return settings
    return _with(settings, adapter=None)


def of_the_whole_run(settings: Settings, own: Mapping[str, Any]) -> Settings:
    """What settings.yaml is to say after a command that goes on with a run.

    The stages are those of all its commands, and the adapter is the one that the training began with: fed back with
    --config, or resumed, the file repeats the run and not its last command.

    Args:
        settings: of the command.
        own: the run's settings.yaml.
    """
    stages = {*own.get("stages", ()), *settings.recipe.stages}
    adapter = settings.recipe.adapter or own.get("adapter")
    return _with(settings, stages=[stage for stage in STAGES if stage in stages], adapter=adapter)


def _refusal(key: str, was: Any, given: Any, folder: Path, trains: bool) -> str:
    if trains:
        return (
            f"--{key} {given}: {folder} was trained with {was} up to its checkpoint, and what is resumed goes on with "
            "that. Leave the flag out, or train anew in another folder."
        )
    return f"--{key} {given}: the adapter of {folder} was trained with {was}, which this command does not change."


def _with(settings: Settings, **recipe_flags: Any) -> Settings:
    recipe = copy.copy(settings.recipe)
    for name, value in recipe_flags.items():
        setattr(recipe, name, value)
    return dataclasses.replace(settings, recipe=recipe)
