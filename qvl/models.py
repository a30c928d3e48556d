"""Loads base models and processors, in the precision and quantization of the run."""

import copy
import importlib.util
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from qvl import clip_llm, unsloth_loader
from qvl.deepstack import add_deepstack_without_waiting
from qvl.encode import ProcessingClass, tokenizer_of
from qvl.errors import UserError
from qvl.hub_errors import hub_errors_explained
from qvl.image_template import with_images, without_thoughts
from qvl.model_names import model_source
from qvl.padding_token import ensure_padding_token
from qvl.settings import Settings
from qvl.vision_attention import use_varlen_vision_attention

# Arguments of from_pretrained that follow from flags.
_OWN_FLAGS = {
    "revision": "--model_revision",
    "trust_remote_code": "--trust_remote_code",
    "dtype": "--dtype",
    "torch_dtype": "--dtype",
    "attn_implementation": "--attn_implementation",
    "quantization_config": "--load_in_4bit or --load_in_8bit",
}


def load_config(settings: Settings) -> PretrainedConfig:
    """The model's configuration, of both parts where it is composed; reads the hub or its cache, no weights."""
    config = _load_named_config(settings)
    return clip_llm.composed_config(settings, config) if clip_llm.is_composed(settings) else config


def _load_named_config(settings: Settings) -> PretrainedConfig:
    name = settings.model.model_name_or_path
    if not name:
        raise UserError("No model is named: --model_name_or_path.")
    with hub_errors_explained(name):
        return AutoConfig.from_pretrained(
            model_source(name),
            revision=settings.model.model_revision,
            trust_remote_code=settings.training.trust_remote_code,
        )


def comes_quantized(settings: Settings) -> bool:
    """Whether the checkpoint itself is quantized; it then stays as it is, whatever the flags say."""
    return bool(own_quantization(_load_named_config(settings)))


def load_processing_class(settings: Settings, folder: Path | None = None) -> ProcessingClass:
    """The model's processor (tokenizer for text-only models) with the run's pixel budget and chat template.

    Args:
        settings: the run's settings.
        folder: an adapter folder to load from in place of the model: what was trained with is what is used.
    """
    name = str(folder) if folder else str(settings.model.model_name_or_path)
    if clip_llm.is_composed(settings) and folder is None:
        processing_class = clip_llm.composed_processor(settings, _load_named_config(settings))
    else:
        with hub_errors_explained(name):
            processing_class = AutoProcessor.from_pretrained(
                name if folder else model_source(name),
                revision=None if folder else settings.model.model_revision,
                trust_remote_code=settings.training.trust_remote_code,
            )
    _set_pixel_budget(processing_class, settings.recipe.min_pixels, settings.recipe.max_pixels)
    template = settings.training.chat_template_path
    if template is not None:
        if not Path(template).is_file():
            raise UserError(
                f"--chat_template_path {template}: name a .jinja file (templates of other models bring tokens)."
            )
        source = Path(template).read_text(encoding="utf-8")
        is_composed = clip_llm.is_composed(settings)
        processing_class.chat_template = with_images(source, clip_llm.IMAGE_TOKEN) if is_composed else source
    if processing_class.chat_template is None:
        raise UserError(
            f"{name} has no chat template: use an instruction-tuned model or --chat_template_path FILE.jinja."
        )
    if settings.recipe.vision_mode == "text" and (folder is None or template is not None):
        # As in the composition that it is the baseline of.
        processing_class.chat_template = without_thoughts(str(processing_class.chat_template))
    chosen = ensure_padding_token(tokenizer_of(processing_class), str(processing_class.chat_template))
    if chosen is not None:
        print(f"The tokenizer has no padding token of its own, batches are padded with {chosen}.", flush=True)
    return processing_class


def load_base(settings: Settings, device: torch.device, to_share_out: bool = False) -> PreTrainedModel:
    """The base model on its device, in the run's dtype, quantized if asked for; vision parts are never quantized.

    Args:
        settings: of the run.
        device: where this process computes.
        to_share_out: the trainer will give each process a piece of it: it stays in the host's memory until then,
            unless it is quantized, which a GPU does.
    """
    model = _load_named_model(settings, device, to_share_out)
    if unsloth_loader.is_chosen(settings):
        # It has put its own code where `make_ready` would put qvl's.
        model.config.use_cache = True
        return model
    if clip_llm.is_composed(settings):
        tower = clip_llm.load_tower(settings, model.device, model.dtype)
        model = clip_llm.compose(skeleton(load_config(settings)), model, tower, settings.training.seed)
    make_ready(model)
    return model


def make_ready(model: PreTrainedModel) -> None:
    """What every base model gets once its weights are there, loaded or made.

    Args:
        model: on its device, in its dtype.
    """
    model.config.use_cache = True
    use_varlen_vision_attention(model)
    add_deepstack_without_waiting(model)
    keep_quantized_weights_as_they_are(model)
    # A layer gets its own switch for checkpointing when a training turns it off at its end: with one from the start,
    # what was compiled before serves after it too.
    switch_checkpointing_off(model)


