"""Training over an 8-bit base: activation checkpointing that lets go of what bitsandbytes' layers hold on to."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from curves import KEYS, training_curve
from tiny import VISION, settings_for
from torch.utils.checkpoint import checkpoint

from qvl.training_form import checkpointing_arguments
from recipes.flickr8k import RECIPE

IN_8_BIT = ["--load_in_8bit", "--gradient_checkpointing"]
UPSTREAM = ["--gradient_checkpointing_kwargs", '{"use_reentrant": false}']


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        (IN_8_BIT, {"use_reentrant": True}),
        ([*IN_8_BIT, *UPSTREAM], None),
        (["--load_in_8bit", "--gradient_checkpointing", "false"], None),
        (["--load_in_4bit", "--gradient_checkpointing"], None),
    ],
)
def test_8_bit_layers_are_checkpointed_anew(flags: list[str], kind: dict[str, bool] | None) -> None:
    arguments = checkpointing_arguments(settings_for(VISION[0], *flags))
    assert arguments.get("gradient_checkpointing_kwargs") == kind


def test_a_training_is_that_of_upstreams_checkpointing_and_quiet(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    flags = [*IN_8_BIT, "--lora_dropout", "0.05", "--num_train_examples", "48", "--max_steps", "3"]
    anew = training_curve(RECIPE, tmp_path / "anew", *flags)
    screen = "".join(capfd.readouterr())
    assert "MatMul8bitLt" not in screen and "requires_grad" not in screen
    assert not [warning for warning in recwarn if "requires_grad" in str(warning.message)]
    upstream = training_curve(RECIPE, tmp_path / "upstream", *flags, *UPSTREAM)
    for key in KEYS:
        assert anew[key] == pytest.approx(upstream[key], rel=1e-6), key


@pytest.mark.parametrize(("is_anew", "holds"), [(True, False), (False, True)])
def test_what_upstreams_checkpointing_holds(is_anew: bool, holds: bool) -> None:
    """The reason, in bitsandbytes' own layer: what it has read outlives a checkpointed forward pass, or does not."""
    layer = Linear8bitLt(64, 64, bias=False, has_fp16_weights=False, threshold=6.0).to("cpu")
    read: list[weakref.ref[torch.Tensor]] = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        between = x * 2
        read.append(weakref.ref(between))
        return layer(between).sum(dim=-1)

    x = torch.randn(8, 64, requires_grad=True)
    out = checkpoint(forward, x, use_reentrant=is_anew)
    gc.collect()
    assert (read[0]() is not None) is holds
    out.sum().backward()
    assert x.grad is not None
