"""Checked rows -> `datasets.Dataset` objects whose pictures are decoded on access, and functions over them."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import datasets
import pyarrow as pa
from PIL import Image

from qvl.conversations import Message, assistant_message
from qvl.errors import UserError
from qvl.feature_store import ImageFeatures, dump_features, load_features
from qvl.image_refs import ImageRef, dump_refs, load_refs, open_image
from qvl.images import ImageError, decode_rgb
from qvl.validate import GoodRow

# What a row and its images are known by.
_KNOWN_BY = ("id", "where", "image_names", "image_keys")
# Messages are JSON text: Arrow refuses a column whose values have different shapes.
_FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "where": datasets.Value("string"),
        "image_names": datasets.List(datasets.Value("string")),
        "image_keys": datasets.List(datasets.Value("string")),
        "references": datasets.List(datasets.Value("string")),
        "image_refs": datasets.Value("large_string"),
        "image_sizes": datasets.List(datasets.List(datasets.Value("int32"))),
        "conversation": datasets.Value("large_string"),
        "caption": datasets.Value("large_string"),
    }
)


@dataclass(frozen=True)
class ExampleTransform:
    """Turns stored columns into examples on access; goes to worker processes with the data set.

    Attributes:
        tables: the hub tables that references of the kind "table" point into, by split.
    """

    tables: Mapping[str, datasets.Dataset]

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Columns of stored values -> columns of an example's values.

        Where `with_features` has put features beside the references, `images` holds those and nothing is decoded.

        Raises:
            UserError: an image cannot be decoded; names the row.
        """
        if "conversation" not in batch or "image_refs" not in batch:
            return batch  # somebody asked for one column only
        columns = {name: batch[name] for name in (*_KNOWN_BY, "references")}
        if "image_features" in batch:
            columns["images"] = [load_features(handles) for handles in batch["image_features"]]
        else:
            columns["images"] = [
                [self._decode(ref, where) for ref in load_refs(refs)]
                for refs, where in zip(batch["image_refs"], batch["where"], strict=True)
            ]
        conversations = [json.loads(text) for text in batch["conversation"]]
        for key in conversations[0]:
            columns[key] = [conversation[key] for conversation in conversations]
        return columns

    def _decode(self, ref: ImageRef, where: str) -> Image.Image:
        try:
            with open_image(ref, self.tables) as file:
                return decode_rgb(file.read())
        except ImageError as error:
            raise UserError(f'{where}: image "{ref.name}" {error}.') from error


def build_dataset(
    rows: list[GoodRow],
    tables: Mapping[str, datasets.Dataset],
    as_messages: bool,
    with_tools: bool,
    image_keys: Sequence[Sequence[str]] | None = None,
) -> datasets.Dataset:
    """A data set of the checked rows; no image is decoded or copied.

    Args:
        rows: in the order wanted.
        tables: hub tables by split.
        as_messages: give every row its whole conversation instead of a prompt and completions. All rows of a run are
            of one kind, so that they can share a batch.
        with_tools: give every row a key `tools` (None where it has none).
        image_keys: of each row one for each image, equal for equal images; None leaves them empty.
    """
    columns: dict[str, list[Any]] = {
        "id": [row.id for row in rows],
        "where": [row.where for row in rows],
        "image_names": [[ref.name for ref in row.refs] for row in rows],
        "image_keys": [[] for _ in rows] if image_keys is None else list(image_keys),
        "references": [row.record.references for row in rows],
        "image_refs": [dump_refs(row.refs) for row in rows],
        "image_sizes": [[[header.width, header.height] for header in row.headers] for row in rows],
        "conversation": [json.dumps(_conversation(row, as_messages, with_tools)) for row in rows],
        "caption": [row.record.caption for row in rows],
    }
    return datasets.Dataset.from_dict(columns, features=_FEATURES).with_transform(ExampleTransform(tables))


def _conversation(row: GoodRow, as_messages: bool, with_tools: bool) -> dict[str, Any]:
    record = row.record
    if not as_messages:
        return {"prompt": record.prompt, "completions": record.completions}
    messages = record.messages
    if messages is None:
        messages = [*(record.prompt or []), assistant_message(record.completions[0])]
    return {"messages": messages, "tools": record.tools} if with_tools else {"messages": messages}


