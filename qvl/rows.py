"""One row of a data set, in any accepted shape -> a record: images as written, typed messages, answers."""

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from qvl.conversations import Message, place_images, read_conversations, read_messages
from qvl.data_config import DataConfig
from qvl.errors import UserError

_FORMAT_KEYS = ("messages", "conversations", "instruction", "response")


class RowError(UserError):
    """A row that cannot be used; the message says what and how to mend it, the caller adds which row."""


class ColumnError(RowError):
    """A key that the settings name is not in the row; in a table it is missing from all rows at once."""


@dataclass(frozen=True)
class Record:
    """A row as read, its images not yet looked at.

    Attributes:
        kind: "messages", "instruction", "captions list", "caption columns" (what the row looked like).
        images: as written in the row (paths, URLs, references into a table), in the order of the image parts.
        prompt: messages before the answer; None for `messages` rows.
        completions: the answers to train on; empty for `messages` rows.
        messages: the whole conversation; None for the others.
        references: all true answers, for scoring.
        tools: the tool definitions of a `messages` row, as written.
        caption: what the row itself says about its image, beside the answer. Caption rows have none: theirs are the
            answers.
    """

    kind: str
    images: list[Any]
    prompt: list[Message] | None
    completions: list[str]
    messages: list[Message] | None
    references: list[str]
    tools: list[Any] | None = None
    caption: str | None = None


RowToExample = Callable[[dict[str, Any], DataConfig], dict[str, Any] | None]


def read_row(row: Any, config: DataConfig, row_to_example: RowToExample) -> Record | None:
    """Recognises a row's shape and reads it.

    `messages`, `conversations` and `instruction`/`response` are read here; every other row goes to `row_to_example`.

    Returns:
        The record, or None if `row_to_example` left the row out.

    Raises:
        RowError: the row is wrong; the message lacks the place.
    """
    if not isinstance(row, dict):
        raise RowError(f"a row has to be a JSON object, this one is {json_type(row)}: write one {{...}} a line")
    _refuse_videos(row)
    if "messages" in row:
        return _with_caption(_conversation_record(row, read_messages(row["messages"]), config), row)
    if "conversations" in row:
        messages = read_conversations(row["conversations"], row.get("system"))
        return _with_caption(_conversation_record(row, messages, config), row)
    if "instruction" in row or "response" in row:
        return _with_caption(_finish(_instruction_row(row, config), "instruction", config), row)
    kind = "captions list" if "captions" in row else "caption columns"
    try:
        example = row_to_example(row, config)
    except KeyError as error:
        raise missing_key(str(error.args[0]), row) from error
    return None if example is None else _finish(example, kind, config)


def caption_row(row: dict[str, Any], config: DataConfig) -> dict[str, Any]:
    """A caption row as an example: one image, several true captions of it.

    The captions are the list `captions` if the row has one, else the columns `config.caption_columns`; the image is
    `config.image_column`; the prompt is `config.instruction`.

    Returns:
        `images` (one, as written), `prompt` (text), `completions` and `references` (all of the row's captions; the
        caller keeps the first `captions_per_image` of the completions).

    Raises:
        RowError: a key is missing, of the wrong type, or both kinds of captions are there.
    """
    if config.image_column not in row and "images" not in row:
        raise missing_key(config.image_column, row, "--image_column")
    images = row_images(row, config)
    if len(images) != 1:
        raise RowError(f"a caption row has one image, this one has {len(images)}: write one row per image")
    captions = _captions(row, config)
    for index, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise RowError(f"caption {index} is {json_type(caption)}, not a string: write it in quotes")
        if not caption.strip():
            raise RowError(f"caption {index} is empty: write it or remove it")
    return {"images": images, "prompt": config.instruction, "completions": captions, "references": captions}


def _captions(row: dict[str, Any], config: DataConfig) -> list[Any]:
    columns = [name for name in config.caption_columns if name in row]
    if "captions" not in row:
        for name in config.caption_columns:
            if name not in row:
                raise missing_key(name, row, "--caption_columns")
        return [row[name] for name in columns]
    if columns and "captions" not in columns:
        raise RowError(f'has captions of two kinds, the list "captions" and "{columns[0]}": keep one of them')
    if not isinstance(row["captions"], list):
        raise RowError(f'"captions" is {json_type(row["captions"])}, not a list: write ["...", "..."]')
    if not row["captions"]:
        raise RowError('"captions" is an empty list: write at least one caption')
    return list(row["captions"])


