"""Loads base models and processors, and puts adapters where they belong: in the language model, chosen by path."""

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    set_seed,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from qvl.encode import ProcessingClass, tokenizer_of
from qvl.errors import UserError
from qvl.hub_errors import hub_errors_explained
from qvl.settings import Settings

ASSETS = Path(__file__).parent / "assets"
# Arguments of from_pretrained that follow from flags.
_OWN_FLAGS = {
    "revision": "--model_revision",
    "trust_remote_code": "--trust_remote_code",
    "dtype": "--dtype",
    "torch_dtype": "--dtype",
    "attn_implementation": "--attn_implementation",
    "quantization_config": "--load_in_4bit or --load_in_8bit",
}
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
DEFAULT_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def model_source(name: str) -> str:
    """What `from_pretrained` takes for a model name: hub ids and paths as they are, `qvl/...` as the shipped folder.

    Raises:
        UserError: a GGUF file, or an embedded model that does not exist.
    """
    if name.endswith(".gguf"):
        raise UserError(
            f"{name} is a GGUF file: its weights are packed for inference and cannot be trained or carry LoRA. "
            'Dequantize it once to safetensors: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('FOLDER', gguf_file='{Path(name).name}').save_pretrained('OUT')\" "
            "(needs `pip install gguf`), then name OUT, or name the model's original repository."
        )
    embedded = ASSETS / name.removeprefix("qvl/")
    if name.startswith("qvl/"):
        if not embedded.is_dir():
            shipped = ", ".join(sorted(f"qvl/{path.name}" for path in ASSETS.iterdir() if path.is_dir()))
            raise UserError(f"There is no embedded model {name}; there are {shipped}.")
        return str(embedded)
    return name


def load_config(settings: Settings) -> PretrainedConfig:
    """The model's configuration; reads the hub or its cache, no weights."""
    name = settings.model.model_name_or_path
    if not name:
        raise UserError("No model is named: --model_name_or_path.")
    with hub_errors_explained(name):
        return AutoConfig.from_pretrained(
            model_source(name),
            revision=settings.model.model_revision,
            trust_remote_code=settings.training.trust_remote_code,
        )


def load_processing_class(settings: Settings, folder: Path | None = None) -> ProcessingClass:
    """The model's processor (tokenizer for text-only models) with the run's pixel budget and chat template.

    Args:
        settings: the run's settings.
        folder: an adapter folder to load from in place of the model: what was trained with is what is used.
    """
    name = str(folder) if folder else str(settings.model.model_name_or_path)
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
        processing_class.chat_template = Path(template).read_text(encoding="utf-8")
    if processing_class.chat_template is None:
        raise UserError(
            f"{name} has no chat template: use an instruction-tuned model or --chat_template_path FILE.jinja."
        )
    tokenizer = tokenizer_of(processing_class)
    if tokenizer.pad_token is None:
        raise UserError(f"The tokenizer of {name} has no padding token, so batches cannot be made.")
    return processing_class