def separate_completions(dataset: datasets.Dataset) -> datasets.Dataset:
    """One row per image and completion, as TRL's own collators take them.

    Returns:
        Rows with `prompt` and `completion` (`[{"role": "assistant", ...}]`) instead of `completions`; the ids get
        "/0", "/1", ... Rows that hold `messages` come back unchanged. Images are referred to, not copied.
    """
    stored = dataset.with_format(None)
    source_rows, ids, conversations = [], [], []
    for index, (row_id, packed) in enumerate(zip(stored["id"], stored["conversation"], strict=True)):
        conversation = json.loads(packed)
        if "completions" not in conversation:
            return dataset
        for number, text in enumerate(conversation["completions"]):
            source_rows.append(index)
            ids.append(f"{row_id}/{number}")
            conversations.append(
                json.dumps({"prompt": conversation["prompt"], "completion": [assistant_message(text)]})
            )
    return with_columns(dataset.select(source_rows), {"id": ids, "conversation": conversations})


def joined_completions(dataset: datasets.Dataset, most: int | None = None) -> datasets.Dataset:
    """Takes `separate_completions` back: neighbours of one prompt become one row with `completions`.

    Args:
        dataset: rows with `prompt` and `completion`; others come back unchanged.
        most: completions of a row at most; None for no limit.

    Returns:
        Rows with `completions`, named after the first of theirs.
    """
    stored = dataset.with_format(None)
    first_rows: list[int] = []
    conversations: list[dict[str, Any]] = []
    last_source = None
    for index, (row_id, packed) in enumerate(zip(stored["id"], stored["conversation"], strict=True)):
        conversation = json.loads(packed)
        if "completion" not in conversation:
            return dataset
        text = "".join(part["text"] for part in conversation["completion"][0]["content"])
        source = row_id.rpartition("/")[0]
        if source == last_source and (most is None or len(conversations[-1]["completions"]) < most):
            conversations[-1]["completions"].append(text)
            continue
        last_source = source
        first_rows.append(index)
        conversations.append({"prompt": conversation["prompt"], "completions": [text]})
    return with_columns(dataset.select(first_rows), {"conversation": [json.dumps(packed) for packed in conversations]})


def with_lengths(dataset: datasets.Dataset, lengths: Sequence[int]) -> datasets.Dataset:
    """The same rows with a column `length`, which upstream's sampler groups by; examples do not show it."""
    return with_columns(dataset, {"length": lengths})


def with_features(dataset: datasets.Dataset, features: Sequence[Sequence[ImageFeatures]]) -> datasets.Dataset:
    """The same rows, whose `images` are the features given, row by row; for rows with completions together or apart."""
    return with_columns(dataset, {"image_features": [dump_features(row) for row in features]})


def with_columns(dataset: datasets.Dataset, columns: Mapping[str, Sequence[Any]]) -> datasets.Dataset:
    """The same rows, decoded in the same way, with stored columns replaced or added.

    Args:
        dataset: with the transform of `build_dataset`.
        columns: a value for each row, by name; one that replaces another is of its type.
    """
    table = dataset.with_format("arrow")[:]
    for name, values in columns.items():
        if name in table.column_names:
            place = table.column_names.index(name)
            table = table.set_column(place, name, pa.array(values, table.schema.field(name).type))
        else:
            table = table.append_column(name, pa.array(values))
    return datasets.Dataset(table).with_transform(transform_of(dataset))


def transform_of(dataset: datasets.Dataset) -> ExampleTransform:
    """How a data set's stored rows become examples."""
    return cast(ExampleTransform, dataset.format["format_kwargs"]["transform"])


@dataclass(frozen=True)
class WithoutImages:
    """A transform without its key `images`, which a trainer takes for a sign of a vision-language model.

    Attributes:
        transform: that of the data set.
    """

    transform: Callable[[dict[str, list[Any]]], dict[str, list[Any]]]

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Columns of stored values -> columns of an example's values."""
        return {name: values for name, values in self.transform(batch).items() if name != "images"}


def without_images(dataset: datasets.Dataset) -> datasets.Dataset:
    """The same rows without `images`, for text-only models: theirs are empty."""
    return dataset.with_transform(WithoutImages(transform_of(dataset)))


def undecoded_examples(dataset: datasets.Dataset) -> Iterator[dict[str, Any]]:
    """The rows as `dataset[i]` gives them, but with `image_sizes` ([[width, height], ...]) in place of `images`."""
    for row in dataset.with_format(None):
        shared = {key: row[key] for key in (*_KNOWN_BY, "image_sizes", "references")}
        yield {**shared, **json.loads(row["conversation"])}


def image_sizes(dataset: datasets.Dataset) -> list[list[tuple[int, int]]]:
    """(width, height) in pixels after EXIF rotation of each row's images, from the first pass: nothing is decoded."""
    return [[(width, height) for width, height in sizes] for sizes in dataset.with_format(None)["image_sizes"]]


def prompt_messages(example: Mapping[str, Any]) -> list[Message]:
    """The messages to generate from: the prompt, or of a conversation all before its last assistant turn."""
    if "messages" not in example:
        return list(example["prompt"])
    messages = list(example["messages"])
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:last]
