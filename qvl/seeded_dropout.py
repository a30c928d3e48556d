"""Dropout whose mask may be computed again: it follows from a seed that is kept, not from a generator that moves on.

Where a compiled layer may not keep all that its backward needs (`activation_memory_budget` below 1), torch computes the
cheap parts again, and holds dropout for one: the backward then draws new numbers, and gives the gradient of another
mask than the forward's, without a word (torch 2.11 and 2.14).
"""

import torch
from peft import PeftModel
from torch import nn

_BITS = 31


class SeededDropout(nn.Module):
    """`nn.Dropout` with the mask as a function of a seed and an element's place.

    Args:
        p: probability of an element to become zero, below 1; the others are divided by 1 - p.
        seed: int32 (2,), on the device of what is dropped; who wants another mask writes other numbers into it.
    """

    seed: torch.Tensor
    # Tensors, not numbers: compiled code then serves every p.
    threshold: torch.Tensor
    scale: torch.Tensor

    def __init__(self, p: float, seed: torch.Tensor) -> None:
        super().__init__()
        self.p = p
        self.register_buffer("seed", seed, persistent=False)
        threshold = torch.tensor(int(p * 2**_BITS), dtype=torch.int32, device=seed.device)
        self.register_buffer("threshold", threshold, persistent=False)
        self.register_buffer("scale", torch.tensor(1 / (1 - p), device=seed.device), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input with elements dropped while training, else as it is."""
        if not self.training:
            return x
        places = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape)
        numbers = _mixed(_mixed(places ^ self.seed[0]) ^ self.seed[1]) & (2**_BITS - 1)
        return torch.where(numbers >= self.threshold, x * self.scale, 0.0)

    def extra_repr(self) -> str:
        """As `nn.Dropout` shows itself."""
        return f"p={self.p}"


def _mixed(values: torch.Tensor) -> torch.Tensor:
    """Each int32 as another that depends on all of its bits: `lowbias32` of github.com/skeeto/hash-prospector.

    A right shift of int32 repeats the sign, so what it brings in is masked.
    """
    values = values ^ ((values >> 16) & 0xFFFF)
    values = values * 0x7FEB352D
    values = values ^ ((values >> 15) & 0x1FFFF)
    values = values * (0x846CA68B - 2**32)
    return values ^ ((values >> 16) & 0xFFFF)


def seed_dropout(model: PeftModel, device: torch.device) -> None:
    """Replaces the adapter's dropout in place; each forward pass of the model draws new seeds, all in one kernel.

    They are drawn from the device's generator, so that a seeded run repeats and a resumed one goes on.

    Args:
        model: an adapter on its base.
        device: where it will compute; a model that is shared out comes there later.
    """
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Dropout and child.p > 0
    ]
    seeds = torch.zeros(len(places), 2, dtype=torch.int32, device=device)
    for seed, (parent, name, dropout) in zip(seeds, places, strict=True):
        parent.add_module(name, SeededDropout(dropout.p, seed).train(dropout.training))
    if places:
        model.register_forward_pre_hook(lambda module, inputs: _draw(seeds))


def _draw(seeds: torch.Tensor) -> None:
    seeds.random_(0, 2**_BITS - 1)
