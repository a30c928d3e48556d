"""From an example to text with its targets marked, and from text to tokens: what is trained on is decided here.

Training, length survey, generation and the printed first example all go through here, so they cannot disagree.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template

from qvl.errors import UserError

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
    if "messages" in example:
        marked = _assistant_turns(example, processing_class)
    else:
        prompt = prompt_text(example["prompt"], processing_class)
        whole = _render([*example["prompt"], *example["completion"]], processing_class)
        if not whole.startswith(prompt):
            raise UserError(
                f"{example['where']}: the chat template renders the prompt differently once an answer follows, so the "
                "answer cannot be told from it. Give the row as `messages`, or another --chat_template_path."
            )
        marked = [Segment(prompt, False), Segment(whole[len(prompt) :], True)]
    return _end_at_end_token(marked, tokenizer_of(processing_class).eos_token, example["where"])


def tokenize(
    texts: Sequence[str], images: Sequence[Any], processing_class: ProcessingClass
) -> tuple[list[list[int]], dict[str, Any]]:
    """Tokenizes texts as they stand (no special tokens added) and puts the images in place of their placeholders.

    Args:
        texts: rendered texts; the placeholders in all of them together are as many as `images`.
        images: PIL images in reading order, may be empty.
        processing_class: a processor, or a tokenizer when there are no images.

    Returns:
        Token ids per text, image placeholders expanded; and the model's image inputs, such as `pixel_values`
        (num_patches, patch_size) and `image_grid_thw` (num_images, 3), empty without images.
    """
    if not isinstance(processing_class, ProcessorMixin):
        return processing_class(list(texts), add_special_tokens=False)["input_ids"], {}
    encoded = processing_class(text=list(texts), images=list(images) or None, padding=False, add_special_tokens=False)
    per_token = {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"}
    return encoded["input_ids"], {key: value for key, value in encoded.items() if key not in per_token}


def _assistant_turns(example: dict[str, Any], processing_class: ProcessingClass) -> list[Segment]:
    """Splits a rendered conversation at the generation markers of its (training) template."""
    template = _training_template(processing_class)
    rendered, spans = render_jinja_template(
        [_template_messages(example["messages"])],
        chat_template=template,
        tools=example.get("tools"),
        return_assistant_tokens_mask=True,
        **tokenizer_of(processing_class).special_tokens_map,
    )
    text, result, position = rendered[0], [], 0
    for start, end in spans[0]:
        result += [Segment(text[position:start], False), Segment(text[start:end], True)]
        position = end
    return [*result, Segment(text[position:], False)]


def _training_template(processing_class: ProcessingClass) -> str:
    try:
        return get_training_chat_template(processing_class) or processing_class.chat_template
    except ValueError as error:
        raise UserError(
            "The model's chat template does not mark which words are the assistant's, and TRL ships no training twin "
            "for it. Add {% generation %} ... {% endgeneration %} around the assistant's turns in a copy of the "
            "template and name it with --chat_template_path."
        ) from error


def _end_at_end_token(marked: list[Segment], end_token: str, where: str) -> list[Segment]:
    """Cuts every target behind its end token, and the whole behind the last target: later tokens cannot teach it."""
    result: list[Segment] = []
    for segment in marked:
        if segment.is_target:
            text, found, rest = segment.text.rpartition(end_token)
            if not found:
                raise UserError(
                    f"{where}: the chat template does not end the assistant's turn with {end_token!r}, so the model "
                    "would never learn to stop. Mend the template (--chat_template_path) or the end token."
                )
            result += [Segment(text + found, True), Segment(rest, False)]
        else:
            result.append(segment)
    while result and not result[-1].is_target:
        result.pop()
    if not result:
        raise UserError(f"{where}: there is no assistant's turn to train on.")
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
    return processing_class.apply_chat_template(
        _template_messages(messages), tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
    )


def _template_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Typed parts become one string where they are all text: text-only templates drop or refuse typed parts."""
    result = []
    for message in messages:
        parts = message["content"]
        if isinstance(parts, list) and all(part["type"] == "text" for part in parts):
            message = {**message, "content": "".join(part["text"] for part in parts)}
        result.append(message)
    return result
