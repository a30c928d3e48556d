"""The base model in the form it trains in, for the time of the training."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from qvl import unsloth_loader
from qvl.active_run import Run
from qvl.collators import CompletionCollator
from qvl.compiled_layers import can_compile, compiled_layers, layers_of, scale_by_tensors
from qvl.fp8 import quantize_frozen_base
from qvl.models import switch_checkpointing_off
from qvl.processes import num_processes
from qvl.seeded_dropout import seed_dropout
from qvl.segment_attention import use_sdpa, use_segment_attention
from qvl.settings import Settings
from qvl.sharding import gather_at_once, sharding
from qvl.shared_prefix import SharedPrefixCollator
from qvl.trained_parts import names_of_trained_parts


def trains_compiled(settings: Settings) -> bool:
    """Whether layers are compiled for training: where it is wanted and the device can."""
    return wants_compiled(settings) and can_compile(settings.training.device)


def wants_compiled(settings: Settings) -> bool:
    """Whether layers are compiled on a device that can.

    Not with an 8-bit base or a 4-bit one in pieces, of which no compiled run has been measured yet, not with
    `--loader unsloth`, which compiles layers itself, and not where `--gradient_checkpointing_kwargs` asks for a kind of
    checkpointing: compiled layers have one of their own.
    """
    training = settings.training
    wanted = settings.recipe.compile_layers and not settings.model.load_in_8bit
    wanted &= not (settings.model.load_in_4bit and sharding().in_pieces)
    wanted &= not unsloth_loader.is_chosen(settings)
    wanted &= not (training.gradient_checkpointing and training.gradient_checkpointing_kwargs)
    return bool(wanted)


def checkpointing_arguments(settings: Settings) -> dict[str, Any]:
    """What the trainer is told of activation checkpointing: its kind, or none where compiled layers see to it."""
    if unsloth_loader.is_chosen(settings):
        return unsloth_loader.checkpointing_arguments()
    if trains_compiled(settings):
        return _under_both_names(settings, "checkpointing", False)
    if checkpoints_anew(settings):
        return _under_both_names(settings, "checkpointing_kwargs", {"use_reentrant": True})
    return {}


def checkpoints_anew(settings: Settings) -> bool:
    """Whether layers run without a graph first, and again with one in the backward pass (re-entrant checkpointing).

    bitsandbytes' 8-bit layers hold on to what they read without telling autograd: upstream's kind of checkpointing
    would keep all of it. With parts that are trained whole it is upstream's in several processes: DDP then looks for
    parameters without a gradient, and fails with this one.
    """
    training = settings.training
    searches = num_processes() > 1 and bool(names_of_trained_parts(settings))
    is_open = bool(training.gradient_checkpointing) and not training.gradient_checkpointing_kwargs
    return settings.model.load_in_8bit and is_open and not searches


def _under_both_names(settings: Settings, end: str, value: Any) -> dict[str, Any]:
    """An argument of activation checkpointing by the name that transformers has had since 5.23, and the older one."""
    names = (f"activation_{end}", f"gradient_{end}")
    return {name: value for name in names if hasattr(settings.training, name)}


@contextmanager
def training_form(
    run: Run, base: PreTrainedModel, collator: CompletionCollator | SharedPrefixCollator
) -> Iterator[None]:
    """Attention that knows the collator's segments, compiled layers.

    On the way out the base is as it was, without what SFTTrainer and accelerate put on it, and generates as before.

    Args:
        run: whose flags count.
        base: the base model; an adapter may be put on it and stay on it.
        collator: makes the batches.
    """
    forward = base.__dict__.get("forward")
    has_segments = isinstance(collator, SharedPrefixCollator)
    if has_segments:
        use_segment_attention(base)
    try:
        with _compiled_if_wanted(run.settings, base), _without_word_of_the_tower(run.settings):
            yield
    finally:
        if has_segments:
            use_sdpa(base)
        _leave_trainer(base, forward)


@contextmanager
def _without_word_of_the_tower(settings: Settings) -> Iterator[None]:
    """Re-entrant checkpointing warns at each step that the layers of a frozen tower get no gradient."""
    with warnings.catch_warnings():
        if checkpoints_anew(settings):
            warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
        yield


def _compiled_if_wanted(settings: Settings, base: PreTrainedModel) -> AbstractContextManager[None]:
    if not trains_compiled(settings):
        return nullcontext()
    gather_at_once(layers_of(base), settings.training.deepspeed_plugin)
    keeps_inputs_only = bool(settings.training.gradient_checkpointing)
    return compiled_layers(base, keeps_inputs_only=keeps_inputs_only, in_pieces=sharding().in_pieces)


def lower_base_precision(run: Run, model: PeftModel) -> None:
    """Puts the frozen layers below an adapter into `--base_precision`; the next stage then loads the base again."""
    if run.settings.recipe.base_precision == "fp8":
        run.base = None
        print("\n".join(quantize_frozen_base(model).lines()), flush=True)


def ready_for_compiling(run: Run, model: PeftModel) -> None:
    """Gives compiled layers a dropout that they may compute again, and code that serves adapters of all ranks."""
    if trains_compiled(run.settings):
        seed_dropout(model, run.device)
        scale_by_tensors(model, run.device)


def _leave_trainer(base: PreTrainedModel, forward: Any) -> None:
    """Takes off what SFTTrainer and accelerate put on the base model, so that it generates as it did before."""
    base.disable_input_require_grads()
    switch_checkpointing_off(base)
    base.__dict__.pop("forward", None)
    if forward is not None:
        base.forward = forward
    base.config.use_cache = True
