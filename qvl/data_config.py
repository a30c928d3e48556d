"""What a run asks of its data: one settings object, filled from the command line by `qvl.recipe`."""

from collections.abc import Callable
from dataclasses import dataclass

from qvl.errors import UserError

FLICKR8K_CAPTION_COLUMNS = ("caption_0", "caption_1", "caption_2", "caption_3", "caption_4")


@dataclass(frozen=True)
class MixedSet:
    """One entry of the `datasets:` list; the names are those of `trl.scripts.utils.DatasetConfig`.

    Attributes:
        path: hub id, folder or file, as --dataset_name takes it.
        name: the hub data set's configuration.
        split: the split to train on; None for --dataset_train_split.
        fraction: its share of the mixture, relative to the others'; None in all entries for all rows of all.
    """

    path: str
    name: str | None = None
    split: str | None = None
    fraction: float | None = None


@dataclass(frozen=True)
class DataConfig:
    """Where the rows come from, how they are read, and how many are used.

    Attributes:
        dataset_name: hub id, `qvl/scenes` or `qvl/chats`, a local `.jsonl` file, or a local folder with a
            `captions.jsonl` or, without one, a `.jsonl` file for each split.
        dataset_config: the hub data set's configuration, if it has several.
        dataset_train_split: split to train on.
        dataset_test_split: split to evaluate on; the same name as the training split means: split that one by image.
        instruction: the prompt of caption rows; may hold `<image>` to mark the image's place.
        image_column: key or column of the image in caption and instruction rows.
        caption_columns: keys or columns of the captions where a row has no list `captions`.
        captions_per_image: how many of a row's captions are trained on (the first ones).
        num_train_examples: at most this many rows (images) are trained on; None for all.
        num_eval_examples: at most this many rows are evaluated on; None for all of a named split, for a tenth of the
            rows when the data are split by image.
        seed: governs the split by image and the generated scenes.
        skip_bad_rows: go on without the rows that are wrong, and record them.
        allow_remote_images: fetch images given as http(s) URLs.
        allow_outside_images: accept relative image paths that leave the data folder.
        dataset_revision: the hub data set's commit, branch or tag.
        datasets: several data sets instead of `dataset_name`, mixed by weight.
        size_refusal: of a width and a height in pixels says why the model takes no image of that size; None where it
            does. Without it every size is taken.
    """

    dataset_name: str
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"
    instruction: str = "Describe the image in one sentence."
    image_column: str = "image"
    caption_columns: tuple[str, ...] = FLICKR8K_CAPTION_COLUMNS
    captions_per_image: int = 1
    num_train_examples: int | None = None
    num_eval_examples: int | None = None
    seed: int = 42
    skip_bad_rows: bool = False
    allow_remote_images: bool = False
    allow_outside_images: bool = False
    dataset_revision: str | None = None
    datasets: tuple[MixedSet, ...] = ()
    size_refusal: Callable[[int, int], str | None] | None = None

    def __post_init__(self) -> None:
        """Refuses counts below one.

        Raises:
            UserError: a count is smaller than 1.
        """
        for name in ("captions_per_image", "num_train_examples", "num_eval_examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} {value}: has to be 1 or more.")
