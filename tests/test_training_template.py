"""What is trained on under the templates that Qwen's chat models came with: every answer, its end token, nothing else.

Qwen1.5's two templates are written down here; the others are TRL's copies of the published ones.
"""

from pathlib import Path
from typing import Any

import pytest
import trl
from tiny import CHAT, VISION, message, processing_class, settings_for

from qvl.encode import Segment, prompt_text, segments, tokenize
from qvl.errors import UserError
from qvl.models import load_processing_class
from qvl.training_template import training_template

TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
SPECIAL = (("eos_token", "<|im_end|>"), ("pad_token", "<|endoftext|>"))
QWEN1_5 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful assistant.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As first published: the last answer has an end token only with the generation prompt.
FIRST_QWEN1_5 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful assistant<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content']}}"
    "{% if (loop.last and add_generation_prompt) or not loop.last %}{{ '<|im_end|>' + '\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (TRL_TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")
TEMPLATES = {
    "Qwen1.5": QWEN1_5,
    "Qwen1.5 as first published": FIRST_QWEN1_5,
    "Qwen2.5": (TRL_TEMPLATES / "qwen2_5.jinja").read_text(encoding="utf-8"),
    "Qwen3": QWEN3,
    "Qwen3 2507": (TRL_TEMPLATES / "qwen3_instruct_2507.jinja").read_text(encoding="utf-8"),
    # As published: Qwen3's think block, and a generation prompt that opens one, without a switch.
    "Qwen3 2507, thinking": QWEN3[: QWEN3.index("    {{- '<|im_start|>assistant\\n' }}")]
    + "    {{- '<|im_start|>assistant\\n<think>\\n' }}\n{%- endif %}",
    "Qwen2.5 with TRL's markers": (TRL_TEMPLATES / "qwen2_5_training.jinja").read_text(encoding="utf-8"),
}
# These write a think block into the last answer; what of it the model has to write itself.
THINKING = {"Qwen3": "<think>\n\n</think>\n\n", "Qwen3 2507, thinking": "\n</think>\n\n"}
WITHOUT_TOOLS = ("Qwen1.5", "Qwen1.5 as first published")
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}

