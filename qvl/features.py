"""What a frozen vision tower makes of every image, computed once: for all epochs, stages and runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import datasets
import transformers
from packaging.version import Version
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from qvl.encode import ProcessingClass
from qvl.errors import UserError
from qvl.examples import with_features
from qvl.feature_store import Claim, FeatureStore, ImageFeatures
from qvl.files import write_json_atomically
from qvl.models import without_adapter
from qvl.tower_pass import Place, StoredImage, compute_features, content_hashes, distinct_images, image_places
from qvl.vision_fingerprint import bytes_per_visual_token, describe_vision, vision_fingerprint, vision_modules

# What a model gives and takes differs between families; these are compared with pixels by tests/test_features.py.
_FAMILIES = ("qwen3_vl", "qwen2_5_vl", "llava")
# Families of which the projector's inputs are kept, so that it can be trained: those are the smaller ones too.
_BEFORE_PROJECTOR = ("llava",)
_LLAVA_TOWERS = ("clip_vision_model", "siglip_vision_model")
_OLDEST_TRANSFORMERS = "5.18"


class FeatureTable:
    """Where the features of each image of some data sets lie.

    Attributes:
        claim: keeps the features from being evicted; `claim.release()` ends that, else the process's end does.
    """

    def __init__(self, handles: Mapping[Place, ImageFeatures], claim: Claim) -> None:
        self._handles = handles
        self.claim = claim

    def rows(self, dataset: datasets.Dataset) -> list[list[ImageFeatures]]:
        """Features of each row's images, in reading order."""
        handles = {refs: [self._handles[place] for place in places] for refs, places in image_places(dataset).items()}
        return [handles[refs] for refs in dataset.with_format(None)["image_refs"][:]]


def refuse_uncacheable(config: PretrainedConfig) -> None:
    """Stops `--cache_vision_features` where it cannot work; needs no weights.

    Raises:
        UserError: a text-only model, a family that was not compared with pixels, or transformers before 5.18.
    """
    vision = getattr(config, "vision_config", None)
    flag = "leave out --cache_vision_features"
    if vision is None:
        raise UserError(f"{config.model_type} takes text only, so there are no vision features to cache: {flag}.")
    if config.model_type not in _FAMILIES or (config.model_type == "llava" and vision.model_type not in _LLAVA_TOWERS):
        raise UserError(
            f"Cached vision features are not proven to equal fresh ones for {config.model_type} with "
            f"{vision.model_type}, only for {', '.join(_FAMILIES)} (llava with CLIP or SigLIP): {flag}."
        )
    if Version(transformers.__version__) < Version(_OLDEST_TRANSFORMERS):
        raise UserError(
            f"transformers {transformers.__version__} takes no vision features that were computed before "
            f"(`mm_encoder_outputs`): install {_OLDEST_TRANSFORMERS} or newer, or {flag}."
        )


def require_frozen_vision(model: PeftModel) -> None:
    """Stops a run whose adapter changes what the vision tower gives.

    Raises:
        UserError: an adapter, or a module trained as a whole, sits in the vision tower or merger.
    """
    touched = [
        f"{part}.{name}"
        for part, module in vision_modules(model).items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad or ".lora_" in name or "modules_to_save" in name
    ]
    if touched:
        raise UserError(
            f"{len(touched)} parameters of the adapter sit in the vision part, the first is {touched[0]}: features "
            "computed without it would be wrong. Leave out --cache_vision_features, or change --lora_target_modules "
            "and --lora_modules_to_save."
        )