def missing_key(key: str, row: dict[str, Any], flag: str | None = None) -> ColumnError:
    """The error for a key that is not there: lists those that are, and the nearest name."""
    names = [str(name) for name in row]
    keys = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") or "no keys at all"
    near = difflib.get_close_matches(key, names, n=1)
    guess = f' (did you mean "{near[0]}"?)' if near else ""
    for name in names:
        for known in difflib.get_close_matches(name, _FORMAT_KEYS, n=1, cutoff=0.8):
            guess = f' (is "{name}" meant to be "{known}"?)' if name != known else guess
    remedy = f"add it, or name another key with {flag}" if flag else "add it"
    return ColumnError(f'has no key "{key}"{guess}; it has: {keys}; {remedy}')


def json_type(value: Any) -> str:
    """A JSON value's type in words."""
    if value is None:
        return "null"
    names = {bool: "true/false", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def row_images(row: dict[str, Any], config: DataConfig) -> list[Any]:
    """The images a row names beside its text, as written: one value or a list, under one of the image keys.

    Raises:
        RowError: two image keys are filled, or a value is neither text nor an image.
    """
    keys = dict.fromkeys((config.image_column, "image", "images"))
    filled = [key for key in keys if row.get(key) not in (None, [])]
    if len(filled) > 1:
        raise RowError(f'has both "{filled[0]}" and "{filled[1]}": keep one of them')
    if not filled:
        return []
    value = row[filled[0]]
    values = value if isinstance(value, list) else [value]
    for image in values:
        if image is None or isinstance(image, bool | int | float | list | dict):
            raise RowError(f'"{filled[0]}" holds {json_type(image)}, not a path: write "images/name.jpg"')
        if image == "":
            raise RowError(f'"{filled[0]}" holds an empty string: write a path, "images/name.jpg"')
    return values


def _instruction_row(row: dict[str, Any], config: DataConfig) -> dict[str, Any]:
    for key in ("instruction", "response"):
        if key not in row:
            raise missing_key(key, row)
        if not isinstance(row[key], str):
            raise RowError(f'"{key}" is {json_type(row[key])}, not a string: write it in quotes')
    if not row.keys() & {config.image_column, "image", "images"}:
        error = missing_key(config.image_column, row, "--image_column")
        raise ColumnError(f'{error}; for a row without an image write "images": []')
    return {
        "images": row_images(row, config),
        "prompt": row["instruction"],
        "completions": [row["response"]],
        "references": [row["response"]],
    }


def _conversation_record(row: dict[str, Any], messages: list[Message], config: DataConfig) -> Record:
    images = place_images(messages, row_images(row, config))
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise RowError('has no assistant turn, so there is nothing to learn: add {"role": "assistant", ...}')
    for answer in answers:
        if not message_text(answer).strip() and not answer.get("tool_calls"):
            raise RowError("has an empty response (an assistant turn without text): write it or remove the row")
    if config.captions_per_image > 1:
        raise RowError(
            f"is a conversation, which has one answer, but --captions_per_image is {config.captions_per_image}:"
            " set it to 1"
        )
    return Record("messages", images, None, [], messages, [message_text(answers[-1])], _tools(row))


def _tools(row: dict[str, Any]) -> list[Any] | None:
    """The row's tool definitions; many files keep the list as JSON in a string."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise RowError(f'"tools" is text that is no JSON ({error}): write a list of tool definitions') from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f'"tools" is {json_type(tools)}, not a list of objects: write [{{"type": "function", ...}}]')
    return tools


def _finish(example: dict[str, Any], kind: str, config: DataConfig) -> Record:
    """Checks what a piece returned and keeps the first `captions_per_image` answers."""
    prompt = example["prompt"]
    messages = read_messages([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
    images = place_images(messages, list(example["images"]))
    completions = list(example["completions"])
    for text in completions:
        if not isinstance(text, str):
            raise RowError(f"a response is {json_type(text)}, not a string: write it in quotes")
        if not text.strip():
            raise RowError("has an empty response: write it or remove the row")
    if len(completions) < config.captions_per_image:
        raise RowError(
            f"has {len(completions)} captions, but --captions_per_image is {config.captions_per_image}: "
            "lower it, or add captions"
        )
    references = list(example.get("references") or completions)
    return Record(kind, images, messages, completions[: config.captions_per_image], None, references)


def _with_caption(record: Record, row: dict[str, Any]) -> Record:
    caption = row.get("caption")
    return replace(record, caption=caption.strip() or None) if isinstance(caption, str) else record


def message_text(message: Message) -> str:
    """The text of a message's parts, images left out."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def _refuse_videos(row: dict[str, Any]) -> None:
    for key in ("video", "videos"):
        if row.get(key) not in (None, []):
            raise RowError(
                f'has a "{key}", and videos are not supported: extract frames'
                ' (`ffmpeg -i in.mp4 -vf fps=1 frame_%03d.jpg`) and list them under "images"'
            )
