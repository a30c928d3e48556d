"""What is a target: answers up to the end token, in every template, however the row is written."""

from pathlib import Path
from typing import Any

import pytest
from tiny import CHAT, VISION, answered, conversation, message, picture, processing_class, settings_for
from transformers import ProcessorMixin

from qvl.encode import Segment, prompt_text, segments, tokenize, tokenizer_of
from qvl.errors import UserError
from qvl.models import load_processing_class

ALL = [*VISION, CHAT]
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
# Qwen2.5's template puts a system turn first where there is none.
SYSTEM = {"qvl/tiny-qwen2.5-vl": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"}


def with_template(name: str, template: str, folder: Path) -> Any:
    path = folder / "chat.jinja"
    path.write_text(template, encoding="utf-8")
    return load_processing_class(settings_for(name, "--chat_template_path", str(path)))


@pytest.mark.parametrize("name", ALL)
def test_prompt_and_completion(name: str) -> None:
    assert segments(answered("Hi", "Hello"), processing_class(name)) == [
        Segment(SYSTEM.get(name, "") + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
        Segment("Hello<|im_end|>", True),
    ]


@pytest.mark.parametrize("name", ALL)
def test_every_assistant_turn_of_messages(name: str) -> None:
    assert segments(conversation([("Hi", "Hello"), ("And?", "Bye")]), processing_class(name)) == [
        Segment(SYSTEM.get(name, "") + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
        Segment("Hello<|im_end|>", True),
        Segment("\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n", False),
        Segment("Bye<|im_end|>", True),
    ]


@pytest.mark.parametrize("name", VISION)
def test_images_stand_where_they_are_written(name: str) -> None:
    parts = [{"type": "text", "text": "A"}, {"type": "image"}, {"type": "text", "text": "B"}, {"type": "image"}]
    row = {"where": "row", "prompt": [{"role": "user", "content": parts}], "completion": [message("assistant", "C")]}
    assert f"<|im_start|>user\nA{IMAGE}B{IMAGE}<|im_end|>" in segments(row, processing_class(name))[0].text


@pytest.mark.parametrize("name", ALL)
def test_both_forms_of_a_row_are_trained_on_alike(name: str) -> None:
    assert segments(answered("Hi", "Hello"), processing_class(name)) == segments(
        conversation([("Hi", "Hello")]), processing_class(name)
    )


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("form", [answered, lambda q, a: conversation([(q, a)])])
def test_training_goes_on_where_generation_begins(name: str, form: Any) -> None:
    row = form("What is this?", "A dog")
    prompt = row.get("prompt") or row["messages"][:1]
    assert segments(row, processing_class(name))[0].text == prompt_text(prompt, processing_class(name))


def test_typed_text_reaches_a_template_that_knows_strings_only() -> None:
    assert "Hi there" in prompt_text([message("user", "Hi there")], processing_class(CHAT))


@pytest.mark.parametrize("answer", ["  two spaces", "\n\nlines\n", "<think>why</think>so", "{{ 1 }}", "ünïcode 犬 🐕"])
@pytest.mark.parametrize("name", ALL)
def test_answers_are_not_edited(name: str, answer: str) -> None:
    for row in (answered("Hi", answer), conversation([("Hi", answer)])):
        targets = [part.text for part in segments(row, processing_class(name)) if part.is_target]
        assert targets == [answer + "<|im_end|>"]


def test_only_assistants_are_targets() -> None:
    row = {
        "where": "row",
        "messages": [
            message("system", "Be brief."),
            message("user", "2+2?"),
            message("assistant", "4"),
            message("user", "Sure?"),
            message("assistant", "Yes"),
            message("user", "Thanks"),
        ],
    }
    parts = segments(row, processing_class(CHAT))
    assert [part.text for part in parts if part.is_target] == ["4<|im_end|>", "Yes<|im_end|>"]
    assert "Thanks" not in parts[-1].text, "what stands behind the last target cannot teach it"


TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}


@pytest.mark.parametrize("name", [VISION[0], CHAT])
def test_tools_are_told_and_their_calls_are_learned(name: str) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    turns = [
        message("user", "2+2?"),
        {"role": "assistant", "content": [{"type": "text", "text": ""}], "tool_calls": [call]},
        message("tool", "4"),
        message("assistant", "Four"),
    ]
    parts = segments({"where": "row", "messages": turns, "tools": [TOOL]}, processing_class(name))
    assert '"description": "Adds."' in parts[0].text
    targets = [part.text for part in parts if part.is_target]
    assert targets == [
        '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call><|im_end|>',
        "Four<|im_end|>",
    ]
    assert "<tool_response>\n4\n</tool_response>" in parts[2].text
    assert prompt_text(turns[:1], processing_class(name), [TOOL]) == parts[0].text


DIFFERENT_HISTORY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last %}LAST {% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}\n"
    "{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_renders_history_differently(tmp_path: Path) -> None:
    broken = with_template(CHAT, DIFFERENT_HISTORY, tmp_path)
    with pytest.raises(UserError, match=r"^file\.jsonl:7: .*renders the prompt differently"):
        segments(answered("Hi", "Hello", where="file.jsonl:7"), broken)


@pytest.mark.parametrize("form", [answered, lambda q, a, where: conversation([(q, a)], where=where)])
def test_a_template_that_does_not_end_the_answer(form: Any, tmp_path: Path) -> None:
    broken = with_template(CHAT, NO_END, tmp_path)
    with pytest.raises(UserError, match=r"^file\.jsonl:7: .*never learn to stop"):
        segments(form("Hi", "Hello", where="file.jsonl:7"), broken)


def test_messages_need_a_template_that_marks_answers(tmp_path: Path) -> None:
    broken = with_template(CHAT, DIFFERENT_HISTORY, tmp_path)
    with pytest.raises(UserError, match=r"generation.*--chat_template_path"):
        segments(conversation([("Hi", "Hello")]), broken)


def test_an_own_template_with_marks_is_used(tmp_path: Path) -> None:
    own = with_template(CHAT, MARKED, tmp_path)
    assert [part.text for part in segments(conversation([("Hi", "Hello")]), own) if part.is_target] == [
        "Hello<|im_end|>"
    ]


@pytest.mark.parametrize("name", VISION)
def test_placeholders_become_visual_tokens(name: str) -> None:
    processor = processing_class(name)
    texts = [f"one {IMAGE} two {IMAGE}", "none", f"{IMAGE}"]
    images = [picture(64, 64), picture(160, 96), picture(40, 200)]
    ids, inputs = tokenize(texts, images, processor)
    patches = inputs["image_grid_thw"].prod(dim=1)
    assert inputs["pixel_values"].shape[0] == int(patches.sum())
    merged = (patches // processor.image_processor.merge_size**2).tolist()
    counts = [row.count(processor.image_token_id) for row in ids]
    assert counts == [merged[0] + merged[1], 0, merged[2]]


@pytest.mark.parametrize("name", ALL)
def test_no_special_token_is_added(name: str) -> None:
    ids, inputs = tokenize(["a dog"], [], processing_class(name))
    assert tokenizer_of(processing_class(name)).decode(ids[0]) == "a dog"
    assert inputs == {}
    assert isinstance(processing_class(name), ProcessorMixin) == (name != CHAT)


@pytest.mark.parametrize("arguments", ['{"a": 2, "b": 2}', '{"a":2,"b":2}', {"a": 2, "b": 2}])
@pytest.mark.parametrize("name", [VISION[0], CHAT])
def test_arguments_as_openai_writes_them_are_not_quoted_twice(name: str, arguments: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    turns = [message("user", "2+2?"), {**message("assistant", ""), "tool_calls": [call]}]
    parts = segments({"where": "row", "messages": turns, "tools": [TOOL]}, processing_class(name))
    assert parts[-1].text == '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call><|im_end|>'


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"function": {"name": "add", "arguments": "{a: 2"}}, "'add' are no JSON"),
        ({"function": {"name": "add", "arguments": "[2]"}}, "'add' are no JSON object"),
        ({"function": {"arguments": {}}}, "a tool call has to be"),
        ("add", "a tool call has to be"),
    ],
)
def test_a_tool_call_that_cannot_be_read(call: Any, said: str) -> None:
    turns = [message("user", "2+2?"), {**message("assistant", ""), "tool_calls": [call]}]
    with pytest.raises(UserError, match=rf"^chat\.jsonl:3: .*{said}"):
        segments({"where": "chat.jsonl:3", "messages": turns}, processing_class(CHAT))
