"""Does LoRA sit where it was asked for and nowhere else. Every training asks, so nothing here needs bitsandbytes."""

from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from qvl.adapters import DEFAULT_TARGETS
from qvl.checks import Check, none_of
from qvl.models import language_model_path
from qvl.trained_parts import TrainedPart, is_trained_whole


def check_lora_placement(
    model: PeftModel, targets: str | list[str] | None, rank: int, parts: Sequence[TrainedPart] = ()
) -> list[Check]:
    """LoRA sits on every layer that was asked for and on no other, and trains as much as that comes to.

    Args:
        model: an adapter on its base, LoRA not frozen.
        targets: `--lora_target_modules`.
        rank: `--lora_r`.
        parts: that are trained whole beside it.
    """
    base = model.get_base_model()
    path = language_model_path(base) + "."
    leaves = DEFAULT_TARGETS if targets is None else [targets] if isinstance(targets, str) else targets
    adapted = {name for name, layer in base.named_modules() if isinstance(layer, LoraLayer)}
    linears: dict[str, Any] = {
        name: layer
        for name, layer in base.named_modules()
        if isinstance(layer, nn.Linear | LoraLayer) and ".lora_" not in name and not name.endswith(".base_layer")
    }
    asked = {
        name
        for name in linears
        if name.startswith(path) and (leaves == ["all-linear"] or name.rpartition(".")[2] in leaves)
    }
    wrong = sorted(asked ^ adapted)
    num_computed = sum(rank * (linears[name].in_features + linears[name].out_features) for name in asked)
    num_found = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (".lora_A." in name or ".lora_B." in name)
    )
    _, num_total = model.get_nb_trainable_parameters()
    return [
        Check(
            "lora_where_asked", len(wrong), f"0 of {len(asked)} differ", not wrong and bool(asked), ", ".join(wrong[:3])
        ),
        Check(
            "trainable_share_as_computed",
            num_found / num_total,
            f"= {num_computed / num_total:.6g}",
            num_found == num_computed,
            f"{num_found:,} of {num_total:,} parameters, rank {rank}",
        ),
        check_no_adapter_on_frozen_parts(model, parts),
    ]


def check_no_adapter_on_frozen_parts(model: PeftModel, parts: Sequence[TrainedPart] = ()) -> Check:
    """No LoRA weight, trained or not, outside the language model; no copy of a module there but of `parts`."""
    path = f"base_model.model.{language_model_path(model.get_base_model())}."
    outside = [
        name
        for name, _ in model.named_parameters()
        if not name.startswith(path)
        and (".lora_" in name or (".modules_to_save." in name and not is_trained_whole(name, parts)))
    ]
    return none_of("no_adapter_on_frozen_parts", outside, sum(1 for _ in model.parameters()))
