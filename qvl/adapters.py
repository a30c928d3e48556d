"""Puts adapters where they belong: in the language model, chosen by path; and says what they touch."""

import itertools
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, set_seed

from qvl import unsloth_loader
from qvl.adapter_origin import read_trained_with
from qvl.clip_llm import require_same_composition
from qvl.errors import UserError
from qvl.flags import TRAINABLE_PARTS
from qvl.models import language_model_path
from qvl.settings import Settings
from qvl.trained_parts import TrainedPart, is_trained_whole, modules_to_save, trained_parts, whole_parts

_ADAPTER_WEIGHTS = "adapter_model.safetensors"
DEFAULT_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def add_adapter(model: PreTrainedModel, settings: Settings) -> PeftModel:
    """Puts a fresh LoRA adapter, or the one in `--adapter`, on a base model. Its LoRA weights are fp32.

    Raises:
        UserError: a target that matches nothing in the language model, a folder that is no adapter, or a part that is
            to be trained and is not there.
    """
    # PEFT draws the adapter's weights: seeded here so that a resumed or reused base gives the same ones.
    set_seed(settings.training.seed)
    parts = trained_parts(model, settings)
    if settings.recipe.adapter is None:
        config = lora_config(model, settings, parts)
        if unsloth_loader.is_chosen(settings):
            return unsloth_loader.place_lora(model, config, settings)
        return get_peft_model(model, config)
    adapted = load_adapter(model, Path(settings.recipe.adapter), is_trainable=True)
    if unsloth_loader.is_chosen(settings):
        unsloth_loader.prepare_loaded_lora(adapted, settings)
    _require_parts_in_adapter(adapted, parts, settings.recipe.adapter)
    return adapted


def _require_parts_in_adapter(model: PeftModel, parts: Sequence[TrainedPart], adapter: str) -> None:
    """An adapter goes on with what it was made of: PEFT gives it no further modules."""
    copies = [name for name, _ in model.named_parameters() if ".modules_to_save." in name]
    held = {name.partition(".modules_to_save.")[0] for name in copies}
    for part in parts:
        if not {f"base_model.model.{path}" for path in part.paths} <= held:
            raise UserError(
                f"--train_{part.name}: the adapter in {adapter} holds no {part.name} to train further. Leave "
                f"--train_{part.name} out, or start without --adapter."
            )


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
    require_same_composition(model, read_trained_with(folder) or {}, folder)
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
    # Checkpoints look there for the base's configuration, and the saved name may be that of an embedded model.
    adapted.peft_config["default"].base_model_name_or_path = model.config._name_or_path
    return adapted


def round_adapter_weights(folder: Path, dtype: torch.dtype) -> None:
    """Rewrites a saved adapter in the format that its base computes in.

    A projector as large as a composed model's is as good in 16 bits, which it is computed in, and half the size.

    Args:
        folder: of the adapter.
        dtype: of the base.
    """
    weights = folder / _ADAPTER_WEIGHTS
    rounded = {name: tensor.to(dtype) for name, tensor in load_file(weights).items()}
    save_file(rounded, weights, metadata={"format": "pt"})


def lora_config(model: PreTrainedModel, settings: Settings, parts: Sequence[TrainedPart] = ()) -> LoraConfig:
    """LoRA on the named linear layers of the language model, as a pattern of full paths; whole parts beside it.

    Plain names such as `q_proj` would match vision towers too (CLIP's attention has the same names).
    """
    options = settings.model
    whole = [*(options.lora_modules_to_save or []), *modules_to_save(parts)]
    _require_modules(model, options.lora_modules_to_save or [])
    return LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=_target_pattern(model, options.lora_target_modules or DEFAULT_TARGETS),
        modules_to_save=whole or None,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        task_type="CAUSAL_LM",
        bias="none",
    )


def require_modules_in_language_model(model: PreTrainedModel, settings: Settings) -> None:
    """Stops where `--lora_modules_to_save` names what is not in the language model; needs no weights.

    `require_adapter_in_language_model` would do so once there is an adapter, after a whole stage of answers.

    Args:
        model: a base without an adapter; its weights may be on the meta device.
        settings: whose flags count; an `--adapter` that is trained further brings modules of its own.

    Raises:
        UserError: a name that matches nothing, or modules outside the language model that no other flag asks for.
    """
    if settings.recipe.adapter is not None:
        return
    names = settings.model.lora_modules_to_save or []
    _require_modules(model, names)
    path, parts = language_model_path(model), trained_parts(model, settings)
    for wanted, (name, module) in itertools.product(names, model.named_modules()):
        # PEFT's own rule. What has no weights has nothing to train.
        is_meant = name.endswith(wanted) and next(module.parameters(), None) is not None
        if is_meant and not f"{name}.".startswith(f"{path}.") and not is_trained_whole(f"{name}.", parts):
            flags = " or ".join(f"--train_{part}" for part in whole_parts(model))
            raise UserError(
                f"--lora_modules_to_save {wanted}: {name} lies outside the language model ({path}). Name modules "
                f"inside of it{f', or train parts beside it with {flags}' if flags else ''}."
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
        outside: names of trainable parameters outside the language model and the parts that are trained whole.
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


def report_parameters(model: PeftModel, parts: Sequence[TrainedPart] = ()) -> ParameterReport:
    """Lists what an adapter touches and how much of the model it trains.

    Args:
        model: adapter on its base.
        parts: that are trained whole because they were asked for.
    """
    path = "base_model.model." + language_model_path(model.get_base_model())
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    layers = {re.sub(r"\.(lora_|modules_to_save).*", "", name) for name in trainable}
    kinds = Counter(re.sub(r"\.\d+\.", ".*.", name.removeprefix("base_model.model.")) for name in layers)
    num_trainable, num_total = model.get_nb_trainable_parameters()
    outside = [name for name in trainable if not name.startswith(path + ".") and not is_trained_whole(name, parts)]
    return ParameterReport(dict(kinds), num_trainable, num_total, outside)


def require_adapter_in_language_model(report: ParameterReport) -> None:
    """Stops a run whose adapter sits elsewhere than in the language model.

    Raises:
        UserError: trainable parameters outside of it.
    """
    if report.outside:
        flags = ", ".join(f"--train_{part}" for part in TRAINABLE_PARTS)
        raise UserError(
            f"{len(report.outside)} trainable parameters sit outside the language model, the first is "
            f"{report.outside[0]}. Such parts stay frozen unless they are asked for ({flags}): ask for what the "
            "--adapter holds, train another one, or change --lora_target_modules or --lora_modules_to_save."
        )