def load_base(settings: Settings, device: torch.device) -> PreTrainedModel:
    """The base model on its device, in the run's dtype, quantized if asked for; vision parts are never quantized."""
    config = load_config(settings)
    name = str(settings.model.model_name_or_path)
    kwargs: dict[str, Any] = dict(settings.training.model_init_kwargs or {})
    for key in kwargs.keys() & _OWN_FLAGS.keys():
        raise UserError(f"--model_init_kwargs holds {key}, which has a flag of its own: {_OWN_FLAGS[key]}.")
    kwargs["attn_implementation"] = settings.model.attn_implementation
    if device.type != "cpu":
        kwargs.setdefault("device_map", {"": device})
    with hub_errors_explained(name):
        model = _auto_class(config).from_pretrained(
            model_source(name),
            revision=settings.model.model_revision,
            trust_remote_code=settings.training.trust_remote_code,
            dtype=_torch_dtype(settings),
            quantization_config=_quantization(settings, config),
            **kwargs,
        )
    model.config.use_cache = True
    return model


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model without weights (meta device): its module names and parameter counts, for free."""
    with torch.device("meta"):
        return _auto_class(config).from_config(config)


def language_model_path(model: nn.Module) -> str:
    """Path of the language model inside a model, such as `model.language_model`, or `model` for a text-only one."""
    decoder = cast(PreTrainedModel, model).get_decoder()
    return next(name for name, module in model.named_modules() if module is decoder)


def add_adapter(model: PreTrainedModel, settings: Settings) -> PeftModel:
    """Puts a fresh LoRA adapter, or the one in `--adapter`, on a base model. Its weights are fp32.

    Raises:
        UserError: a target that matches nothing in the language model, or a folder that is no adapter.
    """
    # PEFT draws the adapter's weights: seeded here so that a resumed or reused base gives the same ones.
    set_seed(settings.training.seed)
    if settings.recipe.adapter is not None:
        return load_adapter(model, Path(settings.recipe.adapter), is_trainable=True)
    return get_peft_model(model, lora_config(model, settings))


def require_adapter(folder: Path) -> None:
    """Stops where there is no adapter.

    Raises:
        UserError: its configuration or weights are missing.
    """
    if not (folder / "adapter_config.json").is_file() or not (folder / _ADAPTER_WEIGHTS).is_file():
        raise UserError(
            f"{folder} holds no adapter (adapter_config.json, {_ADAPTER_WEIGHTS}): name the adapter/ folder of a run."
        )


def load_adapter(model: PreTrainedModel, folder: Path, is_trainable: bool = False) -> PeftModel:
    """Loads a saved adapter onto a base model; every weight in the folder has to find its place.

    Raises:
        UserError: no adapter there, or one for another base.
    """
    require_adapter(folder)
    weights = folder / _ADAPTER_WEIGHTS
    try:
        with warnings.catch_warnings():
            # Looked at below, together with weights that PEFT passes over without a word.
            warnings.filterwarnings("ignore", message=".*missing adapter keys.*")
            adapted = PeftModel.from_pretrained(model, folder, is_trainable=is_trainable)
        with safe_open(weights, "pt") as file:
            saved = set(file.keys())
    except (RuntimeError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"The adapter in {folder} does not fit this base model: {error}") from error
    needed = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if saved != needed:
        raise UserError(
            f"The adapter in {folder} does not fit this base model or its own configuration: {len(needed - saved)} "
            f"weights are missing and {len(saved - needed)} find no place, such as {min(saved ^ needed)}."
        )
    return adapted


def lora_config(model: PreTrainedModel, settings: Settings) -> LoraConfig:
    """LoRA on the named linear layers of the language model, as a pattern of full paths.

    Plain names such as `q_proj` would match vision towers too (CLIP's attention has the same names).
    """
    options = settings.model
    _require_modules(model, options.lora_modules_to_save or [])
    return LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=_target_pattern(model, options.lora_target_modules or DEFAULT_TARGETS),
        modules_to_save=options.lora_modules_to_save,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        task_type="CAUSAL_LM",
        bias="none",
    )


def _require_modules(model: PreTrainedModel, names: Sequence[str]) -> None:
    """PEFT passes over a name in modules_to_save that matches nothing."""
    modules = [f".{name}" for name, _ in model.named_modules()]
    for wanted in names:
        if not any(name.endswith(f".{wanted}") for name in modules):
            raise UserError(f"--lora_modules_to_save {wanted} matches no module of {type(model).__name__}.")


def _target_pattern(model: PreTrainedModel, targets: str | list[str]) -> str:
    path = language_model_path(model)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    leaves = Counter(name.rpartition(".")[2] for name in linear if name.startswith(path + "."))
    names = list(leaves) if targets == "all-linear" else [targets] if isinstance(targets, str) else list(targets)
    missing = [name for name in names if name not in leaves]
    if missing:
        raise UserError(
            f"--lora_target_modules {' '.join(missing)} matches no linear layer of the language model ({path}). "
            f"There are: {', '.join(f'{name} ({count}x)' for name, count in sorted(leaves.items()))}; or all-linear."
        )
    return rf"{re.escape(path)}\..*\.({'|'.join(map(re.escape, names))})"


@dataclass(frozen=True)
class ParameterReport:
    """Where the trainable parameters are.

    Attributes:
        modules: for each kind of touched layer (`layers.*.self_attn.q_proj`) its count.
        num_trainable: trainable parameters.
        num_total: all parameters; a 4-bit weight counts as its unpacked size.
        outside: names of trainable parameters outside the language model.
    """

    modules: dict[str, int]
    num_trainable: int
    num_total: int
    outside: list[str]

    def lines(self) -> list[str]:
        """The report as text lines."""
        table = [f"  {count:4d} x {kind}" for kind, count in sorted(self.modules.items())]
        share = self.num_trainable / self.num_total
        return ["Adapters on:", *table, f"Trainable: {self.num_trainable:,} of {self.num_total:,} ({share:.3%})"]


def report_parameters(model: PeftModel) -> ParameterReport:
    """Lists what an adapter touches and how much of the model it trains."""
    path = "base_model.model." + language_model_path(model.get_base_model())
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    layers = {re.sub(r"\.(lora_|modules_to_save).*", "", name) for name in trainable}
    kinds = Counter(re.sub(r"\.\d+\.", ".*.", name.removeprefix("base_model.model.")) for name in layers)
    num_trainable, num_total = model.get_nb_trainable_parameters()
    outside = [name for name in trainable if not name.startswith(path + ".")]
    return ParameterReport(dict(kinds), num_trainable, num_total, outside)


def require_adapter_in_language_model(report: ParameterReport) -> None:
    """Stops a run whose adapter sits elsewhere than in the language model.

    Raises:
        UserError: trainable parameters outside of it.
    """
    if report.outside:
        raise UserError(
            f"{len(report.outside)} trainable parameters sit outside the language model, the first is "
            f"{report.outside[0]}. The vision tower and the merger stay frozen: change --lora_target_modules or "
            "--lora_modules_to_save, or train another --adapter."
        )


def _auto_class(config: PretrainedConfig) -> Any:
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _torch_dtype(settings: Settings) -> Any:
    name = settings.model.dtype
    return name if name in (None, "auto") else getattr(torch, name)


def _quantization(settings: Settings, config: PretrainedConfig) -> BitsAndBytesConfig | None:
    options = settings.model
    if not (options.load_in_4bit or options.load_in_8bit):
        return None
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
