"""What the stages of one invocation share."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback

from qvl import models, run_folder
from qvl.data import DataConfig, LoadedData, load_examples
from qvl.encode import ProcessingClass
from qvl.errors import UserError
from qvl.feature_store import default_folder
from qvl.features import FeatureTable, cache_features, with_cached_features
from qvl.image_words import Tags, answer_words, images_as_words, zero_shot_tags
from qvl.kept_base import KeptBase
from qvl.mixture import read_mixture
from qvl.processes import is_main
from qvl.rows import RowToExample
from qvl.settings import Settings
from qvl.sharding import Sharding, loading_in_pieces, sharding
from qvl.survey import size_refusal
from qvl.text_scores import TextScore
from qvl.tracking import RunRecord


@dataclass
class Run:
    """What the stages of one invocation share.

    Attributes:
        name: the recipe's name.
        settings: all of them.
        folder: the run folder.
        data: training and evaluation examples.
        processing_class: the model's processor, or tokenizer.
        record: the MLflow run.
        own_scores: the recipe's own scores, by name.
        base: the base model once a stage has loaded it; never holds an adapter between stages.
        kept: what an earlier run of this process has left, and a later one gets; None for a process of one run.
        callbacks: of the trainer, for whoever follows the training from outside.
        predicted_gib: what each part of metrics.json was predicted to hold at most; those that can be predicted.
    """

    name: str
    settings: Settings
    folder: Path
    data: LoadedData
    processing_class: ProcessingClass
    record: RunRecord
    own_scores: Mapping[str, TextScore] = field(default_factory=dict)
    base: PreTrainedModel | None = field(default=None)
    kept: KeptBase | None = None
    callbacks: Sequence[TrainerCallback] = ()
    predicted_gib: Mapping[str, float] = field(default_factory=dict)
    _features: FeatureTable | None = field(default=None, init=False)
    _tags: Tags | None = field(default=None, init=False)

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.settings.training.device

    def load_base(self) -> PreTrainedModel:
        """The base model, loaded by the first stage that needs it."""
        if self.base is None:
            print(f"Loading {self.settings.model.model_name_or_path} ...", flush=True)
            # A trainer and its model hold each other: what is left of them makes room first.
            gc.collect()
            load = self.kept.load if self.kept else models.load_base
            self.base = load(self.settings, self.device)
        return self.base

    def load_base_to_train(self) -> PreTrainedModel:
        """The base model as it is trained; where processes share it out, one of its own that no other stage gets."""
        if sharding() is Sharding.NOTHING:
            return self.load_base()
        self.base = None
        gc.collect()
        print(f"Loading {self.settings.model.model_name_or_path} for {sharding().value} ...", flush=True)
        with loading_in_pieces(self.settings):
            return models.load_base(self.settings, self.device, to_share_out=sharding().in_pieces)

    def in_words(self, examples: datasets.Dataset) -> datasets.Dataset:
        """Rows of the run, with `--vision_mode text` words in place of pictures."""
        if self.settings.recipe.vision_mode != "text":
            return examples
        if self._tags is None:
            both = [self.data.train, self.data.evaluation]
            self._tags = zero_shot_tags(self.settings, self.device, both, answer_words(self.data.train))
        return images_as_words(examples, self._tags)

    def for_model(self, examples: datasets.Dataset) -> datasets.Dataset:
        """Rows of the run as its model reads them: words or cached features may stand in place of pictures."""
        examples = self.in_words(examples)
        flags = self.settings.recipe
        if not flags.cache_vision_features:
            return examples
        if self._features is None:
            self._features = cache_features(
                self.load_base(),
                self.processing_class,
                [self.data.train, self.data.evaluation],
                Path(flags.vision_cache_dir) if flags.vision_cache_dir else default_folder(),
                flags.vision_cache_gib,
                self.settings.training.per_device_eval_batch_size,
                self.settings.training.dataloader_num_workers,
            )
            if self.kept is not None:
                self.kept.keep_features(self._features.claim)
        return with_cached_features(examples, self._features)

    def predicted_peak(self, part: str) -> dict[str, float]:
        """The predicted peak of a part as a value for its metrics; none where nothing was predicted."""
        return {"predicted_peak_gib": self.predicted_gib[part]} if part in self.predicted_gib else {}

    def put_metrics(self, part: str, values: dict[str, Any]) -> None:
        """Updates metrics.json and, with the same numbers, MLflow; of several processes the main one does."""
        if not is_main():
            return
        whole = run_folder.update_metrics(self.folder, part, values)
        self.record.log_metrics(run_folder.flat_metrics({part: whole[part]}))


def load_data(
    settings: Settings, row_to_example: RowToExample | None, processing_class: ProcessingClass | None
) -> LoadedData:
    """The rows the settings name, as examples.

    Args:
        settings: of the run.
        row_to_example: the recipe's own piece.
        processing_class: the run's; a row with an image that it refuses for its size is a bad row. None where it
            cannot be had, and images of every size are taken.

    Raises:
        UserError: unreachable data, unknown splits or columns, bad rows.
    """
    flags = settings.recipe
    if flags.dataset_name is None and not flags.datasets:
        raise UserError("No data set is named: --dataset_name.")
    mixture = read_mixture(flags.datasets or [])
    config = DataConfig(
        dataset_name=str(flags.dataset_name),
        datasets=mixture,
        dataset_config=flags.dataset_config,
        dataset_revision=flags.dataset_revision,
        dataset_train_split=flags.dataset_train_split,
        dataset_test_split=flags.dataset_test_split,
        instruction=flags.instruction,
        image_column=flags.image_column,
        caption_columns=tuple(flags.caption_columns),
        captions_per_image=flags.captions_per_image,
        num_train_examples=flags.num_train_examples,
        num_eval_examples=flags.num_eval_examples,
        seed=settings.training.seed,
        skip_bad_rows=flags.skip_bad_rows,
        allow_remote_images=flags.allow_remote_images,
        allow_outside_images=flags.allow_outside_images,
        size_refusal=_size_refusal(settings, processing_class),
    )
    return load_examples(config, row_to_example)


def _size_refusal(
    settings: Settings, processing_class: ProcessingClass | None
) -> Callable[[int, int], str | None] | None:
    if isinstance(processing_class, ProcessorMixin) and settings.recipe.vision_mode != "text":
        return partial(size_refusal, processing_class)
    return None
