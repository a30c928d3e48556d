"""Where the assistant's turns begin and end in a rendered conversation, for any chat template.

A template that marks them itself (`{% generation %}`) is taken as it is. Any other gets a twin: the same source with
the body of its loop over messages inside markers where the message is the assistant's. The twin is used only if it
renders every probe conversation byte for byte as the original does. TRL ships training templates too, found by exact
equality of the source; theirs for Qwen3 writes other text than the model's own (a think block in every turn), and
theirs for Qwen2.5 trains on the newline that the generation prompt already holds.
"""

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from qvl.errors import UserError

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TAG = re.compile(r"\{%[-+]?\s*(for|endfor)\b(.*?)[-+]?%\}", re.DOTALL)
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
# What generation prompts end with and histories leave out: Qwen3's with thinking off, and those of models that always
# think (Qwen3-Thinking-2507).
_THOUGHTS_BEGIN = ("<think>\n\n</think>\n\n", "<think>\n")
_LOOP_VARIABLE = re.compile(r"\s*(\w+)\s+in\s")
_REMEDY = (
    "Add {% generation %} ... {% endgeneration %} around the assistant's turns in a copy of the template and name it "
    "with --chat_template_path."
)

Messages = Sequence[Mapping[str, Any]]
SpecialTokens = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class TrainingTemplate:
    """A template that tells where the assistant speaks.

    Attributes:
        source: Jinja source with generation markers; renders what the model's own template renders.
        header: what stands between the beginning of a marked stretch and the place where generation would begin, such
            as `<|im_start|>assistant` and a newline; empty where the markers already stand behind it.
        special_tokens: name and text of the tokenizer's special tokens, which templates may use.
    """

    source: str
    header: str
    special_tokens: SpecialTokens

    def render(self, messages: Messages, tools: list[Any] | None = None) -> tuple[str, list[tuple[int, int]]]:
        """Renders a conversation.

        Returns:
            The text, and start and end (exclusive, in characters) of what the assistant writes in each of its turns,
            the generation prompt not included.

        Raises:
            UserError: the template refuses the conversation, or begins a turn otherwise than generation begins.
        """
        text, spans = _render_marked(self.source, self.special_tokens, messages, tools)
        return text, [(self._behind_header(text, start, end), end) for start, end in spans]

    def _behind_header(self, text: str, start: int, end: int) -> int:
        without = [self.header.removesuffix(words) for words in _THOUGHTS_BEGIN if self.header.endswith(words)]
        for header in (self.header, *without):
            found = text.find(header, start, end)
            if found >= 0:
                return found + len(header)
        raise UserError(
            f"the chat template begins an assistant's turn otherwise than with {self.header!r}, which is what "
            f"generation begins with. {_REMEDY}"
        )


@functools.lru_cache(maxsize=64)
def training_template(template: str, special_tokens: SpecialTokens) -> TrainingTemplate:
    """The template that tells where the assistant speaks; found once for each template.

    Args:
        template: the model's chat template.
        special_tokens: name and text of its tokenizer's special tokens, sorted.

    Raises:
        UserError: it has no markers and no twin that renders the same.
    """
    if _MARKER.search(_COMMENT.sub("", template)):
        return TrainingTemplate(template, _header(template, special_tokens) or "", special_tokens)
    for twin in _twins(template):
        if _is_twin(template, twin, special_tokens):
            header = _header(twin, special_tokens)
            if header is not None:
                return TrainingTemplate(twin, header, special_tokens)
    raise UserError(
        "The model's chat template does not mark which words are the assistant's, and no marked copy of it could be "
        f"made that renders the same text. {_REMEDY}"
    )


def _twins(template: str) -> Iterator[str]:
    """Copies of a template in which one loop's body is marked where its variable is an assistant's message."""
    for body_start, body_end, variable in _loops(template):
        body = template[body_start:body_end]
        yield (
            f"{template[:body_start]}{{% if {variable}['role'] == 'assistant' %}}{{% generation %}}{body}"
            f"{_matching(template, body_end, 'endgeneration')}{{% else %}}{body}"
            f"{_matching(template, body_end, 'endif')}{template[body_end:]}"
        )


def _matching(template: str, position: int, name: str) -> str:
    """A tag with the whitespace control of the one at `position`: what it strips on its left has to be stripped."""
    control = template[position + 2] if template[position + 2] in "-+" else ""
    return f"{{%{control} {name} %}}"


def _loops(template: str) -> Iterator[tuple[int, int, str]]:
    """Start and end of each loop's body and the name of its variable, for loops that look at a role; outer ones first.

    Comments are blanked, so that a tag in one does not count.
    """
    blanked = _COMMENT.sub(lambda match: " " * len(match[0]), template)
    open_tags: list[re.Match[str]] = []
    found = []
    for tag in _TAG.finditer(blanked):
        if tag[1] == "for":
            open_tags.append(tag)
        elif open_tags:
            start = open_tags.pop()
            variable = _LOOP_VARIABLE.match(start[2])
            body = blanked[start.end() : tag.start()]
            if variable and re.search(rf"\b{variable[1]}(\.role\b|\[['\"]role['\"]\])", body):
                found.append((start.end(), tag.start(), variable[1]))
    yield from sorted(found)


