"""An adapter, or what came of merging it, with the base, template, precision and pixel budget of its training."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin, TextStreamer

from qvl.adapter_origin import other_origin, read_trained_with
from qvl.adapters import load_adapter, require_adapter
from qvl.encode import ProcessingClass, tokenizer_of
from qvl.errors import UserError
from qvl.generate import Decoding, PromptCollator
from qvl.models import load_base, load_processing_class
from qvl.settings import Settings, parse_settings

_QUANTIZATION = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant")
_COMPOSITION = ("vision_encoder", "vision_encoder_revision", "num_image_tokens")


@dataclass(frozen=True)
class TrainedModel:
    """A model that answers.

    Attributes:
        model: the base, or the adapter on it, on its device, in evaluation mode.
        processing_class: the processor or tokenizer it was trained with.
        decoding: how it decodes.
        name: what it is, in words.
        warnings: how what it was loaded on differs from what it was trained on.
    """

    model: PreTrainedModel | PeftModel
    processing_class: ProcessingClass
    decoding: Decoding
    name: str
    warnings: tuple[str, ...] = ()

    @property
    def sees_images(self) -> bool:
        """Whether it is a vision-language model."""
        return isinstance(self.processing_class, ProcessorMixin)

    def answer(self, messages: Sequence[Mapping[str, Any]], images: Sequence[Image.Image]) -> str:
        """Answers a conversation and prints the answer to stdout word by word.

        Args:
            messages: typed messages, the last one the user's.
            images: of all image parts in their order.

        Returns:
            The answer without special tokens, stripped.

        Raises:
            UserError: the conversation is longer than the model can look back.
        """
        prompt = {"prompt": list(messages), "images": list(images)}
        batch = PromptCollator(self.processing_class)([prompt])
        self._require_room(batch["input_ids"].shape[1])
        batch = {key: value.to(self.model.device) for key, value in batch.items()}
        tokenizer = tokenizer_of(self.processing_class)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        config = self.decoding.config(self.processing_class, self.model)
        with torch.inference_mode():
            tokens = self.model.generate(**batch, generation_config=config, streamer=streamer)
        new_tokens = tokens[0, batch["input_ids"].shape[1] :]
        return str(tokenizer.decode(new_tokens, skip_special_tokens=True)).strip()

    def _require_room(self, num_prompt_tokens: int) -> None:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and num_prompt_tokens + self.decoding.max_new_tokens > limit:
            raise UserError(
                f"The conversation has {num_prompt_tokens:,} tokens; with --max_new_tokens "
                f"{self.decoding.max_new_tokens} that is more than the {limit:,} the model can look back."
            )


def is_merged(folder: Path) -> bool:
    """Whether a folder holds a whole model, as `python -m qvl.export --format merged` writes it, and no adapter."""
    return (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()


def load_trained(folder: Path, base_only: bool, flags: Mapping[str, Any]) -> TrainedModel:
    """Loads an adapter's base as it was in training, and the adapter on it; or the model that both were merged into.

    Args:
        folder: of an adapter; one that another program trained has no trained_with.json, and precision and template
            are then those of this machine and the base. Or of a merged model.
        base_only: leave the adapter out, everything else as with it.
        flags: how to decode, by the names of qvl's flags; they also go above the training's quantization.

    Raises:
        UserError: no adapter there, a base that cannot be loaded or does not fit, flags that contradict each other.
    """
    merged = is_merged(folder)
    if merged and base_only:
        raise UserError(f"{folder} is a merged model: its base is in it and cannot be asked apart from it.")
    if not merged:
        require_adapter(folder)
    settings = _settings(folder, merged, flags)
    torch.manual_seed(settings.training.seed)
    processing_class = own_processing_class(settings, folder)
    base = load_base(settings, settings.training.device)
    commit = getattr(base.config, "_commit_hash", None)
    warnings = [] if merged else other_origin(folder, settings, processing_class, commit)
    model = base if merged or base_only else load_adapter(base, folder)
    recipe = settings.recipe
    decoding = Decoding(
        max_new_tokens=recipe.max_new_tokens,
        batch_size=1,
        seed=settings.training.seed,
        do_sample=recipe.do_sample,
        temperature=recipe.temperature,
        top_p=recipe.top_p,
        top_k=recipe.top_k,
    )
    name = _name(settings, folder, merged, base_only)
    return TrainedModel(model.eval(), processing_class, decoding, name, tuple(warnings))


def own_processing_class(settings: Settings, folder: Path) -> ProcessingClass:
    """The processor or tokenizer that was saved beside trained weights, or where none was, the base's.

    Args:
        settings: that name the base.
        folder: of the weights.
    """
    is_saved = any((folder / name).is_file() for name in ("processor_config.json", "tokenizer_config.json"))
    return load_processing_class(settings, folder if is_saved else None)


def _name(settings: Settings, folder: Path, merged: bool, base_only: bool) -> str:
    options = settings.model
    kind = "4-bit" if options.load_in_4bit else "8-bit" if options.load_in_8bit else options.dtype
    on_it = ", merged" if merged else " without an adapter" if base_only else f" with {folder}"
    return f"{options.model_name_or_path}{on_it} ({kind}, {settings.training.device.type})"


def _settings(folder: Path, merged: bool, flags: Mapping[str, Any]) -> Settings:
    """Settings that name the model as the training did."""
    trained = read_trained_with(folder)
    if trained is None:
        trained = {} if merged else json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if merged:
        values: dict[str, Any] = {"model_name_or_path": str(folder)}
    elif not trained.get("base_model_name_or_path"):
        raise UserError(f"{folder} does not say which base it was trained on (base_model_name_or_path).")
    else:
        values = {
            "model_name_or_path": trained["base_model_name_or_path"],
            # The commit that was trained on, where a hub told it: a branch may have moved since.
            "model_revision": trained.get("commit") or trained.get("revision") or "main",
            **{key: trained[key] for key in (*_QUANTIZATION, *_COMPOSITION) if trained.get(key) is not None},
        }
        if trained.get("vision_encoder_commit"):
            values["vision_encoder_revision"] = trained["vision_encoder_commit"]
    if trained.get("attn_implementation") is not None:
        values["attn_implementation"] = trained["attn_implementation"]
    values |= flags
    if trained.get("dtype"):
        # Only the weights' format matters here; training flags would be checked against the device.
        values |= {"dtype": trained["dtype"], "bf16": False, "fp16": False}
    return parse_settings(values, {}, [])
