"""What is trained beside LoRA: whole parts of the model, each asked for by a flag, at a learning rate of its own.

One list, `trained_parts`, is what everybody reads: PEFT, which copies these modules and saves them with the adapter
(`modules_to_save`); the checks of what may move; the feature cache, which cannot keep what changes; the optimizer.

A part has a name, `--train_<name>` and `--<name>_learning_rate`. Where it lies in a model is said by `whole_parts`.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from qvl.errors import UserError
from qvl.flags import TRAINABLE_PARTS
from qvl.settings import Settings

# Children of a Qwen-VL vision model that map its features to the language model; DeepStack's do so for inner layers.
_MERGERS = ("merger", "deepstack_merger_list")
_IN_PEFT = "base_model.model."


@dataclass(frozen=True)
class TrainedPart:
    """A part of the model that is trained whole.

    Attributes:
        name: one of `qvl.flags.TRAINABLE_PARTS`.
        paths: of its modules in the base model; each is one that PEFT can copy and call.
        learning_rate: its own, None for the run's.
    """

    name: str
    paths: tuple[str, ...]
    learning_rate: float | None = None

    def holds(self, parameter_name: str) -> bool:
        """Whether a parameter, by its name in the base or in an adapted model, belongs to this part."""
        return parameter_name.removeprefix(_IN_PEFT).startswith(tuple(f"{path}." for path in self.paths))


def whole_parts(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Paths of the modules of each part that a model has.

    A list of modules is never called itself, and PEFT's copies take the place of what is called: so every block of a
    tower stands for itself.

    Args:
        model: a base without an adapter; its weights may be on the meta device.
    """
    projector = getattr(model.base_model, "multi_modal_projector", None)
    if projector is not None:
        return {"projector": (next(name for name, module in model.named_modules() if module is projector),)}
    vision = getattr(model.base_model, "visual", None)
    if vision is None:
        return {}
    path = next(name for name, module in model.named_modules() if module is vision)
    parts: dict[str, list[str]] = {"merger": [], "vision_tower": []}
    for name, child in vision.named_children():
        part = parts["merger" if name in _MERGERS else "vision_tower"]
        if isinstance(child, nn.ModuleList):
            part += [f"{path}.{name}.{index}" for index in range(len(child))]
        elif any(True for _ in child.parameters()):
            part.append(f"{path}.{name}")
    return {name: tuple(paths) for name, paths in parts.items()}


def names_of_trained_parts(settings: Settings) -> list[str]:
    """Names of the parts that the flags ask for; with images as text there is no projector."""
    recipe = settings.recipe
    without = ("projector",) if recipe.vision_mode == "text" else ()
    return [name for name in TRAINABLE_PARTS if getattr(recipe, f"train_{name}") and name not in without]


def trained_parts(model: PreTrainedModel, settings: Settings) -> list[TrainedPart]:
    """The parts that the run's flags ask for.

    Args:
        model: the base without an adapter; its weights may be on the meta device.
        settings: with `--train_<name>` and `--<name>_learning_rate` of each part.

    Raises:
        UserError: this model has no such part, or its weights are quantized.
    """
    there = whole_parts(model)
    parts = []
    for name in names_of_trained_parts(settings):
        if name not in there:
            raise UserError(f"--train_{name}: {type(model).__name__} has none, so there is nothing to train.")
        part = TrainedPart(name, there[name], getattr(settings.recipe, f"{name}_learning_rate"))
        packed = [key for key, value in model.named_parameters() if part.holds(key) and not value.is_floating_point()]
        if packed:
            raise UserError(
                f"--train_{name}: {packed[0]} is quantized in this checkpoint, and quantized weights cannot be "
                "trained. Start from the checkpoint in 16 bits; --load_in_4bit leaves vision parts as they are."
            )
        parts.append(part)
    return parts


def modules_to_save(parts: Sequence[TrainedPart]) -> list[str]:
    """What PEFT is to copy, train and save: full paths, since it takes a name for the end of one."""
    return [path for part in parts for path in part.paths]


def is_trained_whole(parameter_name: str, parts: Sequence[TrainedPart]) -> bool:
    """Whether a parameter belongs to one of the parts."""
    return any(part.holds(parameter_name) for part in parts)


def optimizer_groups(
    model: nn.Module,
    parts: Sequence[TrainedPart],
    decaying: Collection[str],
    learning_rate: float,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Parameter groups of a torch optimizer: what trains at the run's learning rate first, then part by part.

    Args:
        model: its trainable parameters are the ones to group.
        parts: those with a learning rate of their own get groups of their own.
        decaying: names of parameters that weight decay applies to; the others (norms, biases) get none.
        learning_rate: the run's.
        weight_decay: of the `decaying`.
    """
    apart = [part for part in parts if part.learning_rate is not None]
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {
        (name, decays): [] for name in ("", *(part.name for part in apart)) for decays in (True, False)
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next((part.name for part in apart if part.holds(name)), "")
            groups[part, name in decaying].append(parameter)
    rates = {"": learning_rate, **{part.name: part.learning_rate for part in apart}}
    return [
        {"params": parameters, "lr": rates[name], "weight_decay": weight_decay if decays else 0.0}
        for (name, decays), parameters in groups.items()
        if parameters
    ]


def round_to_base(model: PeftModel) -> None:
    """Gives modules that are trained whole the format of those they stand for, for good.

    They train in fp32, where small updates add up. The base computes in 16 bits, and so do they once they are loaded
    on it: what is measured and saved after the training is what will be loaded.
    """
    for trained, original in _trained_and_original(model):
        trained.data = trained.data.to(original.dtype)


@contextmanager
def rounded_to_base(model: nn.Module) -> Iterator[None]:
    """`round_to_base` for a while, such as an evaluation in the midst of a training."""
    masters = [(trained, trained.data) for trained, _ in _trained_and_original(model)]
    for trained, original in _trained_and_original(model):
        trained.data = trained.data.to(original.dtype)
    try:
        yield
    finally:
        for trained, data in masters:
            trained.data = data


def take_off(model: PeftModel) -> PreTrainedModel:
    """The base without its adapter, as it was before: `unload` would leave the modules that were trained whole."""
    base: PreTrainedModel = model.get_base_model()
    originals = {
        name: module.original_module
        for name, module in base.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    model.unload()
    for name, module in originals.items():
        base.set_submodule(name, module)
    return base


def _trained_and_original(model: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for adapter in module.active_adapters:
                yield from zip(
                    module.modules_to_save[adapter].parameters(), module.original_module.parameters(), strict=True
                )