def _is_twin(template: str, twin: str, special_tokens: SpecialTokens) -> bool:
    """Whether a copy renders all probes as the original does, with one marked stretch for every assistant's turn."""
    num_compared = 0
    for messages, tools in _probes():
        for is_prompt in (False, True):
            try:
                expected = _render(template, special_tokens, messages, tools, is_prompt)
            except (jinja2.TemplateError, TypeError):
                continue  # a conversation that the model does not know
            try:
                text, spans = _render_marked(twin, special_tokens, messages, tools, is_prompt)
            except (UserError, SyntaxError):  # `{% break %}` cannot stand in a marked stretch
                return False
            answers = [_last_words(message) for message in messages if message["role"] == "assistant"]
            said = [text[start:end] for start, end in spans]
            if text != expected or len(said) != len(answers):
                return False
            if not all(
                part and (words in part or words not in text) for part, words in zip(said, answers, strict=True)
            ):
                return False
            num_compared += 1
    return num_compared > 0


def _last_words(message: Mapping[str, Any]) -> str:
    """What a template writes of an answer in any case; thoughts may be left out of the history."""
    content = message["content"]
    text: str = content if isinstance(content, str) else content[0]["text"]
    return text.rpartition("</think>")[2].strip()


def _header(source: str, special_tokens: SpecialTokens) -> str | None:
    """What a marked stretch begins with before generation would begin; None if that cannot be told."""
    for content in ("A probe.", [{"type": "text", "text": "A probe."}]):
        question, answer = {"role": "user", "content": content}, {"role": "assistant", "content": content}
        try:
            prompt = _render(source, special_tokens, [question], None, True)
            whole, spans = _render_marked(source, special_tokens, [question, answer], None)
        except (jinja2.TemplateError, TypeError, UserError):
            continue
        if prompt.count("A probe.") == 1 and len(spans) == 1 and whole.startswith(prompt):
            return whole[spans[0][0] : len(prompt)]
    return None


def _render(
    source: str,
    special_tokens: SpecialTokens,
    messages: Messages,
    tools: list[Any] | None,
    add_generation_prompt: bool,
) -> str:
    rendered, _ = render_jinja_template(
        [list(messages)],
        tools=tools,
        chat_template=source,
        add_generation_prompt=add_generation_prompt,
        **dict(special_tokens),
    )
    return rendered[0]


def _render_marked(
    source: str,
    special_tokens: SpecialTokens,
    messages: Messages,
    tools: list[Any] | None,
    # Qwen1.5's first template ends a last answer only under this flag; what others append stands behind the last
    # answer, where nothing is trained on.
    add_generation_prompt: bool = True,
) -> tuple[str, list[tuple[int, int]]]:
    try:
        rendered, spans = render_jinja_template(
            [list(messages)],
            tools=tools,
            chat_template=source,
            return_assistant_tokens_mask=True,
            add_generation_prompt=add_generation_prompt,
            **dict(special_tokens),
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise UserError(f"the model's chat template refuses this conversation: {error}") from error
    return rendered[0], [(start, end) for start, end in spans[0]]


def _probes() -> list[tuple[list[dict[str, Any]], list[Any] | None]]:
    """Conversations that between them go through the branches of a chat template."""
    tool = {
        "type": "function",
        "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
    }
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "ü": "犬"}}}
    system = {"role": "system", "content": "Be brief."}
    question, answer = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
    odd = {"role": "assistant", "content": "  ünïcode 犬 🐕\n\n{{ 1 }} {% x %}\n"}
    thinking = {"role": "assistant", "content": "<think>\nlong\n</think>\n\nShort."}
    reasoning = {"role": "assistant", "content": "Short.", "reasoning_content": "long"}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    talking = {"role": "assistant", "content": "Let me see.", "tool_calls": [call, call]}
    result = {"role": "tool", "content": "3", "name": "add"}
    texts: list[tuple[list[dict[str, Any]], list[Any] | None]] = [
        ([question, answer], None),
        ([system, question, answer], None),
        ([question, odd, question, answer, question, odd], None),
        ([system, question, odd, question, answer], None),
        ([answer, question, answer], None),
        ([question, answer, question], None),
        ([question, answer, system, question, answer], None),
        ([question, thinking, question, thinking], None),
        ([question, reasoning, question, reasoning], None),
        ([question, calling, result, answer], [tool]),
        ([system, question, talking, result, result, thinking, question, calling], [tool]),
        ([question, reasoning | {"tool_calls": [call]}, result, answer], [tool]),
        ([question, answer], [tool]),
    ]
    return [*texts, *((_typed(messages), tools) for messages, tools in texts), ([_with_image(question), answer], None)]


def _typed(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with typed content, which is the only one that some vision-language templates know."""
    typed: list[dict[str, Any]] = json.loads(json.dumps(messages))
    for message in typed:
        message["content"] = [{"type": "text", "text": message["content"]}]
    return typed


def _with_image(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "image"}, {"type": "text", "text": message["content"]}]}
