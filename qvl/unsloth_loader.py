"""`--loader unsloth`: base and LoRA as Unsloth loads and places them, for the same checks, training and generation.

What Unsloth gives is used as it is: its forward code, checkpointing, trainer and `generate` in place of compiled
layers, shared prompts and captured decoding, which are qvl's own and change the same places. When it is imported, and
what it does not go with, is `qvl.unsloth_import`'s; here it is imported inside functions only.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qvl.errors import UserError
from qvl.unsloth_import import NAME, quiet

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from torch import nn
    from transformers import BitsAndBytesConfig, PreTrainedModel

    from qvl.settings import Settings

# Why samples do not share a row, for `qvl.training_rows`.
NO_SEGMENTS = "--loader unsloth trains with Unsloth's own attention, which knows no segments in a row"


def is_chosen(settings: "Settings") -> bool:
    """Whether a run loads its base by Unsloth."""
    return settings.recipe.loader == NAME


def load_model(
    name: str,
    settings: "Settings",
    dtype: "torch.dtype",
    quantization: "BitsAndBytesConfig | None",
    **kwargs: Any,
) -> "PreTrainedModel":
    """The base model by Unsloth, with its forward code in place of transformers'.

    Args:
        name: folder or hub id; Unsloth would take a repository of its own for some ids.
        settings: of the run.
        dtype: of the weights that are not quantized.
        quantization: what of the language model is 4-bit; without it Unsloth would quantize vision towers too.
        **kwargs: for `from_pretrained`.

    Raises:
        UserError: Unsloth has not been imported in time; only recipes see to that.
    """
    if NAME not in sys.modules:
        raise UserError(
            "--loader unsloth works with recipes only, which import Unsloth before transformers: leave it out."
        )
    import unsloth

    print(f"Unsloth {unsloth.__version__} loads it, and trains with layers that it compiles itself.", flush=True)
    if quantization is not None:
        kwargs["quantization_config"] = quantization
    with quiet():
        model, _ = unsloth.FastModel.from_pretrained(
            name,
            use_exact_model_name=True,
            # It keeps one length for all; rows that are too long have been dealt with before.
            max_seq_length=settings.training.max_length or 2048,
            dtype=dtype,
            load_in_4bit=quantization is not None,
            revision=settings.model.model_revision,
            trust_remote_code=settings.training.trust_remote_code,
            use_gradient_checkpointing=_checkpointing(settings),
            offload_embedding=False,
            random_state=settings.training.seed,
            **kwargs,
        )
    loaded: PreTrainedModel = model
    return loaded.eval()


def place_lora(model: "PreTrainedModel", config: "LoraConfig", settings: "Settings") -> "PeftModel":
    """A fresh LoRA adapter by Unsloth, on the layers that `config` names.

    Args:
        model: from `load_model`.
        config: as for PEFT; its pattern of full paths is taken as it is, where names would be looked for in vision
            towers too.
        settings: of the run.
    """
    import unsloth

    with quiet():
        adapted: PeftModel = unsloth.FastModel.get_peft_model(
            model,
            r=config.r,
            target_modules=config.target_modules,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            bias=config.bias,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            finetune_vision_layers=False,
            use_gradient_checkpointing=_checkpointing(settings),
            random_state=settings.training.seed,
        )
    return adapted


def prepare_loaded_lora(model: "PeftModel", settings: "Settings") -> None:
    """Makes an adapter that PEFT has loaded trainable as Unsloth's own are."""
    import unsloth

    with quiet():
        unsloth.FastModel.post_patch_model(model, use_gradient_checkpointing=_checkpointing(settings))


def _checkpointing(settings: "Settings") -> bool | str:
    """What Unsloth calls its activation checkpointing, which keeps activations in the host's memory; False is none."""
    return NAME if settings.training.gradient_checkpointing else False


def checkpointing_arguments() -> dict[str, Any]:
    """What the trainer is told of activation checkpointing: Unsloth's is of the re-entrant kind."""
    return {"gradient_checkpointing_kwargs": {"use_reentrant": True}}


def is_patched(model: "nn.Module") -> bool:
    """Whether Unsloth has loaded a model, or the base of an adapter: it then generates with code of its own."""
    return hasattr(model, "for_inference") and hasattr(model, "for_training")


def resume_training(model: "nn.Module") -> None:
    """After answers in the midst of a training: Unsloth's `generate` has switched activation checkpointing off."""
    model.for_training()  # type: ignore[operator]


@contextlib.contextmanager
def uncompiled(settings: "Settings") -> Iterator[None]:
    """Runs Unsloth's layers as they are written; does nothing with another loader.

    Checks have shapes and hooks of their own, each of which would compile anew, and numbers that are to be equal before
    and after a training have to come from the same code: what Unsloth compiles, and when it goes on without, changes.

    Unsloth changes the stance of `torch.compile` itself, at every `generate` and second inference: for the time its
    modules get a function in place of torch's that leaves it alone.

    Args:
        settings: of the run.
    """
    if not is_chosen(settings):
        yield
        return
    import torch

    def leave_alone(stance: str = "default", **kwargs: Any) -> None:
        """In place of `torch.compiler.set_stance`."""

    name = "torch_compiler_set_stance"
    before = [
        (module, vars(module)[name]) for module in list(sys.modules.values()) if name in getattr(module, "__dict__", {})
    ]
    for module, _ in before:
        setattr(module, name, leave_alone)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, function in before:
            setattr(module, name, function)
