"""Every check with a case that fails it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VISION, answered, picture, processing_class
from torch import nn

from qvl.adapters import ParameterReport
from qvl.checks import (
    Check,
    check_adapter_moved,
    check_frozen,
    check_labels,
    check_placeholders,
    check_placement,
    failed,
    hash_parameters,
    table,
    tensor_hash,
)
from qvl.collators import CompletionCollator

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool]


def values(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    numbers = torch.randint(0, 2 if dtype is torch.bool else 100, shape, generator=torch.Generator().manual_seed(0))
    return numbers.to(dtype)


CHANGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "one value": lambda x: x[3].fill_(not x[3].item()),
    "two swapped": lambda x: x.copy_(x[[1, 0, *range(2, len(x))]]),
    "all reversed": lambda x: x.copy_(x.flip(0)),
    "last value": lambda x: x[-1].fill_(not x[-1].item()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [37, 64])
def test_a_changed_tensor_has_another_hash(dtype: torch.dtype, change: str, size: int) -> None:
    tensor = values(dtype, size)
    tensor[0], tensor[1] = 0, 1
    changed = tensor.clone()
    CHANGES[change](changed)
    assert not torch.equal(tensor, changed)
    assert tensor_hash(tensor) != tensor_hash(changed)
    assert tensor_hash(tensor) == tensor_hash(tensor.clone())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_signs_count(dtype: torch.dtype) -> None:
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    seen = {tensor_hash(tensor), tensor_hash(-tensor)}
    for places in ([0], [1], [0, 1], [5, 500], list(range(0, 1000, 2)), list(range(500))):
        flipped = tensor.clone()
        flipped[places] *= -1
        seen.add(tensor_hash(flipped))
    assert len(seen) == 8
    zero = torch.zeros(4, dtype=dtype)
    assert tensor_hash(zero) != tensor_hash(-zero), "a sign of zero is a changed bit too"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=40), st.data())
def test_any_other_byte_is_another_hash(content: list[int], data: st.DataObject) -> None:
    tensor = torch.tensor(content, dtype=torch.uint8)
    place = data.draw(st.integers(0, len(content) - 1))
    changed = tensor.clone()
    changed[place] = (content[place] + data.draw(st.integers(1, 255))) % 256
    assert tensor_hash(tensor) != tensor_hash(changed)


def test_lengths_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len({tensor_hash(torch.zeros(n, dtype=torch.uint8)) for n in (4, 8, 12, 16)}) == 4
    tensor = torch.randn(1000)
    whole = tensor_hash(tensor)
    monkeypatch.setattr("qvl.checks._CHUNK_ELEMENTS", 64)
    assert tensor_hash(tensor) == whole, "the hash must not depend on how the tensor is cut"


def test_a_view_hashes_like_its_copy() -> None:
    tensor = torch.randn(8, 6)
    assert tensor_hash(tensor.t()) == tensor_hash(tensor.t().contiguous()) != tensor_hash(tensor)
    assert tensor_hash(tensor[::2]) == tensor_hash(tensor[::2].clone())
    assert tensor_hash(torch.tensor(1.5)) != tensor_hash(torch.tensor(-1.5))
    assert tensor_hash(torch.empty(0)) == tensor_hash(torch.empty(0))


def test_a_4bit_weight_is_seen_whole() -> None:
    """Packed weights and their scales: a changed scale changes the layer as much as a changed weight."""
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight.data = torch.randn(64, 64)
    layer = layer.to("cpu")
    before = hash_parameters(layer)
    assert "weight" in before and any("absmax" in name for name in before)
    layer.weight.data[5] ^= 1
    assert changed_names(before, hash_parameters(layer)) == {"weight"}
    layer.weight.data[5] ^= 1
    layer.weight.quant_state.absmax[0] *= 2
    assert any("absmax" in name for name in changed_names(before, hash_parameters(layer)))


def changed_names(before: dict[str, int], after: dict[str, int]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


class Adapted(nn.Module):
    """Parameters named as PEFT names them."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4)
        self.lora_A = nn.Linear(4, 2, bias=False)
        self.lora_B = nn.Linear(2, 4, bias=False)
        self.register_buffer("scale", torch.ones(1))


TRAINABLE = {"lora_A.weight", "lora_B.weight"}


def test_frozen_tensors() -> None:
    model = Adapted()
    before = hash_parameters(model)
    model.lora_B.weight.data += 1
    check = check_frozen(before, hash_parameters(model), TRAINABLE)
    assert check.passed and check.value == 0
    model.base.bias.data += 1
    model.scale += 1
    check = check_frozen(before, hash_parameters(model), TRAINABLE)
    assert not check.passed and check.value == 2
    assert "base.bias" in check.detail and "scale" in check.detail


