"""Batches: answers are the labels and nothing else, and otherwise they are TRL's own batches."""

import copy
import functools
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packaging.version import Version
from tiny import CHAT, CPU, VISION, answered, base, conversation, picture, processing_class, settings_for
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import get_training_chat_template
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from qvl.adapters import add_adapter
from qvl.collators import CompletionCollator
from qvl.encode import IGNORED_LABEL, segments, tokenizer_of
from qvl.errors import UserError
from qvl.models import load_base

END = "<|im_end|>"
Example = dict[str, Any]


def collate(examples: list[Example], name: str = VISION[0], max_length: int | None = None, **kwargs: Any) -> Any:
    return CompletionCollator(processing_class(name), max_length, **kwargs)(examples)


def rows_of(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each row without its padding, after checking that the padding is at the right."""
    result = []
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        width = int(mask.sum())
        assert mask[:width].all() and not mask[width:].any()
        assert (labels[width:] == IGNORED_LABEL).all()
        result.append((ids[:width].tolist(), labels[:width].tolist()))
    return result


# Labels: the property that everything else rests on.

WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
ANSWERS = WORDS.filter(lambda text: text.strip() != "")
IMAGES = st.lists(st.builds(picture, st.integers(4, 130), st.integers(4, 130), st.integers(0, 9)), max_size=3)
ANSWERED = st.lists(st.builds(answered, WORDS, ANSWERS, IMAGES), min_size=1, max_size=4)
TURNS = st.lists(st.tuples(WORDS, ANSWERS), min_size=1, max_size=3)
CONVERSATIONS = st.lists(st.builds(conversation, TURNS, IMAGES), min_size=1, max_size=3)


def answers_of(example: Example) -> list[str]:
    turns = example["completion"] if "completion" in example else example["messages"]
    return [turn["content"][0]["text"] for turn in turns if turn["role"] == "assistant"]


def runs(labels: list[int]) -> list[list[int]]:
    """The stretches of labels between ignored positions."""
    result: list[list[int]] = []
    for before, label in zip([IGNORED_LABEL, *labels], labels, strict=False):
        if label != IGNORED_LABEL:
            if before == IGNORED_LABEL:
                result.append([])
            result[-1].append(label)
    return result


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(examples=st.one_of(ANSWERED, CONVERSATIONS))
def test_labels_are_the_answers_and_their_end_tokens(examples: list[Example]) -> None:
    processor = processing_class(VISION[0])
    tokenizer = tokenizer_of(processor)
    batch = collate(examples)
    widths = {tuple(batch[key].shape) for key in ("input_ids", "attention_mask", "labels", "mm_token_type_ids")}
    assert len(widths) == 1
    for example, (ids, labels) in zip(examples, rows_of(batch), strict=True):
        assert all(label in (IGNORED_LABEL, token) for token, label in zip(ids, labels, strict=True))
        decoded = [tokenizer.decode(run) for run in runs(labels)]
        # The tokenizers of Qwen compose characters (NFC).
        assert decoded == [unicodedata.normalize("NFC", answer) + END for answer in answers_of(example)]
        assert not {processor.image_token_id, tokenizer.pad_token_id} & set(labels)
        # What is no label is the rendered prompt, whole.
        rest = [token for token, label in zip(ids, labels, strict=True) if label == IGNORED_LABEL]
        visual = [token for token in rest if token == processor.image_token_id]
        prompt = "".join(part.text for part in segments(example, processor) if not part.is_target)
        shown = tokenizer.decode([token for token in rest if token != processor.image_token_id])
        assert shown == "".join(
            unicodedata.normalize("NFC", part.text).replace("<|image_pad|>", "")
            for part in segments(example, processor)
            if not part.is_target
        )
        assert prompt.count("<|image_pad|>") == len(example["images"])
        assert (len(visual) > 0) == (len(example["images"]) > 0)
    # As many placeholders as the vision tower gives features, and their positions are marked.
    is_image = batch["input_ids"] == processor.image_token_id
    num_features = int(batch["image_grid_thw"].prod(dim=1).sum()) // 4 if "image_grid_thw" in batch else 0
    assert int(is_image.sum()) == num_features
    assert torch.equal(batch["mm_token_type_ids"], is_image.long())


# Parity with TRL

PAIRS = [
    answered("Describe.", "A dog runs.", [picture(64, 64)]),
    answered("What do you see here, in detail?", "Two", [picture(100, 70), picture(70, 150)]),
    answered("No picture at all", "An answer that is longer than the others: ünïcode, 犬."),
]
TALKS = [
    conversation([("Describe.", "A dog runs."), ("Colour?", "Brown")], [picture(64, 64)]),
    conversation([("Hello", "Hi")]),
    conversation([("Compare them please", "Same"), ("a", "b"), ("c", "Done.")], [picture(100, 70), picture(70, 150)]),
]
TALKING = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"), reason="TRL's assistant_only_loss needs transformers 5.18"
)
FORMS = [pytest.param(PAIRS, id="prompt-completion"), pytest.param(TALKS, id="messages", marks=TALKING)]


@functools.cache
def newline_id(name: str) -> int:
    (token,) = tokenizer_of(processing_class(name))("\n")["input_ids"]
    return token


def trl_batch(examples: list[Example], name: str) -> dict[str, torch.Tensor]:
    processor = processing_class(name)
    keys = ("images", "prompt", "completion", "messages")
    rows = [{key: copy.deepcopy(example[key]) for key in keys if key in example} for example in examples]
    if "messages" in examples[0]:
        template = get_training_chat_template(processing_class=processor)
        collator = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True, chat_template=template)
    else:
        collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    return dict(collator(rows))


def without_newline_labels(batch: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """TRL's batch without what it teaches behind the end token: the template's newline."""
    labels = batch["labels"].clone()
    end = tokenizer_of(processing_class(name)).eos_token_id
    follows_end = torch.nn.functional.pad(batch["input_ids"][:, :-1] == end, (1, 0))
    labels[follows_end & (labels == newline_id(name))] = IGNORED_LABEL
    return {**batch, "labels": labels}


@pytest.mark.parametrize("name", VISION)
@pytest.mark.parametrize("examples", FORMS)
def test_batches_are_trls_but_for_the_newline_behind_the_end_token(name: str, examples: list[Example]) -> None:
    ours, theirs = collate(examples, name), trl_batch(examples, name)
    assert ours.keys() == theirs.keys()
    newline = newline_id(name)
    masked = without_newline_labels(theirs, name)
    for (ids, labels), (their_ids, their_labels), (_, masked_labels) in zip(
        rows_of(ours), rows_of(theirs), rows_of(masked), strict=True
    ):
        # Our row ends with the last end token; theirs has the template's newline behind it.
        assert their_ids == [*ids, newline]
        assert masked_labels == [*labels, IGNORED_LABEL]
        assert [label for label in their_labels if label != IGNORED_LABEL].count(newline) == len(runs(labels)), (
            "TRL learns the newline: if it no longer does, the collator's docstring has to be changed"
        )
    width = ours["input_ids"].shape[1]
    assert torch.equal(ours["mm_token_type_ids"], theirs["mm_token_type_ids"][:, :width])
    for key in ours.keys() - {"input_ids", "labels", "attention_mask", "mm_token_type_ids"}:
        assert torch.equal(ours[key], theirs[key]), key


@pytest.mark.parametrize("name", VISION)
@pytest.mark.parametrize("examples", FORMS)
def test_the_loss_is_trls(name: str, examples: list[Example]) -> None:
    model = base(name)
    theirs = trl_batch(examples, name)
    with torch.no_grad():
        ours = model(**collate(examples, name)).loss
        masked = model(**without_newline_labels(theirs, name)).loss
        unmasked = model(**theirs).loss
    assert ours.item() == pytest.approx(masked.item(), rel=1e-6)
    assert abs(unmasked.item() - masked.item()) > 1e-3, "the newline would not matter, so this would prove nothing"


def test_the_gradients_are_trls() -> None:
    name = VISION[0]
    options = settings_for(name, "--lora_dropout", "0")
    model = add_adapter(load_base(options, CPU), options)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:  # zero at first, which would hide the gradient of A
            torch.nn.init.normal_(parameter, std=0.02)
    gradients = []
    for batch in (collate(PAIRS, name), without_newline_labels(trl_batch(PAIRS, name), name)):
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    ours, theirs = gradients
    assert ours.norm() > 0.01
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


def text_rows(form: str) -> list[Example]:
    if form == "messages":
        return [conversation([("Hi", "Hello"), ("And now?", "Nothing")]), conversation([("2+2?", "It is four.")])]
    return [answered("Hi", "Hello"), answered("What is two and two?", "It is four.")]


@pytest.mark.parametrize("form", ["messages", "prompt-completion"])
def test_text_only_batches_are_trls_too(form: str, tmp_path: Any) -> None:
    """TRL tokenizes text-only rows before training, so its numbers come out of an SFTTrainer."""
    rows = text_rows(form)
    plain = [
        {
            key: [{"role": turn["role"], "content": turn["content"][0]["text"]} for turn in row[key]]
            for key in ("messages", "prompt", "completion")
            if key in row
        }
        for row in rows
    ]
    args = SFTConfig(
        output_dir=str(tmp_path),
        max_length=None,
        bf16=False,
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=False,
        assistant_only_loss=form == "messages",
    )
    tokenizer = copy.deepcopy(processing_class(CHAT))
    model = copy.deepcopy(base(CHAT))
    trainer = SFTTrainer(model, args=args, train_dataset=Dataset.from_list(plain), processing_class=tokenizer)
    theirs = dict(trainer.data_collator([trainer.train_dataset[index] for index in range(len(rows))]))
    theirs.setdefault("attention_mask", (theirs["input_ids"] != tokenizer.pad_token_id).long())
    ours = collate(rows, CHAT)
    masked = without_newline_labels(theirs, CHAT)
    for (ids, labels), (their_ids, _), (_, masked_labels) in zip(
        rows_of(ours), rows_of(theirs), rows_of(masked), strict=True
    ):
        assert their_ids == [*ids, newline_id(CHAT)]
        assert masked_labels == [*labels, IGNORED_LABEL]
    with torch.no_grad():
        loss = base(CHAT)(**ours).loss
        inputs = {key: masked[key] for key in ("input_ids", "attention_mask", "labels")}
        assert loss.item() == pytest.approx(base(CHAT)(**inputs).loss.item(), rel=1e-6)


# Rows that do not fit


def num_tokens(example: Example, name: str = VISION[0]) -> int:
    return int(collate([example], name)["attention_mask"].sum())


def test_a_row_as_long_as_the_limit_fits() -> None:
    limit = num_tokens(PAIRS[0])
    assert collate([PAIRS[0]], max_length=limit)["input_ids"].shape == (1, limit)


def test_an_overlong_row_is_named() -> None:
    long = answered("Hi", "word " * 50, where="captions.jsonl:12")
    with pytest.raises(UserError, match=r"^captions\.jsonl:12: \d+ tokens, max_length is 30\. .*--overlong drop"):
        collate([PAIRS[0] | {"where": "captions.jsonl:1"}, long][1:], max_length=30)


def test_truncation_cuts_text_behind_the_limit() -> None:
    long = answered("Hi", "word " * 50, [picture(64, 64)])
    whole = collate([long])
    cut = collate([long, PAIRS[0]], max_length=40, truncate=True)
    assert cut["input_ids"].shape[1] == 40
    assert torch.equal(cut["input_ids"][0], whole["input_ids"][0, :40])
    assert torch.equal(cut["labels"][0], whole["labels"][0, :40])
    is_image = cut["input_ids"] == processing_class(VISION[0]).image_token_id
    assert int(is_image.sum()) == int(cut["image_grid_thw"].prod(dim=1).sum()) // 4


def test_truncation_never_cuts_an_image() -> None:
    two = answered("Hi", "Hello", [picture(100, 100), picture(100, 100)], where="row 5")
    first_target = next(i for i, (_, label) in enumerate(zip(*rows_of(collate([two]))[0], strict=True)) if label >= 0)
    for limit in range(1, first_target + 1):
        with pytest.raises(UserError, match=r"^row 5: .*(would cut image tokens|no token of the answer)"):
            collate([two], max_length=limit, truncate=True)
    assert collate([two], max_length=first_target + 1, truncate=True)["input_ids"].shape == (1, first_target + 1)


def test_an_image_in_a_later_turn_is_not_cut_either() -> None:
    row = conversation([("Hi", "Hello"), ("And this?", "A dog")], where="row 6")
    row["messages"][2]["content"].insert(0, {"type": "image"})
    row["images"] = [picture(100, 100)]
    (ids, _), *_ = rows_of(collate([row]))
    limit = ids.index(processing_class(VISION[0]).image_token_id) + 2
    with pytest.raises(UserError, match=rf"^row 6: .*would cut image tokens at max_length {limit}"):
        collate([row], max_length=limit, truncate=True)


@pytest.mark.parametrize("limit", [3, 10])
def test_a_row_whose_answer_is_cut_away_is_named(limit: int) -> None:
    row = answered("a question of many words " * 5, "Hello", where="row 7")
    with pytest.raises(UserError, match=r"^row 7: no token of the answer is left"):
        collate([row], max_length=limit, truncate=True)


def test_a_conversation_without_an_answer_is_named() -> None:
    row = conversation([("Hi", "Hello")], where="row 8")
    row["messages"].pop()
    with pytest.raises(UserError, match=r"^row 8: there is no assistant's turn"):
        collate([row])


def mixed(make: Callable[..., Example]) -> list[Example]:
    turn = (lambda q, a: ([(q, a)],)) if make is conversation else lambda q, a: (q, a)
    return [make(*turn("Hi", "Hello")), make(*turn("See", "Dog"), [picture(64, 64)]), make(*turn("x" * 40, "y"))]


@pytest.mark.parametrize("make", [answered, conversation])
def test_a_row_is_the_same_alone_and_in_a_batch(make: Callable[..., Example]) -> None:
    examples = mixed(make)
    alone = [rows_of(collate([example]))[0] for example in examples]
    assert rows_of(collate(examples)) == alone
    assert rows_of(collate(examples[::-1])) == alone[::-1]
