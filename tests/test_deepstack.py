"""Visual features behind the first layers: upstream's sums and gradients, without a question to the device."""

from types import MethodType
from typing import Any

import torch
from tiny import VISION, answered, base, picture, processing_class
from torch.utils._python_dispatch import TorchDispatchMode

from qvl.collators import CompletionCollator
from qvl.deepstack import add_deepstack_without_waiting, add_visual_features

QWEN3_VL, QWEN2_5_VL = VISION
# Ops whose output's size, or value, the host has to wait for.
ASKING = {"aten.nonzero.default", "aten._local_scalar_dense.default", "aten.masked_select.default"}


class Asked(TorchDispatchMode):
    """Counts the ops that would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        has_mask = any(isinstance(a, torch.Tensor) and a.dtype == torch.bool for a in _flat(args[1:]))
        if str(func) in ASKING or ("index" in str(func) and has_mask):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _flat(values: Any) -> list[Any]:
    return [part for value in values for part in (_flat(value) if isinstance(value, list | tuple) else [value])]


def test_sums_and_gradients_are_upstreams() -> None:
    decoder = base(QWEN3_VL).get_decoder()
    upstream = MethodType(type(decoder)._deepstack_process, decoder)
    torch.manual_seed(0)
    hidden, visual = torch.randn(3, 7, 8), torch.randn(6, 8)
    places = torch.zeros(3, 7, dtype=torch.bool)
    places[0, 2:5] = places[2, 0] = places[2, 5:] = True  # the second row has no image
    weights = torch.randn(3, 7, 8)

    found = []
    for add in (upstream, add_visual_features):
        inputs = [hidden.clone().requires_grad_(), visual.clone().requires_grad_()]
        result = add(inputs[0], places, inputs[1])
        (result * weights).sum().backward()
        found.append([result.detach(), *(tensor.grad for tensor in inputs)])

    for wanted, got in zip(*found, strict=True):
        assert torch.equal(wanted, got)


def test_nothing_is_asked_of_the_device_in_the_decoder() -> None:
    model = base(QWEN3_VL)
    images = [picture(64, 64), picture(96, 64)]
    rows = [answered("What?", "That.", images[:1]), answered("And these?", "Those.", images)]
    batch = CompletionCollator(processing_class(QWEN3_VL), max_length=None)(rows)
    seen: list[dict[str, Any]] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    model(**{key: value for key, value in batch.items() if key not in ("labels", "num_answers")}, use_cache=False)
    hook.remove()
    inputs = {**seen[0], "attention_mask": None, "inputs_embeds": seen[0]["inputs_embeds"].detach().requires_grad_()}
    assert inputs["deepstack_visual_embeds"]

    with Asked() as asked:
        model.get_decoder()(**inputs).last_hidden_state.sum().backward()

    assert asked.names == []


def test_other_families_are_left_alone() -> None:
    model = base(QWEN2_5_VL)
    before = dict(vars(model.get_decoder()))

    add_deepstack_without_waiting(model)

    assert vars(model.get_decoder()) == before