def test_a_frozen_tensor_that_vanished_or_nothing_frozen_fails() -> None:
    model = Adapted()
    before = hash_parameters(model)
    after = {name: value for name, value in before.items() if name != "base.weight"}
    assert not check_frozen(before, after, TRAINABLE).passed
    assert not check_frozen(before, before, set(before)).passed


@pytest.mark.parametrize("moved", [[], ["lora_A.weight"], ["lora_B.weight"], ["lora_A.weight", "lora_B.weight"]])
def test_an_adapter_pair_that_did_not_move(moved: list[str]) -> None:
    layers = {f"layers.{i}.q_proj.{half}": i for i in range(3) for half in ("lora_A.weight", "lora_B.weight")}
    after = {name: value + 10 for name, value in layers.items()}
    for name in ("lora_A.weight", "lora_B.weight"):
        if name not in moved:
            after[f"layers.1.q_proj.{name}"] = 1
    check = check_adapter_moved(layers, after, set(layers))
    assert check.passed == bool(moved)
    assert check.value == (0 if moved else 1)
    assert moved or check.detail == "layers.1.q_proj"


def test_no_adapter_at_all_fails() -> None:
    assert not check_adapter_moved({}, {}, set()).passed


def batch_of(*sizes: tuple[int, int]) -> dict[str, torch.Tensor]:
    rows = [answered("Hi", "A dog", [picture(*size)] if size[0] else []) for size in sizes]
    return CompletionCollator(processing_class(VISION[0]), None)(rows)


IMAGE_ID = processing_class(VISION[0]).image_token_id
PAD_ID = processing_class(VISION[0]).tokenizer.pad_token_id


def test_placeholders() -> None:
    batch = batch_of((64, 64), (200, 100), (0, 0))
    assert check_placeholders(batch, IMAGE_ID, 2).passed
    assert check_placeholders(batch_of((0, 0)), IMAGE_ID, 2).passed
    assert check_placeholders(batch_of((0, 0)), None, 1).passed
    row, column = (batch["input_ids"] == IMAGE_ID).nonzero()[0].tolist()
    batch["input_ids"][row, column] = PAD_ID
    check = check_placeholders(batch, IMAGE_ID, 2)
    assert not check.passed and check.value == -1


def verdicts(batch: dict[str, torch.Tensor]) -> dict[str, Check]:
    found = check_labels([batch], {"image": IMAGE_ID, "padding": PAD_ID})
    return {check.name: check for check in found}


def spoil(batch: dict[str, torch.Tensor], kind: str) -> None:
    labels, ids = batch["labels"], batch["input_ids"]
    if kind == "image":
        labels[ids == IMAGE_ID] = IMAGE_ID
    elif kind == "padding":
        labels[batch["attention_mask"] == 0] = PAD_ID
    elif kind == "none":
        labels[1] = -100
    else:
        labels[labels != -100] += 5


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("image", {"no_image_token_is_a_label"}),
        ("padding", {"no_padding_token_is_a_label", "labels_are_input_tokens"}),
        ("none", {"every_row_has_a_target"}),
        ("shifted", {"labels_are_input_tokens"}),
    ],
)
def test_labels(kind: str, names: set[str]) -> None:
    batch = batch_of((64, 64), (0, 0))
    assert failed(verdicts(batch).values()) == []
    spoil(batch, kind)
    assert {check.name for check in failed(verdicts(batch).values())} == names


def test_labels_of_no_batch_are_not_good() -> None:
    assert failed(check_labels([], {"image": IMAGE_ID})) != []


def test_placement() -> None:
    inside = ParameterReport({"layers.*.q_proj": 4}, 10, 100, [])
    outside = ParameterReport({"layers.*.q_proj": 4}, 10, 100, ["model.visual.blocks.0.lora_A.weight"])
    assert check_placement(inside).passed
    check = check_placement(outside)
    assert not check.passed and "visual" in check.detail


def test_the_table_marks_failures() -> None:
    lines = table([Check("good", 0, "0", True), Check("bad", 2, "0 wrong", False, "this one")])
    assert lines == ["  ok   good: 0 (0)", "  FAIL bad: 2 (0 wrong) this one"]
    assert Check("good", 0, "0", True).as_dict() == {
        "name": "good",
        "value": 0,
        "threshold": "0",
        "passed": True,
        "detail": "",
    }
