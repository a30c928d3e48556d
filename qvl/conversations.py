"""Messages as people write them -> typed messages, and the images put into their places."""

from typing import Any

from qvl.errors import UserError

Message = dict[str, Any]

IMAGE_MARK = "<image>"
ROLES = ("system", "user", "assistant", "tool", "function")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function": "function",
}


def assistant_message(text: str) -> Message:
    """An answer as a typed message."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


class MessageError(UserError):
    """Messages that cannot be read; the caller adds which row."""


def read_messages(messages: Any) -> list[Message]:
    """OpenAI messages with string or typed content -> messages with typed parts only.

    An image part that names its image carries it under "value" until `place_images` takes it out; `<image>` in a text
    becomes an image part without a value. Keys beside role and content (`tool_calls`, `name`, ...) are kept.

    Raises:
        MessageError: wrong type, unknown role or part, a video, an image outside of user and tool turns.
    """
    if not isinstance(messages, list):
        raise MessageError('"messages" is not a list: write [{"role": "user", "content": "..."}, ...]')
    if not messages:
        raise MessageError('"messages" is empty: write at least a user and an assistant turn')
    return [_read_message(message, number) for number, message in enumerate(messages)]


def read_conversations(turns: Any, system: Any = None) -> list[Message]:
    """LLaVA's and ShareGPT's `[{"from": "human", "value": "<image> ..."}, ...]` -> typed messages.

    Args:
        turns: the row's `conversations`; OpenAI's messages under that name are read as such.
        system: the row's `system`, which some ShareGPT files have beside the turns; None or "" for none.

    Raises:
        MessageError: as `read_messages`, or `system` is no text or there twice.
    """
    if not isinstance(turns, list) or not turns:
        raise MessageError('"conversations" is no filled list: write [{"from": "human", "value": "..."}, ...]')
    if all(isinstance(turn, dict) and "role" in turn for turn in turns):
        return _behind_system(turns, system)
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise MessageError(f'turn {number} of "conversations" has to be {{"from": ..., "value": ...}}')
        if turn["from"] not in _SHAREGPT_ROLES:
            raise MessageError(f'turn {number} is from "{turn["from"]}": known are {", ".join(_SHAREGPT_ROLES)}')
        messages.append({"role": _SHAREGPT_ROLES[turn["from"]], "content": turn["value"]})
    return _behind_system(messages, system)


def _behind_system(messages: list[Message], system: Any) -> list[Message]:
    if system is None or system == "":
        return read_messages(messages)
    if not isinstance(system, str):
        raise MessageError(f'"system" is no string but {system!r}: write the system prompt in quotes')
    if messages[0]["role"] == "system":
        raise MessageError('has a system prompt under "system" and as its first turn: keep one of them')
    return read_messages([{"role": "system", "content": system}, *messages])


def _read_message(message: Any, number: int) -> Message:
    if not isinstance(message, dict):
        raise MessageError(f'message {number} is no object: write {{"role": ..., "content": ...}}')
    role = message.get("role")
    if role not in ROLES:
        raise MessageError(f'message {number} has the unknown role "{role}": known are {", ".join(ROLES)}')
    if role == "assistant" and message.get("weight") not in (None, 1):
        raise MessageError(
            f'message {number} has "weight": {message["weight"]!r}, and every answer is trained on alike: remove the '
            "key, or end the conversation before that answer"
        )
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""  # OpenAI writes null beside tool calls
    if "content" not in message and not message.get("tool_calls"):
        raise MessageError(f'message {number} ({role}) has no key "content": add it')
    if isinstance(content, str):
        parts = _split_at_marks(content)
    elif isinstance(content, list):
        parts = [typed for part in content for typed in _read_part(part, number)]
    else:
        raise MessageError(f'message {number} ({role}): "content" has to be a string or a list of typed parts')
    if role in ("assistant", "system") and any(part["type"] == "image" for part in parts):
        raise MessageError(f"message {number} ({role}) holds an image: images belong into user turns; move it there")
    others = {key: value for key, value in message.items() if key not in ("role", "content") and value is not None}
    return {"role": role, "content": parts, **others}


def _split_at_marks(text: str) -> list[dict[str, Any]]:
    if "<video>" in text:
        raise MessageError("has a <video> mark, and videos are not supported: extract frames and use <image>")
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(text.split(IMAGE_MARK)):
        if number:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _read_part(part: Any, number: int) -> list[dict[str, Any]]:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise MessageError(f'message {number}: a content part has no "type": write {{"type": "text", "text": "..."}}')
    if "video" in kind:
        raise MessageError(f'message {number}: a part of type "{kind}", and videos are not supported: use frames')
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise MessageError(f'message {number}: a text part has no string under "text": add it')
        return _split_at_marks(part["text"])
    if kind == "image":
        # Hub tables fill the keys a part does not have with null.
        value = next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)
    elif kind == "image_url":
        value = part.get("image_url")
        value = value.get("url") if isinstance(value, dict) else value
        if value is None:
            raise MessageError(
                f'message {number}: an image_url part names no URL: write {{"image_url": {{"url": ...}}}}'
            )
    else:
        raise MessageError(f'message {number}: unknown part type "{kind}": known are text, image, image_url')
    if value is None:
        return [{"type": "image"}]
    if isinstance(value, bool | int | float | list | dict) or value == "":
        raise MessageError(f"message {number}: an image part holds no path or URL but {value!r}: write a string")
    return [{"type": "image", "value": value}]


def place_images(messages: list[Message], row_images: list[Any]) -> list[Any]:
    """Gives every image part its image; changes `messages` so that image parts are plain `{"type": "image"}`.

    Parts without a value take the row's images in order. If there are none of those, the row's images go before the
    first user text.

    Returns:
        All images in the order of their parts.

    Raises:
        MessageError: the number of marks differs from the number of the row's images.
    """
    bare = [p for message in messages for p in message["content"] if p["type"] == "image" and "value" not in p]
    if bare and len(bare) != len(row_images):
        raise MessageError(
            f"has {len(bare)} {IMAGE_MARK} mark(s) but {len(row_images)} image(s): make the two numbers equal"
        )
    if bare:
        for part, value in zip(bare, row_images, strict=True):
            part["value"] = value
    elif row_images:
        first_user = next((message for message in messages if message["role"] == "user"), None)
        if first_user is None:
            raise MessageError("has an image but no user turn to show it in: add a user turn")
        first_user["content"][:0] = [{"type": "image", "value": value} for value in row_images]
    return [part.pop("value") for message in messages for part in message["content"] if part["type"] == "image"]
