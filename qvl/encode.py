"""From an example to text with its targets marked, and from text to tokens: what is trained on is decided here.

Training, length survey, generation and the printed first example all go through here, so they cannot disagree.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jinja2
import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from qvl.errors import UserError
from qvl.feature_store import ImageFeatures, join_features
from qvl.template_support import require_all_shown
from qvl.training_template import training_template

IGNORED_LABEL = -100
ProcessingClass: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin


@dataclass(frozen=True)
class Segment:
    """A stretch of a rendered conversation that is trained on as a whole or not at all.

    Attributes:
        text: rendered text, image placeholders not yet expanded.
        is_target: whether its tokens are labels.
    """

    text: str
    is_target: bool


def tokenizer_of(processing_class: ProcessingClass) -> PreTrainedTokenizerBase:
    """The tokenizer inside a processor, or the tokenizer itself."""
    return getattr(processing_class, "tokenizer", processing_class)


def prompt_text(
    messages: Sequence[dict[str, Any]], processing_class: ProcessingClass, tools: list[Any] | None = None
) -> str:
    """Renders a prompt up to the point where the assistant's answer begins, with the tools it may call."""
    return _render(messages, processing_class, add_generation_prompt=True, tools=tools)


def segments(example: dict[str, Any], processing_class: ProcessingClass) -> list[Segment]:
    """Renders one training example and marks what is trained on.

    Only answers are targets, each up to and including the template's end token; what the template writes behind it
    (a newline in ChatML) is not. Example, for one user turn and one answer in ChatML::

        Segment("<|im_start|>user ... <|im_start|>assistant ...", False)
        Segment("Hello<|im_end|>", True)

    Args:
        example: `prompt` and `completion` (message lists; the completion alone is a target), or `messages` (every
            assistant turn is a target; `tools` are what it may call).
        processing_class: a processor, or the tokenizer of a text-only model; its chat template is used.

    Raises:
        UserError: there is no answer, or the template cannot say where the answers are, or does not end them; the row
            is named.
    """
    tools = example.get("tools")
    try:
        messages = _template_messages(example.get("messages") or [*example["prompt"], *example["completion"]])
        require_all_shown(messages, tools, _template(processing_class), _special_tokens(processing_class))
        if "messages" in example:
            marked = _assistant_turns(messages, tools, processing_class)
        else:
            marked = _answer_behind_prompt(example["prompt"], messages, tools, processing_class)
        return _end_at_end_token(marked, tokenizer_of(processing_class).eos_token)
    except UserError as error:
        raise UserError(f"{example['where']}: {str(error).rstrip('.')}.") from error


