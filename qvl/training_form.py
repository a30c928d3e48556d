"""The base model in the form it trains in, for the time of the training."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from qvl.active_run import Run
from qvl.collators import CompletionCollator
from qvl.compiled_layers import can_compile, compiled_layers
from qvl.fp8 import quantize_frozen_base
from qvl.segment_attention import use_sdpa, use_segment_attention
from qvl.settings import Settings
from qvl.shared_prefix import SharedPrefixCollator


def trains_compiled(settings: Settings) -> bool:
    """Whether layers are compiled for training.

    Not with activation checkpointing, whose saved-tensor hooks torch 2.11's partitioner does not survive with dynamic
    lengths, and not with a 4-bit or 8-bit base, of which no compiled run has been measured yet.
    """
    is_quantized = settings.model.load_in_4bit or settings.model.load_in_8bit
    wanted = settings.recipe.compile_layers and not settings.training.gradient_checkpointing and not is_quantized
    return wanted and can_compile(settings.training.device)


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
        with compiled_layers(base) if trains_compiled(run.settings) else nullcontext():
            yield
    finally:
        if has_segments:
            use_sdpa(base)
        _leave_trainer(base, forward)


def lower_base_precision(run: Run, model: PeftModel) -> None:
    """Puts the frozen layers below an adapter into `--base_precision`; the next stage then loads the base again."""
    if run.settings.recipe.base_precision == "fp8":
        run.base = None
        print("\n".join(quantize_frozen_base(model).lines()), flush=True)


def _leave_trainer(base: PreTrainedModel, forward: Any) -> None:
    """Takes off what SFTTrainer and accelerate put on the base model, so that it generates as it did before."""
    base.disable_input_require_grads()
    # The name that transformers has had since 5.23, else the older one.
    getattr(base, "activation_checkpointing_disable", base.gradient_checkpointing_disable)()
    base.__dict__.pop("forward", None)
    if forward is not None:
        base.forward = forward
    base.config.use_cache = True
