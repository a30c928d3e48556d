"""What decides the features of an image beside the image itself: another value of any of it, other features."""

import hashlib
import importlib.metadata
import json
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from qvl.checks import tensor_hash
from qvl.models import without_adapter


def vision_fingerprint(model: PreTrainedModel, processing_class: ProcessorMixin) -> str:
    """Stands for all that decides an image's features but the image: another value, other features."""
    weights = {
        f"{part}.{name}": [str(tensor.dtype), list(tensor.shape), tensor_hash(tensor)]
        for part, module in vision_modules(model).items()
        for name, tensor in module.state_dict(keep_vars=True).items()
    }
    whole = json.dumps([weights, describe_vision(model, processing_class)], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()[:32]


def describe_vision(model: PreTrainedModel, processing_class: ProcessorMixin) -> dict[str, Any]:
    """Settings beside the weights, as JSON values; also what a person finds in a namespace's folder."""
    config, image_processor = model.config, cast(Any, processing_class).image_processor
    # Which attention kernel runs, and where the weights came from, is not what they compute.
    vision = {
        key: value
        for key, value in config.vision_config.to_dict().items()
        if not key.startswith("_") and key not in ("dtype", "transformers_version")
    }
    model_keys = ("model_type", "vision_feature_layer", "vision_feature_select_strategy")
    processor_keys = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")
    described = {
        "model": {key: getattr(config, key, None) for key in model_keys},
        "vision_config": vision,
        "processor": {key: getattr(processing_class, key, None) for key in processor_keys},
        "image_processor": {"class": type(image_processor).__name__, **image_processor.to_dict()},
        # They decode and resize: another version may give other values in the last bit.
        "versions": {name: _version(name) for name in ("transformers", "torchvision", "pillow")},
        "device": model.device.type,
        "dtype": str(vision_dtype(model)),
    }
    return cast(dict[str, Any], json.loads(json.dumps(described, default=str)))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # torchvision is needed by some processors only


def vision_modules(model: nn.Module) -> dict[str, nn.Module]:
    """What an image has passed once its features are kept: tower and merger; a projector comes behind.

    Nothing of a model of text alone, which is its decoder.
    """
    base = without_adapter(model)
    if base.get_decoder() is base.base_model:
        return {}
    later = (base.get_decoder(), getattr(base.base_model, "multi_modal_projector", None))
    return {name: module for name, module in base.base_model.named_children() if not any(module is m for m in later)}


def vision_dtype(model: PreTrainedModel) -> torch.dtype:
    """Of the tower's weights, and so of its features."""
    return next(parameter.dtype for part in vision_modules(model).values() for parameter in part.parameters())


def bytes_per_visual_token(model: PreTrainedModel) -> int:
    """Of the features of one visual token: for the embedding, and for each layer that DeepStack adds to.

    Of models with a projector: of what it is given.
    """
    projector = getattr(model.base_model, "multi_modal_projector", None)
    if projector is not None:
        return int(projector.linear_1.in_features * vision_dtype(model).itemsize)
    num_deepstack = len(getattr(model.config.vision_config, "deepstack_visual_indexes", []))
    return int((1 + num_deepstack) * model.config.get_text_config().hidden_size * vision_dtype(model).itemsize)