def tokenize(
    texts: Sequence[str], images: Sequence[Any], processing_class: ProcessingClass
) -> tuple[list[list[int]], dict[str, Any]]:
    """Tokenizes texts as they stand (no special tokens added) and puts the images in place of their placeholders.

    Args:
        texts: rendered texts; the placeholders in all of them together are as many as `images`.
        images: PIL images in reading order, or the `ImageFeatures` of all of them; may be empty.
        processing_class: a processor, or a tokenizer when there are no images.

    Returns:
        Token ids per text, image placeholders expanded; and the model's image inputs, such as `pixel_values`
        (num_patches, patch_size) and `image_grid_thw` (num_images, 3), empty without images. Of features the inputs
        are `image_features` (num_visual_tokens, (1 + num_deepstack) * hidden_size) in place of `pixel_values`; see
        `qvl.features.encoder_inputs`.
    """
    if not isinstance(processing_class, ProcessorMixin):
        return processing_class(list(texts), add_special_tokens=False)["input_ids"], {}
    if any(isinstance(image, ImageFeatures) for image in images):
        return _tokenize_beside_features(texts, images, processing_class)
    encoded = processing_class(text=list(texts), images=list(images) or None, padding=False, add_special_tokens=False)
    per_token = {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"}
    return encoded["input_ids"], {key: _tensor(value) for key, value in encoded.items() if key not in per_token}


def _tensor(values: Any) -> torch.Tensor:
    """One tensor of what a processor gives without `return_tensors`, which would want texts of one length."""
    return torch.stack(list(values)) if isinstance(values, list | tuple) else torch.as_tensor(values)


def _tokenize_beside_features(
    texts: Sequence[str], images: Sequence[ImageFeatures], processing_class: ProcessorMixin
) -> tuple[list[list[int]], dict[str, Any]]:
    """`tokenize` where the vision tower has seen the images before; the ids are those that the processor gives."""
    placeholder = processing_class.image_token
    num_places = sum(text.count(placeholder) for text in texts)
    if num_places != len(images):
        raise ValueError(f"{num_places} image placeholders ({placeholder}) in the texts for {len(images)} images")
    remaining = iter(images)
    expanded = []
    for text in texts:
        first, *others = text.split(placeholder)
        expanded.append(first + "".join(placeholder * next(remaining).num_tokens + part for part in others))
    inputs = {"image_features": join_features(images)}
    if images[0].grid_thw is not None:
        inputs["image_grid_thw"] = torch.tensor([image.grid_thw for image in images])
    return tokenizer_of(processing_class)(expanded, add_special_tokens=False)["input_ids"], inputs


def _assistant_turns(
    messages: list[dict[str, Any]], tools: list[Any] | None, processing_class: ProcessingClass
) -> list[Segment]:
    """Splits a rendered conversation at the beginnings and ends of the assistant's turns."""
    template = training_template(_template(processing_class), _special_tokens(processing_class))
    text, spans = template.render(messages, tools)
    # Probes cannot foresee every row, and what is trained on has to be what the model will see.
    if text != _render(messages, processing_class, add_generation_prompt=True, tools=tools):
        raise UserError(
            "with its answers marked, the chat template renders this row otherwise than without. Put the generation "
            "markers into a copy of the template by hand and name it with --chat_template_path."
        )
    result, position = [], 0
    for start, end in spans:
        result += [Segment(text[position:start], False), Segment(text[start:end], True)]
        position = end
    return [*result, Segment(text[position:], False)]


def _answer_behind_prompt(
    prompt_messages: list[dict[str, Any]],
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    processing_class: ProcessingClass,
) -> list[Segment]:
    """Splits a rendered conversation where its prompt, rendered alone, ends."""
    prompt = prompt_text(prompt_messages, processing_class, tools)
    # With the generation prompt: Qwen1.5's first template ends a last answer only then, and what others append stands
    # behind the answer's end.
    whole = _render(messages, processing_class, add_generation_prompt=True, tools=tools)
    if not whole.startswith(prompt):
        raise UserError(
            "the chat template renders the prompt differently once an answer follows, so the answer cannot be told "
            "from it. Give the row as `messages`, or another --chat_template_path."
        )
    return [Segment(prompt, False), Segment(whole[len(prompt) :], True)]


def _template(processing_class: ProcessingClass) -> str:
    """The chat template's source; of named variants the default one."""
    template = processing_class.chat_template
    return template["default"] if isinstance(template, dict) else template


def _special_tokens(processing_class: ProcessingClass) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((key, str(value)) for key, value in tokenizer_of(processing_class).special_tokens_map.items()))


def _end_at_end_token(marked: list[Segment], end_token: str) -> list[Segment]:
    """Cuts every target behind its end token, and the whole behind the last target: later tokens cannot teach it."""
    result: list[Segment] = []
    for segment in marked:
        if segment.is_target:
            text, found, rest = segment.text.rpartition(end_token)
            if not found:
                raise UserError(
                    f"the chat template does not end the assistant's turn with {end_token!r}, so the model would "
                    'never learn to stop. Mend the template (--chat_template_path), or "eos_token" in a copy of the '
                    "model's tokenizer_config.json; of base models take the instruction-tuned sister."
                )
            result += [Segment(text + found, True), Segment(rest, False)]
        else:
            result.append(segment)
    while result and not result[-1].is_target:
        result.pop()
    if not result:
        raise UserError("there is no assistant's turn to train on.")
    # Neighbours of one kind are tokenized as one text.
    return [
        Segment("".join(segment.text for segment in group), is_target)
        for is_target, group in itertools.groupby(result, key=lambda segment: segment.is_target)
    ]


def _render(
    messages: Sequence[dict[str, Any]],
    processing_class: ProcessingClass,
    add_generation_prompt: bool = False,
    tools: list[Any] | None = None,
) -> str:
    try:
        return processing_class.apply_chat_template(
            _template_messages(messages), tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise UserError(f"the model's chat template refuses this conversation: {error}") from error


def _template_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates take them.

    Typed parts become one string where they are all text: text-only templates drop or refuse typed parts. The
    arguments of tool calls, which OpenAI writes as JSON in a string, become objects: Qwen2.5's template would quote
    the string a second time.

    Raises:
        UserError: arguments that are no JSON object.
    """
    result = []
    for message in messages:
        parts = message["content"]
        if isinstance(parts, list) and all(part["type"] == "text" for part in parts):
            message = {**message, "content": "".join(part["text"] for part in parts)}
        if message.get("tool_calls"):
            message = {**message, "tool_calls": [_with_object_arguments(call) for call in message["tool_calls"]]}
        result.append(message)
    return result


def _with_object_arguments(call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or "name" not in function:
        raise UserError(
            'a tool call has to be {"type": "function", "function": {"name": ..., "arguments": {...}}}, found '
            f"{json.dumps(call)}"
        )
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError as error:
            raise UserError(f"the arguments of the tool call {function['name']!r} are no JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise UserError(f"the arguments of the tool call {function['name']!r} are no JSON object: {arguments!r}")
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function