def encoder_inputs(batch: Mapping[str, Any], model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    """Turns a batch's `image_features` into what the model takes in place of pixels.

    Args:
        batch: inputs of `forward` or `generate`, on the model's device; without `image_features` it stays as it is.
        model: of one of the families that `refuse_uncacheable` lets pass.

    Returns:
        The batch with `mm_encoder_outputs`. The images of the batch stand in it as one, which saves asking the device
        for their lengths; only beam search and several answers a prompt would need them apart.
    """
    inputs = dict(batch)
    features = inputs.pop("image_features", None)
    if features is None:
        return inputs
    if model.config.model_type in _BEFORE_PROJECTOR:
        base = without_adapter(model)
        projected = cast(Any, base.base_model).multi_modal_projector(features)
        return {**inputs, "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=(projected,))}}
    pooled, *deepstack = features.split(model.config.get_text_config().hidden_size, dim=1)
    if deepstack:
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        output = BaseModelOutputWithDeepstackFeatures(
            pooler_output=(pooled,), deepstack_features=[(layer,) for layer in deepstack]
        )
    else:
        output = BaseModelOutputWithPooling(pooler_output=(pooled,))
    return {**inputs, "mm_encoder_outputs": {"image": output}}


def with_cached_features(dataset: datasets.Dataset, table: FeatureTable) -> datasets.Dataset:
    """The same rows, whose `images` are `ImageFeatures` that workers read instead of decoding pictures.

    Args:
        dataset: one that `cache_features` has seen, or rows of it; completions together or apart.
        table: from `cache_features`.
    """
    return with_features(dataset, table.rows(dataset))


def cache_features(
    model: PreTrainedModel | PeftModel,
    processing_class: ProcessingClass,
    data_sets: Sequence[datasets.Dataset],
    folder: Path,
    max_gib: float,
    batch_size: int,
    num_workers: int,
) -> FeatureTable:
    """Makes sure that the features of all images of some data sets lie on disk, and computes those that do not.

    An entry's key is made of the tower's and merger's weights and settings, the image processor's settings, the
    versions of the libraries that process images, the kind of device, and the picture's bytes. So nothing stale is
    ever found, and one picture under two names is one entry.

    Args:
        model: on its device, its vision part frozen.
        processing_class: its processor.
        data_sets: made by `qvl.data`.
        folder: of the shared cache.
        max_gib: most that the cache may fill; entries of other runs are evicted for it.
        batch_size: images that go through the tower together, fewer where they are large.
        num_workers: processes that read and decode.

    Raises:
        UserError: see `refuse_uncacheable` and `require_frozen_vision`; an image that cannot be read; no room.
    """
    refuse_uncacheable(model.config)
    if isinstance(model, PeftModel):
        require_frozen_vision(model)
        model = without_adapter(model)
    processor = cast(ProcessorMixin, processing_class)
    images = distinct_images(data_sets, processor)
    namespace = vision_fingerprint(model, processor)
    hashes = content_hashes(list(images.values()), num_workers)
    keys = {place: f"{namespace}/{content}" for place, content in zip(images, hashes, strict=True)}
    by_key = {key: images[place] for place, key in keys.items()}
    token_bytes = bytes_per_visual_token(model)
    store = FeatureStore(folder, max_gib)
    sizes = {key: image.num_tokens * token_bytes for key, image in by_key.items()}
    claim = store.claim(sizes)
    with store.writing(namespace) as namespace_folder:
        missing = {key: image for key, image in by_key.items() if store.get(key) is None}
        print(_plan(sizes, missing, store), flush=True)
        write_json_atomically(namespace_folder / "made_with.json", describe_vision(model, processor))
        compute_features(model, processor, missing, store, batch_size, num_workers)
    entries = {key: store.get(key) for key in by_key}
    return FeatureTable({place: cast(ImageFeatures, entries[key]) for place, key in keys.items()}, claim)


def _plan(sizes: Mapping[str, int], missing: Mapping[str, StoredImage], store: FeatureStore) -> str:
    gib = sum(sizes.values()) / 2**30
    missing_gib = sum(sizes[key] for key in missing) / 2**30
    todo = f"{len(missing):,} of them ({missing_gib:.2f} GiB) are computed now" if missing else "all are there already"
    return (
        f"Vision features of {len(sizes):,} images need {gib:.2f} GiB in {store.folder} (limit {store.max_gib:g}); "
        f"{todo}."
    )
