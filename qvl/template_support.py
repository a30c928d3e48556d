"""What a chat template would leave out without a word: tools, tool calls, thoughts, roles it does not know.

Whether a template writes such a thing is tried once, on a small conversation with a marker word in its place.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from qvl.errors import UserError

_WORD = "qvlprobe"
_QUESTION: dict[str, Any] = {"role": "user", "content": "Why?"}
_ANSWER: dict[str, Any] = {"role": "assistant", "content": "Because."}
_PARAMETERS = {"type": "object", "properties": {}}
_TOOL = {"type": "function", "function": {"name": _WORD, "description": "Adds.", "parameters": _PARAMETERS}}
_CALL = {"type": "function", "function": {"name": _WORD, "arguments": {}}}

Messages = Sequence[Mapping[str, Any]]
SpecialTokens = tuple[tuple[str, Any], ...]


def require_all_shown(
    messages: Messages, tools: list[Any] | None, template: str, special_tokens: SpecialTokens
) -> None:
    """Stops where the template leaves out a part of a conversation.

    Args:
        messages: the conversation.
        tools: what the assistant may call.
        template: Jinja source.
        special_tokens: name and text of the tokenizer's special tokens.

    Raises:
        UserError: a tool definition, tool call, thought or message would not be in the text; the caller adds the row.
    """

    def is_shown(kind: str) -> bool:
        return _shows(kind, template, special_tokens)

    if tools and not is_shown("tools"):
        raise UserError('the model\'s chat template has no place for "tools": remove them, or use a model that has')
    for number, message in enumerate(messages):
        role = message["role"]
        if message.get("tool_calls") and not is_shown("tool_calls"):
            raise UserError(
                f'the model\'s chat template leaves out the "tool_calls" of message {number}: write the call as the '
                "message's content, or use a model that knows tools"
            )
        if message.get("reasoning_content") and not is_shown("reasoning_content"):
            raise UserError(
                f'the model\'s chat template leaves out the "reasoning_content" of message {number}: remove it, or '
                "write it into the content as <think> ... </think>"
            )
        if role not in ("user", "assistant") and not is_shown(f"{role} first" if number == 0 else role):
            raise UserError(
                f'the model\'s chat template leaves out or refuses message {number}, whose role is "{role}": remove it '
                "or give it a role that the template knows"
            )


@functools.lru_cache(maxsize=256)
def _shows(kind: str, template: str, special_tokens: SpecialTokens) -> bool:
    tools = None
    if kind == "tools":
        messages, tools = [_QUESTION, _ANSWER], [_TOOL]
    elif kind == "tool_calls":
        messages = [_QUESTION, {"role": "assistant", "content": "", "tool_calls": [_CALL]}]
    elif kind == "reasoning_content":
        # As the last turn: templates that know thoughts may leave them out of the history on purpose.
        messages = [_QUESTION, {**_ANSWER, "reasoning_content": _WORD}]
    elif kind.endswith(" first"):
        messages = [{"role": kind.removesuffix(" first"), "content": _WORD}, _QUESTION, _ANSWER]
    else:
        messages = [_QUESTION, _ANSWER, {"role": kind, "content": _WORD}, _QUESTION, _ANSWER]
    # Some vision-language templates read typed content only.
    typed = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    return any(_WORD in _rendered(form, tools, template, special_tokens) for form in (messages, typed))


def _rendered(messages: Messages, tools: list[Any] | None, template: str, special_tokens: SpecialTokens) -> str:
    try:
        rendered, _ = render_jinja_template(
            [list(messages)], tools=tools, chat_template=template, **dict(special_tokens)
        )
    except (jinja2.TemplateError, TypeError):
        return ""
    text: str = rendered[0]
    return text
