"""LoRA flags beside `--adapter`, which brings LoRA of its own: they say what it has, or are refused."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qvl.adapters import DEFAULT_TARGETS
from qvl.errors import UserError
from qvl.settings import Settings

# Stages that put the adapter on to train it.
_TRAINING = ("check", "train")
# The end of the pattern that `adapters.lora_config` makes of names.
_NAMES = re.compile(r".*\\\.\(([^()]+)\)")


def settle_lora_flags(settings: Settings) -> None:
    """Gives LoRA flags the values that `--adapter` was made with; a recipe's defaults give way to them.

    What is recorded of a run is then what it trained or scored. A folder that holds no adapter is left to others.

    Args:
        settings: of the run; changed in place.

    Raises:
        UserError: the user asks for another LoRA than that of an adapter which would be trained.
    """
    adapter = settings.recipe.adapter
    path = Path(adapter or "", "adapter_config.json")
    if adapter is None or not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        return
    if set(_TRAINING) & set(settings.recipe.stages):
        _refuse_other_lora(settings, config, adapter)
    own = _flags_of(config)
    for name, value in own.items():
        setattr(settings.model, name, value)
    settings.given.update(own)


def _flags_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter_config.json as flags; lists of one are taken apart, as upstream does it."""
    targets = _target_names(config.get("target_modules") or [])
    return {
        "lora_r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "lora_dropout": config["lora_dropout"],
        "lora_target_modules": targets if len(targets) > 1 else next(iter(targets), None),
        # Files of older versions of PEFT have none of these.
        "use_rslora": config.get("use_rslora", False),
        "use_dora": config.get("use_dora", False),
    }


def _target_names(targets: str | Sequence[str]) -> list[str]:
    """Layers that an adapter is on, by name; a pattern that qvl has not made is a name of its own."""
    if not isinstance(targets, str):
        return sorted(targets)
    match = _NAMES.fullmatch(targets)
    return re.sub(r"\\(.)", r"\1", match[1]).split("|") if match else [targets]


def _refuse_other_lora(settings: Settings, config: Mapping[str, Any], adapter: str) -> None:
    own = {**_flags_of(config), "lora_modules_to_save": config.get("modules_to_save")}
    asked = {name: getattr(settings.model, name) for name in own if name in settings.by_user}
    others = [
        f"--{name} {_in_words(value)} (it has {_in_words(own[name])})"
        for name, value in asked.items()
        if not _is_met(name, value, own[name])
    ]
    if others:
        raise UserError(
            f"The adapter in {adapter} is trained further with the LoRA that it has, and this asks for another one: "
            f"{', '.join(others)}. Leave that out, or start a fresh adapter without --adapter."
        )


def _is_met(name: str, asked: Any, own: Any) -> bool:
    if name == "lora_modules_to_save":
        # An adapter's holds the parts too that are trained whole, which have flags of their own.
        return set(asked or []) <= set(own or [])
    if name == "lora_target_modules":
        asked, own = set(_listed(asked or DEFAULT_TARGETS)), set(_listed(own))
        # Only the model knows all its layers; the usual ones without one of them are not all.
        return bool(asked == own or (asked == {"all-linear"} and not own < set(DEFAULT_TARGETS)))
    return bool(asked == own)


def _listed(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _in_words(value: Any) -> str:
    if isinstance(value, str | list):
        return " ".join(_listed(value))
    return "none" if value is None else str(value).lower()
