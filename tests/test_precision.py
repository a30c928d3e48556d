"""The format a run computes in: by device, unless the user says otherwise."""

import warnings
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from qvl.errors import UserError
from qvl.precision import Device, choose_precision, find_device
from qvl.settings import parse_settings

CPU = Device("cpu")
T4 = Device("cuda", (7, 5))
A100 = Device("cuda", (8, 0))
H100 = Device("cuda", (9, 0))


@pytest.mark.parametrize(
    ("device", "given", "bf16", "fp16", "dtype"),
    [
        (CPU, {}, False, False, "float32"),
        (T4, {}, False, True, "float16"),
        (A100, {}, True, False, "bfloat16"),
        (H100, {}, True, False, "bfloat16"),
        # The user's word goes.
        (CPU, {"bf16": True}, True, False, "bfloat16"),
        (A100, {"fp16": True}, False, True, "float16"),
        (A100, {"bf16": False}, False, False, "float32"),
        (A100, {"bf16": False, "fp16": False}, False, False, "float32"),
        (T4, {"fp16": False}, False, False, "float32"),
        (T4, {"bf16": False}, False, False, "float32"),
        (A100, {"dtype": "float32"}, False, False, "float32"),
        (A100, {"dtype": "bfloat16"}, True, False, "bfloat16"),
        (A100, {"dtype": "float16"}, False, True, "float16"),
        (A100, {"dtype": "auto"}, True, False, "auto"),
        (T4, {"dtype": "auto"}, False, True, "auto"),
        (CPU, {"dtype": "auto"}, False, False, "auto"),
        (CPU, {"dtype": "bfloat16"}, True, False, "bfloat16"),
        # Weights in fp32 under bf16 autocast.
        (A100, {"dtype": "float32", "bf16": True}, True, False, "float32"),
    ],
)
def test_table(device: Device, given: dict[str, Any], bf16: bool, fp16: bool, dtype: str) -> None:
    chosen = choose_precision(device, given)
    assert chosen == {"bf16": bf16, "fp16": fp16, "dtype": dtype, "use_cpu": device.kind == "cpu"}
    # What was chosen, given back (as settings.yaml does), chooses the same.
    assert choose_precision(device, chosen) == chosen


@pytest.mark.parametrize(
    ("device", "given", "message"),
    [
        (A100, {"bf16": True, "fp16": True}, "--bf16 and --fp16 are both set"),
        (CPU, {"fp16": True}, "--fp16 needs a GPU"),
        (CPU, {"dtype": "float16"}, "needs a GPU"),
        (T4, {"bf16": True}, "needs compute capability 8.0, this GPU has 7.5"),
        (T4, {"dtype": "bfloat16"}, "needs compute capability 8.0"),
    ],
)
def test_what_a_device_cannot_do(device: Device, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose_precision(device, given)


def test_use_cpu_wins_over_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert find_device() == H100
    assert find_device(use_cpu=True) == CPU


def test_a_cpu_build_of_torch_beside_a_gpu_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)
    with pytest.warns(UserWarning, match="torch is a CPU build"):
        assert find_device() == CPU
    monkeypatch.setattr("shutil.which", lambda name: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_device() == CPU


def test_settings_carry_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plain = parse_settings({}, {}, [])
    assert (plain.training.bf16, plain.training.fp16, plain.model.dtype) == (False, False, "float32")
    assert plain.training.use_cpu and plain.training.device.type == "cpu"
    in_bf16 = parse_settings({}, {}, ["--bf16"])
    assert in_bf16.training.bf16 and in_bf16.model.dtype == "bfloat16"


def test_the_tiny_models_would_load_in_bf16_on_their_own() -> None:
    """So that fp32 on a CPU is the choice made here, not what the weights happen to be stored in."""
    from qvl.model_names import model_source

    assert AutoConfig.from_pretrained(model_source("qvl/tiny-qwen3-vl")).dtype == torch.bfloat16
