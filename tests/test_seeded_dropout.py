"""Dropout in compiled layers: the backward has the forward's mask, also where it is computed again."""

import copy

import pytest
import torch
import torch._functorch.config
from peft import LoraConfig, get_peft_model
from tiny import CHAT, base
from torch import nn

from qvl.seeded_dropout import SeededDropout, seed_dropout

BACKEND = "aot_eager_decomp_partition"


def seed(first: int, second: int) -> torch.Tensor:
    return torch.tensor([first, second], dtype=torch.int32)


class Layer(nn.Module):
    """Two products with a dropout between them, as in LoRA."""

    def __init__(self, dropout: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.dropout = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.dropout(torch.relu(self.first(x))))


def disagreement(dropout: nn.Module, budget: float) -> float:
    """How far a gradient is off: linear in its second weight, the layer's output sums up to <gradient, weight>."""
    torch._dynamo.reset()
    layer = Layer(dropout)
    layer.compile(dynamic=True, backend=BACKEND)
    with (
        torch._functorch.config.patch(activation_memory_budget=budget),
        torch._dynamo.config.patch(specialize_float=True),
    ):
        output = layer(torch.randn(6, 8, requires_grad=True))
        (gradient,) = torch.autograd.grad(output.sum(), layer.second.weight)
    return abs(((gradient * layer.second.weight).sum() - output.sum()).item())


@pytest.mark.parametrize("budget", [0.0, 0.5])
def test_the_backward_has_the_forwards_mask(budget: float) -> None:
    assert disagreement(SeededDropout(0.5, seed(3, 4)), budget) < 1e-5
    # What this is for; once torch keeps its own numbers, the module can go.
    assert disagreement(nn.Dropout(0.5), budget) > 1e-3


def test_masks_are_dropouts() -> None:
    x = torch.ones(200, 500)
    masks = [SeededDropout(0.05, seed(*pair))(x) for pair in ((1, 2), (1, 3), (2, 2), (70_000, 2))]
    for mask in masks:
        assert mask.unique().tolist() == pytest.approx([0, 1 / 0.95])
        # Five standard deviations of the share among 100,000.
        assert float((mask == 0).double().mean()) == pytest.approx(0.05, abs=5 * (0.05 * 0.95 / 1e5) ** 0.5)
        for share in ((mask == 0).double().mean(dim=0), (mask == 0).double().mean(dim=1)):
            assert float(share.max()) < 0.05 + 6 * (0.05 * 0.95 / len(mask)) ** 0.5
    for first in range(len(masks)):
        for second in range(first):
            both = ((masks[first] == 0) & (masks[second] == 0)).double().mean()
            assert float(both) == pytest.approx(0.05**2, abs=5 * (0.05**2 / 1e5) ** 0.5)


def test_neighbours_are_independent() -> None:
    dropped = (SeededDropout(0.3, seed(11, 12))(torch.ones(400, 500)) == 0).double() - 0.3
    for shift in (1, 2, 8, 500, 512):
        flat = dropped.flatten()
        assert abs(float((flat[:-shift] * flat[shift:]).mean())) < 5 * 0.21 / len(flat) ** 0.5


def test_every_pass_in_training_draws_anew_and_a_seeded_one_repeats() -> None:
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base(CHAT)), config).train()
    seed_dropout(model, model.device)
    assert not any(type(module) is nn.Dropout and module.p > 0 for module in model.modules())
    ids = torch.arange(12)[None]

    def answer() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits

    torch.manual_seed(1)
    first, second = answer(), answer()
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(answer(), first)
    model.eval()
    assert torch.equal(answer(), answer())
    assert not [name for name in model.state_dict() if "seed" in name]
