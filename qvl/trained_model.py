"""An adapter with the base, template, precision and pixel budget it was trained with, ready to answer."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin, TextStreamer

from qvl.adapters import load_adapter, require_adapter
from qvl.encode import ProcessingClass, tokenizer_of
from qvl.errors import UserError
from qvl.generate import Decoding, PromptCollator
from qvl.models import load_base, load_processing_class
from qvl.settings import Settings, parse_settings

_SAME_AS_IN_TRAINING = (
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
    "attn_implementation",
)


@dataclass(frozen=True)
class TrainedModel:
    """A model that answers.

    Attributes:
        model: the base, or the adapter on it, on its device, in evaluation mode.
        processing_class: the processor or tokenizer it was trained with.
        decoding: how it decodes.
        name: what it is, in words.
    """

    model: PreTrainedModel | PeftModel
    processing_class: ProcessingClass
    decoding: Decoding
    name: str

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
        config = self.decoding.config(self.processing_class)
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


def load_trained(adapter: Path, base_only: bool, flags: Mapping[str, Any]) -> TrainedModel:
    """Loads an adapter's base as it was in training, and the adapter on it.

    Args:
        adapter: folder of an adapter; one that another program trained has no trained_with.json, and precision and
            template are then those of this machine and the base.
        base_only: leave the adapter out, everything else as with it.
        flags: how to decode, by the names of qvl's flags.

    Raises:
        UserError: no adapter there, a base that cannot be loaded or does not fit, flags that contradict each other.
    """
    require_adapter(adapter)
    settings = _settings(adapter, flags)
    torch.manual_seed(settings.training.seed)
    has_own_template = any((adapter / name).is_file() for name in ("processor_config.json", "tokenizer_config.json"))
    processing_class = load_processing_class(settings, adapter if has_own_template else None)
    base = load_base(settings, settings.training.device)
    model = base if base_only else load_adapter(base, adapter)
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
    kind = "4-bit" if settings.model.load_in_4bit else "8-bit" if settings.model.load_in_8bit else settings.model.dtype
    on_it = "without an adapter" if base_only else f"with {adapter}"
    name = f"{settings.model.model_name_or_path} {on_it} ({kind}, {base.device.type})"
    return TrainedModel(model.eval(), processing_class, decoding, name)


def _settings(adapter: Path, flags: Mapping[str, Any]) -> Settings:
    """Settings that name the base as the training did."""
    path = adapter / "trained_with.json"
    if path.is_file():
        trained = json.loads(path.read_text(encoding="utf-8"))
    else:
        trained = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if not trained.get("base_model_name_or_path"):
        raise UserError(f"{adapter} does not say which base it was trained on (base_model_name_or_path).")
    values: dict[str, Any] = {
        "model_name_or_path": trained["base_model_name_or_path"],
        # The commit that was trained on, where a hub told it: a branch may have moved since.
        "model_revision": trained.get("commit") or trained.get("revision") or "main",
        **{key: trained[key] for key in _SAME_AS_IN_TRAINING if trained.get(key) is not None},
        **flags,
    }
    if trained.get("dtype"):
        # Only the weights' format matters here; training flags would be checked against the device.
        values |= {"dtype": trained["dtype"], "bf16": False, "fp16": False}
    return parse_settings(values, {}, [])
