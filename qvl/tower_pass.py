"""Reads every image of some data sets and runs the vision tower over them, many at once."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import datasets
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from qvl.encode import tokenize
from qvl.errors import UserError
from qvl.examples import image_sizes, transform_of
from qvl.feature_store import FeatureStore
from qvl.image_projector import projector_inputs
from qvl.image_refs import ImageRef, TableImage, load_refs, open_image
from qvl.images import ImageError, decode_rgb
from qvl.survey import num_visual_tokens

# 65,536 patches of Qwen-VL: 0.5 GiB for the widest activation (4304 in bf16) of Qwen3-VL-8B's tower.
_MAX_TOKENS_PER_BATCH = 16384
_IMAGES_HASHED_TOGETHER = 64
_NUM_WRITERS = 2

# An image's place: its table, where it lies in one, and the reference.
Place = tuple[str, ImageRef]


@dataclass(frozen=True)
class StoredImage:
    """An image and all that it takes to read it, in any process."""

    ref: ImageRef
    tables: Mapping[str, datasets.Dataset]
    where: str
    num_tokens: int

    def read(self) -> bytes:
        """The encoded image.

        Raises:
            UserError: it cannot be read; names the row.
        """
        try:
            with open_image(self.ref, self.tables) as file:
                return file.read()
        except ImageError as error:
            raise UserError(f'{self.where}: image "{self.ref.name}" {error}.') from error


def image_places(dataset: datasets.Dataset) -> dict[str, list[Place]]:
    """Places of a row's images, by the row's column `image_refs`: rows of one image and several answers share it."""
    tables = transform_of(dataset).tables
    return {
        refs: [(tables[ref.split]._fingerprint if isinstance(ref, TableImage) else "", ref) for ref in load_refs(refs)]
        for refs in set(dataset.with_format(None)["image_refs"][:])
    }


def distinct_images(
    data_sets: Sequence[datasets.Dataset], processing_class: ProcessorMixin
) -> dict[Place, StoredImage]:
    """Every image once, however many rows show it, with the visual tokens that it takes; nothing is opened."""
    images: dict[Place, StoredImage] = {}
    for dataset in data_sets:
        tables, places, stored = transform_of(dataset).tables, image_places(dataset), dataset.with_format(None)
        for refs, sizes, where in zip(stored["image_refs"][:], image_sizes(dataset), stored["where"][:], strict=True):
            for place, (width, height) in zip(places[refs], sizes, strict=True):
                num_tokens = num_visual_tokens(processing_class, height, width)
                images.setdefault(place, StoredImage(place[1], tables, where, num_tokens))
    return images


class _Contents:
    """SHA-256 of images' bytes, for a data loader."""

    def __init__(self, images: Sequence[StoredImage]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> str:
        return hashlib.sha256(self.images[index].read()).hexdigest()


def content_hashes(images: Sequence[StoredImage], num_workers: int) -> list[str]:
    """Hashes every image anew: sizes and dates of files do not tell that a picture is the same."""
    loader: DataLoader[list[str]] = DataLoader(
        _Contents(images),  # type: ignore[arg-type]
        batch_size=_IMAGES_HASHED_TOGETHER,
        collate_fn=list,
        # Starting a worker takes longer than hashing a few hundred files.
        num_workers=min(num_workers, len(images) // (4 * _IMAGES_HASHED_TOGETHER)),
    )
    with tqdm(total=len(images), desc="hashing images", unit="image") as bar:
        hashes: list[str] = []
        for some in loader:
            hashes += some
            bar.update(len(some))
    return hashes


class _Pictures:
    """Decoded images by key, for a data loader."""

    def __init__(self, images: Mapping[str, StoredImage]) -> None:
        self.images = images

    def __getitem__(self, key: str) -> Any:
        image = self.images[key]
        data = image.read()
        if hashlib.sha256(data).hexdigest() != key.split("/")[1]:
            raise UserError(f'{image.where}: image "{image.ref.name}" is being changed while it is used: start again.')
        try:
            return decode_rgb(data)
        except ImageError as error:
            raise UserError(f'{image.where}: image "{image.ref.name}" {error}.') from error


class _PixelCollator:
    """The processor's image inputs, made in the same way as for a training batch."""

    def __init__(self, processing_class: ProcessorMixin) -> None:
        self.processing_class = processing_class

    def __call__(self, pictures: list[Any]) -> dict[str, torch.Tensor]:
        placeholders = [cast(Any, self.processing_class).image_token] * len(pictures)
        return tokenize(placeholders, pictures, self.processing_class)[1]


def compute_features(
    model: PreTrainedModel,
    processing_class: ProcessorMixin,
    missing: Mapping[str, StoredImage],
    store: FeatureStore,
    batch_size: int,
    num_workers: int,
) -> None:
    """Runs the tower over images, many at once, and writes what comes out while it goes on.

    Args:
        model: a base model on its device.
        processing_class: its processor.
        missing: images by key, see `FeatureStore`; the key's second half is the SHA-256 of the image's bytes.
        store: where the features go.
        batch_size: images of a batch, fewer where they are large.
        num_workers: processes that read, decode and process images.

    Raises:
        UserError: an image that cannot be decoded or is not what its key says; a full disk.
    """
    batches = list(_batches(missing, batch_size))
    loader: DataLoader[dict[str, torch.Tensor]] = DataLoader(
        _Pictures(missing),  # type: ignore[arg-type]
        batch_sampler=batches,
        collate_fn=_PixelCollator(processing_class),
        num_workers=min(num_workers, len(batches)),
        pin_memory=model.device.type == "cuda",
    )
    was_training = model.training
    model.eval()
    bar = tqdm(total=len(missing), desc="vision features", unit="image", disable=not missing)
    with torch.inference_mode(), ThreadPoolExecutor(_NUM_WRITERS) as writers, bar:
        writing: list[Future[None]] = []
        for keys, inputs in zip(batches, loader, strict=True):
            features = _features(model, inputs).cpu()
            grids = inputs["image_grid_thw"].tolist() if "image_grid_thw" in inputs else [None] * len(keys)
            parts = features.split([missing[key].num_tokens for key in keys])
            for future in writing:  # of the batch before: no more than two batches wait in memory
                future.result()
            writing = [writers.submit(store.put, *entry) for entry in zip(keys, parts, grids, strict=True)]
            bar.update(len(keys))
        for future in writing:
            future.result()
    model.train(was_training)


def _features(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Features of several images, (num_visual_tokens, size), on the model's device.

    The size is (1 + num_deepstack) * hidden_size, or for models with a projector that of its inputs.
    """
    on_device = {name: value.to(model.device, non_blocking=True) for name, value in inputs.items()}
    if hasattr(model.base_model, "multi_modal_projector"):
        return projector_inputs(model, **on_device)
    output = cast(Any, model).get_image_features(**on_device, return_dict=True)
    layers = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
    return torch.cat([torch.cat(list(images)) for images in layers], dim=1)


def _batches(images: Mapping[str, StoredImage], batch_size: int) -> Iterator[list[str]]:
    """Keys in batches, the largest images first: what does not fit the memory shows at once."""
    batch: list[str] = []
    limit = batch_size
    for key in sorted(images, key=lambda key: -images[key].num_tokens):
        if len(batch) >= limit:
            yield batch
            batch = []
        if not batch:
            limit = min(batch_size, math.ceil(_MAX_TOKENS_PER_BATCH / images[key].num_tokens))
        batch.append(key)
    if batch:
        yield batch