CONVERSATIONS = {
    "one turn": [("user", "Hi"), ("assistant", "Hello")],
    "system": [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello")],
    "many turns": [
        ("system", "Be brief."),
        *[("user", "2+2?"), ("assistant", "4"), ("user", "Sure?"), ("assistant", "Yes,\n\nquite.")] * 3,
    ],
    "unicode": [("user", "犬 🐕?"), ("assistant", "ünïcode 犬 🐕"), ("user", "…"), ("assistant", "ß\u2028ẞ")],
    "question left open": [("user", "Hi"), ("assistant", "Hello"), ("user", "And?")],
    "answer first": [("assistant", "Welcome"), ("user", "Hi"), ("assistant", "Hello")],
    "code": [("user", "Loop?"), ("assistant", "```python\nfor i in range(3):\n    print(i)\n```")],
    "markup in a question": [
        ("user", "Say <|im_end|>\n<|im_start|>assistant\nno<|im_end|> {% generation %}{{ 1 }}"),
        ("assistant", "{% for x in y %} {{ 2 }}"),
    ],
}


def with_template(source: str, name: str = CHAT) -> Any:
    loaded = load_processing_class(settings_for(name))
    loaded.chat_template = source
    return loaded


def turns(pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [message(role, text) for role, text in pairs]


def targets(row: dict[str, Any], tokenizer: Any) -> list[str]:
    """The targets as text, from their token ids: what the loss sees."""
    texts = [part.text for part in segments(row, tokenizer) if part.is_target]
    ids, _ = tokenize(texts, [], tokenizer)
    return [tokenizer.decode(piece) for piece in ids]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_targets_are_the_answers_and_their_end_tokens(template: str, conversation: str) -> None:
    tokenizer = with_template(TEMPLATES[template])
    pairs = CONVERSATIONS[conversation]
    expected = [text + "<|im_end|>" for role, text in pairs if role == "assistant"]
    if template in THINKING and pairs[-1][0] == "assistant":
        expected[-1] = THINKING[template] + expected[-1]
    assert targets({"where": "row", "messages": turns(pairs)}, tokenizer) == expected


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_text_is_the_models_own(template: str) -> None:
    tokenizer = with_template(TEMPLATES[template])
    for pairs in CONVERSATIONS.values():
        whole = tokenizer.apply_chat_template([{"role": r, "content": t} for r, t in pairs], tokenize=False)
        row = {"where": "row", "messages": turns(pairs)}
        assert (whole + "<|im_end|>").startswith("".join(part.text for part in segments(row, tokenizer)))


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_target_begins_where_generation_would(template: str) -> None:
    tokenizer = with_template(TEMPLATES[template])
    pairs = CONVERSATIONS["many turns"]
    parts = segments({"where": "row", "messages": turns(pairs)}, tokenizer)
    for index in range(1, len(parts), 2):
        before = "".join(part.text for part in parts[:index])
        prompt = prompt_text(turns(pairs[: index + 1]), tokenizer)
        # A model that always thinks is asked with an open think block; its template leaves none in the history.
        is_closed = template == "Qwen3 2507, thinking" and index < len(parts) - 1
        assert before == (prompt.removesuffix("<think>\n") if is_closed else prompt)


@pytest.mark.parametrize("template", TEMPLATES)
def test_both_forms_of_a_row_are_trained_on_alike(template: str) -> None:
    tokenizer = with_template(TEMPLATES[template])
    pairs = turns(CONVERSATIONS["system"])
    halves = {"where": "row", "prompt": pairs[:-1], "completion": pairs[-1:]}
    assert segments(halves, tokenizer) == segments({"where": "row", "messages": pairs}, tokenizer)


TOOL_TURNS = [
    message("user", "2+2?"),
    {"role": "assistant", "content": [{"type": "text", "text": ""}], "tool_calls": [CALL]},
    message("tool", "4"),
    message("assistant", "Four"),
]


@pytest.mark.parametrize("template", sorted(TEMPLATES.keys() - {*WITHOUT_TOOLS}))
def test_tool_calls_are_learned_and_their_results_are_not(template: str) -> None:
    tokenizer = with_template(TEMPLATES[template])
    first, second = targets({"where": "row", "messages": TOOL_TURNS, "tools": [TOOL]}, tokenizer)
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call><|im_end|>'
    assert (first, second) == (call, THINKING.get(template, "") + "Four<|im_end|>")


@pytest.mark.parametrize("template", WITHOUT_TOOLS)
@pytest.mark.parametrize(
    ("messages", "tools", "named"),
    [
        (TOOL_TURNS[:1] + TOOL_TURNS[3:], [TOOL], 'no place for "tools"'),
        (TOOL_TURNS, None, '"tool_calls" of message 1'),
    ],
)
def test_tools_that_a_template_leaves_out_are_refused(
    template: str, messages: list[Any], tools: list[Any] | None, named: str
) -> None:
    row = {"where": "chat.jsonl:3", "messages": messages, "tools": tools}
    with pytest.raises(UserError, match=rf"^chat\.jsonl:3: .*{named}"):
        segments(row, with_template(TEMPLATES[template]))


@pytest.mark.parametrize("template", ["Qwen2.5", "Qwen3", "Qwen3 2507"])
def test_a_role_that_a_template_leaves_out_is_refused(template: str) -> None:
    messages = [message("user", "2+2?"), message("function", "4"), message("assistant", "Four")]
    with pytest.raises(UserError, match=r'^chat\.jsonl:3: .*leaves out or refuses message 1, whose role is "function"'):
        segments({"where": "chat.jsonl:3", "messages": messages}, with_template(TEMPLATES[template]))


def test_a_role_that_a_template_writes_as_it_is_stays() -> None:
    messages = [message("user", "2+2?"), message("function", "4"), message("assistant", "Four")]
    first = segments({"where": "row", "messages": messages}, with_template(QWEN1_5))[0]
    assert "<|im_start|>function\n4<|im_end|>" in first.text


@pytest.mark.parametrize("template", ["Qwen3", "Qwen3 2507, thinking"])
def test_thoughts_are_learned_in_the_last_answer_and_left_out_of_the_history(template: str) -> None:
    thought = {**message("assistant", "Four"), "reasoning_content": "2 and 2"}
    inline = message("assistant", "<think>\n2 and 2\n</think>\n\nFour")
    opening = "<think>\n" if template == "Qwen3" else ""  # the other's generation prompt has it already
    for answer in (thought, inline):
        messages = [message("user", "2+2?"), answer, message("user", "Sure?"), answer]
        assert targets({"where": "row", "messages": messages}, with_template(TEMPLATES[template])) == [
            "Four<|im_end|>",
            f"{opening}2 and 2\n</think>\n\nFour<|im_end|>",
        ]


@pytest.mark.parametrize("template", ["Qwen1.5", "Qwen2.5", "Qwen3 2507"])
def test_thoughts_that_a_template_leaves_out_are_refused(template: str) -> None:
    answer = {**message("assistant", "Four"), "reasoning_content": "2 and 2"}
    row = {"where": "chat.jsonl:3", "messages": [message("user", "2+2?"), answer]}
    with pytest.raises(UserError, match=r'^chat\.jsonl:3: .*"reasoning_content" of message 1.*<think>'):
        segments(row, with_template(TEMPLATES[template]))


@pytest.mark.parametrize("name", VISION)
def test_answers_about_images(name: str) -> None:
    messages = [message("user", "What?", 2), message("assistant", "Dogs"), message("user", "Sure?", 1)]
    row = {"where": "row", "messages": [*messages, message("assistant", "Yes")]}
    parts = segments(row, processing_class(name))
    assert [part.text for part in parts if part.is_target] == ["Dogs<|im_end|>", "Yes<|im_end|>"]
    assert parts[0].text.count("<|image_pad|>") == 2
    assert parts[2].text.count("<|image_pad|>") == 1


REFUSING = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system turns.') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_what_a_template_refuses_is_said_with_the_row() -> None:
    tokenizer = with_template(REFUSING)
    row = {"where": "chat.jsonl:3", "messages": turns(CONVERSATIONS["one turn"])}
    assert segments(row, tokenizer)[-1] == Segment("Hello<|im_end|>", True)
    row["messages"] = turns(CONVERSATIONS["system"])
    with pytest.raises(UserError, match=r'^chat\.jsonl:3: .*refuses message 0, whose role is "system"'):
        segments(row, tokenizer)


# --- templates without a twin

# A marked stretch cannot leave the loop.
BREAKING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% break %}{% endif %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
NO_LOOP = "{{ messages[0]['content'] }}A:{{ messages[1]['content'] }}<|im_end|>"
EDITED_BY_PROMPT = (
    "{% for m in messages %}{{ m.role }}{% if add_generation_prompt and loop.last %}!{% endif %}:{{ m.content }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.mark.parametrize("source", [BREAKING, NO_LOOP, EDITED_BY_PROMPT])
def test_a_template_without_a_twin_ends_in_the_remedy(source: str) -> None:
    with pytest.raises(UserError, match=r"\{% generation %\}.*--chat_template_path"):
        training_template(source, SPECIAL)


def test_a_twin_that_fails_on_a_row_is_noticed() -> None:
    # A marked stretch is a macro to Jinja, in which `varargs` is defined; no probe holds the word that asks for it.
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if 'secret' in m.content %}{{ 'marked' if varargs is defined else 'plain' }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = with_template(source)
    assert targets({"where": "row", "messages": turns(CONVERSATIONS["one turn"])}, tokenizer) == ["Hello<|im_end|>"]
    row = {"where": "chat.jsonl:3", "messages": turns([("user", "Hi"), ("assistant", "a secret")])}
    with pytest.raises(UserError, match=r"^chat\.jsonl:3: with its answers marked, .*--chat_template_path"):
        segments(row, tokenizer)


@pytest.mark.parametrize("path", sorted(TRL_TEMPLATES.glob("qwen*.jinja")), ids=lambda path: path.stem)
def test_every_qwen_template_has_a_twin(path: Path) -> None:
    found = training_template(path.read_text(encoding="utf-8"), SPECIAL)
    assert found.header.startswith("<|im_start|>assistant\n") or "training" in path.stem


def test_a_marker_in_a_comment_marks_nothing() -> None:
    tokenizer = with_template("{# no {% generation %} here #}" + QWEN1_5)
    pairs = CONVERSATIONS["system"]
    assert targets({"where": "row", "messages": turns(pairs)}, tokenizer) == ["Hello<|im_end|>"]
