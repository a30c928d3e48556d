"""The base model of one run, kept for the next one of the same process (a trial of a sweep), and its vision features.

Loading an 8B model takes longer than many a trial's first steps. Whatever happened to the run that used the base (it
finished, was stopped, ran out of memory), the next one gets it as it was loaded: the same modules with the same hooks,
no adapter, no gradients. Of the features only their room on disk is kept: each run hashes its images anew and finds
them in the store by their contents, since names and sizes do not tell that a picture is the same.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qvl import models
from qvl.compiled_layers import make_room_for_variants
from qvl.feature_store import Claim
from qvl.memory_use import give_back_unused
from qvl.settings import Settings

# Flags of ours that decide what the base is; upstream's are told by `ModelConfig`.
_OWN_FLAGS = ("num_image_tokens", "vision_")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LEFT_BY_PEFT = ("peft_config", "_hf_peft_config_loaded", "_require_grads_hook", "_require_grads_hooks")


@dataclass
class KeptBase:
    """What is kept. One run at a time may use it.

    Attributes:
        num_loaded: how many times a base was loaded from disk.
    """

    num_loaded: int = 0
    _model: PreTrainedModel | None = None
    _as_loaded: "_Structure | None" = None
    _key: str = ""
    _features_claim: Claim | None = None

    def load(self, settings: Settings, device: torch.device) -> PreTrainedModel:
        """The base model of a run: the kept one if it is the same, else a new one, which is kept from now on.

        Weights that training replaces (`--base_precision fp8`) are loaded anew each time.
        """
        key = _key_of(settings, device)
        is_lasting = settings.recipe.base_precision is None
        if is_lasting and self._model is not None and self._as_loaded is not None and key == self._key:
            self._as_loaded.restore(self._model)
            return self._model
        self.free()
        model = models.load_base(settings, device)
        self.num_loaded += 1
        if is_lasting:
            self._model, self._as_loaded, self._key = model, _Structure(model), key
        return model

    def clean(self) -> None:
        """Takes off what a run has left on the base and gives its memory back; to be called after each run.

        Raises:
            RuntimeError: the GPU answers this process no more.
        """
        if self._model is not None and self._as_loaded is not None:
            self._as_loaded.restore(self._model)
        make_room_for_variants()
        give_back_unused()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def free(self) -> None:
        """Lets the base go."""
        self._model = self._as_loaded = None
        self.clean()

    def keep_features(self, claim: Claim) -> None:
        """Keeps a run's features from being evicted until a later run has claimed its own."""
        if self._features_claim is not None:
            self._features_claim.release()
        self._features_claim = claim


class _Structure:
    """Modules, hooks and flags of a model as it is now."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._modules = dict(model.named_modules())
        self._hooks = {name: _hooks_of(module) for name, module in self._modules.items()}
        self._forwards = {name: module.__dict__.get("forward") for name, module in self._modules.items()}
        self._parameters = {name: (value, value.requires_grad) for name, value in model.named_parameters()}
        self._attributes = {name: model.__dict__[name] for name in _LEFT_BY_PEFT if name in model.__dict__}
        self._use_cache = model.config.use_cache

    def restore(self, model: PreTrainedModel) -> None:
        """Makes the model what it was; its weights are not touched."""
        for name, module in self._modules.items():
            parent, _, child = name.rpartition(".")
            if name and self._modules[parent]._modules.get(child) is not module:
                self._modules[parent]._modules[child] = module
            for kind, hooks in self._hooks[name].items():
                present = getattr(module, kind)
                for key in [key for key in present if key not in hooks]:
                    del present[key]
            _put_back(module.__dict__, "forward", self._forwards[name])
        for parameter, requires_grad in self._parameters.values():
            parameter.requires_grad_(requires_grad)
            parameter.grad = None
        for name in _LEFT_BY_PEFT:
            _put_back(model.__dict__, name, self._attributes.get(name))
        model.config.use_cache = self._use_cache
        model.eval()


def _hooks_of(module: nn.Module) -> dict[str, list[Any]]:
    return {kind: list(getattr(module, kind)) for kind in _HOOKS}


def _put_back(place: dict[str, Any], name: str, value: Any) -> None:
    place.pop(name, None)
    if value is not None:
        place[name] = value


def _key_of(settings: Settings, device: torch.device) -> str:
    """What `qvl.models.load_base` reads, as a text."""
    own: Mapping[str, Any] = asdict(settings.recipe)
    parts = {
        "device": str(device),
        "seed": settings.training.seed,
        "trust_remote_code": settings.training.trust_remote_code,
        "model_init_kwargs": settings.training.model_init_kwargs,
        **{name: value for name, value in asdict(settings.model).items() if "lora" not in name},
        **{name: value for name, value in own.items() if name.startswith(_OWN_FLAGS)},
    }
    return json.dumps(parts, default=str, sort_keys=True)