def _load_named_model(settings: Settings, device: torch.device, to_share_out: bool) -> PreTrainedModel:
    config = _load_named_config(settings)
    name = str(settings.model.model_name_or_path)
    quantized = quantization(settings, config)
    kwargs: dict[str, Any] = dict(settings.training.model_init_kwargs or {})
    for key in kwargs.keys() & _OWN_FLAGS.keys():
        raise UserError(f"--model_init_kwargs holds {key}, which has a flag of its own: {_OWN_FLAGS[key]}.")
    kwargs["attn_implementation"] = settings.model.attn_implementation
    if device.type != "cpu" and not (to_share_out and quantized is None):
        kwargs.setdefault("device_map", {"": device})
    if unsloth_loader.is_chosen(settings):
        if getattr(config, "is_composed", False):
            raise UserError(f"--loader unsloth does not know the projector of {name}: leave it out.")
        with hub_errors_explained(name):
            return unsloth_loader.load_model(
                model_source(name), settings, _torch_dtype_of(settings, config), quantized, **kwargs
            )
    if quantized is not None:
        # Not as None: that would take away the configuration of a checkpoint that comes quantized.
        kwargs["quantization_config"] = quantized
    with hub_errors_explained(name):
        model = _auto_class(config).from_pretrained(
            model_source(name),
            revision=settings.model.model_revision,
            trust_remote_code=settings.training.trust_remote_code,
            dtype=_torch_dtype(settings),
            **kwargs,
        )
    # A composition that was saved whole.
    return clip_llm.with_image_projector(model) if getattr(config, "is_composed", False) else model


def keep_quantized_weights_as_they_are(model: nn.Module) -> None:
    """Switches off what bitsandbytes does to 4-bit weights in the first inference on a CPU with AVX512-BF16.

    It packs them in place, and the way back, which every `state_dict()` takes, restores the scales in another order
    (bitsandbytes 0.50.2, without nested quantization): outputs then differ by a tenth, and so does what is trained on.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (mypy takes a module's attributes for tensors)


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model without weights (meta device): its module names and parameter counts, for free."""
    # A loaded model's own configuration may name an attention that only a loaded model can be switched to.
    config = copy.deepcopy(config)
    config._attn_implementation = None
    with torch.device("meta"):
        model = _auto_class(config).from_config(config)
    return clip_llm.with_image_projector(model) if getattr(config, "is_composed", False) else model


def switch_checkpointing_off(model: PreTrainedModel) -> None:
    """No activation checkpointing from now on."""
    # The name that transformers has had since 5.23, else the older one.
    getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()


def language_model_path(model: nn.Module) -> str:
    """Path of the language model inside a model, such as `model.language_model`, or `model` for a text-only one."""
    decoder = cast(PreTrainedModel, model).get_decoder()
    return next(name for name, module in model.named_modules() if module is decoder)


def without_adapter(model: nn.Module) -> PreTrainedModel:
    """The model below an adapter, or the model itself where it has none."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def own_quantization(config: PretrainedConfig) -> dict[str, Any]:
    """How a checkpoint, or a model quantized while loading, says that it is; empty for one in 16 or 32 bits."""
    own: Any = getattr(config, "quantization_config", None) or {}
    return dict(own if isinstance(own, dict) else own.to_dict())


def _auto_class(config: PretrainedConfig) -> Any:
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _torch_dtype(settings: Settings) -> Any:
    name = settings.model.dtype
    return name if name in (None, "auto") else getattr(torch, name)


def _torch_dtype_of(settings: Settings, config: PretrainedConfig) -> torch.dtype:
    """The run's dtype, where "auto" is the checkpoint's own."""
    chosen = _torch_dtype(settings)
    return chosen if isinstance(chosen, torch.dtype) else config.dtype or torch.float32


def quantization(settings: Settings, config: PretrainedConfig) -> BitsAndBytesConfig | None:
    """How `--load_in_4bit` or `--load_in_8bit` quantizes the language model; None without either."""
    options = settings.model
    if not (options.load_in_4bit or options.load_in_8bit):
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "--load_in_4bit and --load_in_8bit need bitsandbytes, which is not installed: `pip install bitsandbytes`, "
            "or go without (`--load_in_4bit false`)."
        )
    empty = skeleton(config)
    inside = language_model_path(empty)
    # Everything beside the language model: vision tower, merger or projector, and the head.
    beside = [
        name
        for name, module in empty.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(inside + ".")
    ]
    skipped = sorted({*beside, "lm_head"})
    compute_dtype = _torch_dtype(settings)
    return BitsAndBytesConfig(
        load_in_4bit=options.load_in_4bit,
        load_in_8bit=options.load_in_8bit,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_type=options.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=options.use_bnb_nested_quant,
        bnb_4bit_quant_storage=options.bnb_4bit_quant_storage,
        llm_int8_skip_modules=skipped,
    )


def _set_pixel_budget(processing_class: ProcessingClass, min_pixels: int | None, max_pixels: int | None) -> None:
    """Sets the least and most pixels an image is resized to, through the image processor's `size`."""
    if min_pixels is None and max_pixels is None:
        return
    image_processor: Any = getattr(processing_class, "image_processor", None)
    size = dict(getattr(image_processor, "size", None) or {})
    if not {"shortest_edge", "longest_edge"} <= size.keys():
        raise UserError("--min_pixels and --max_pixels need a model whose processor resizes by a pixel budget.")
    # For Qwen-VL these two are areas in pixels, whatever their names say.
    size["shortest_edge"] = min_pixels or min(size["shortest_edge"], max_pixels or size["shortest_edge"])
    size["longest_edge"] = max_pixels or size["longest_edge"]
    if size["shortest_edge"] > size["longest_edge"]:
        raise UserError(f"--min_pixels {size['shortest_edge']} is more than --max_pixels {size['longest_edge']}.")
    image_processor.size = size
