"""Which floating-point format a run computes in; settled before SFTConfig is built, whose default raises on a CPU."""

import shutil
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from qvl.errors import UserError


@dataclass(frozen=True)
class Device:
    """What the choice of precision depends on.

    Attributes:
        kind: "cuda" or "cpu".
        capability: compute capability of the GPU, (0, 0) on a CPU.
    """

    kind: str
    capability: tuple[int, int] = (0, 0)


def find_device(use_cpu: bool = False) -> Device:
    """The device a run would use; reports a CPU-only torch beside an NVIDIA GPU, the usual cause of a slow run."""
    if torch.cuda.is_available() and not use_cpu:
        return Device("cuda", torch.cuda.get_device_capability())
    if torch.version.cuda is None and shutil.which("nvidia-smi") and not use_cpu:
        warnings.warn(
            "This machine has an NVIDIA driver but torch is a CPU build, so the run uses the CPU. "
            "Install a CUDA build of torch (README, 'Choosing a torch wheel').",
            stacklevel=2,
        )
    return Device("cpu")


def choose_precision(device: Device, given: dict[str, Any]) -> dict[str, Any]:
    """Values for `bf16`, `fp16`, `dtype` and `use_cpu` that complete what the user gave.

    bf16 from compute capability 8.0 on, fp16 below it (with fp32 adapters, see `qvl.trainer`), fp32 on a CPU.

    Args:
        device: what `find_device` returned.
        given: the flags among these four that the user or the recipe set.

    Returns:
        All four, JSON-able; `dtype` is the name that `ModelConfig.dtype` takes.

    Raises:
        UserError: contradictory flags, or a format the device cannot train in.
    """
    if given.get("bf16") and given.get("fp16"):
        raise UserError("--bf16 and --fp16 are both set: keep one.")
    dtype = given.get("dtype")
    if "bf16" in given or "fp16" in given:
        bf16, fp16 = bool(given.get("bf16")), bool(given.get("fp16"))
    elif dtype not in (None, "auto"):
        bf16, fp16 = dtype == "bfloat16", dtype == "float16"
    else:
        bf16 = device.kind == "cuda" and device.capability >= (8, 0)
        fp16 = device.kind == "cuda" and not bf16
    if fp16 and device.kind == "cpu":
        raise UserError("--fp16 needs a GPU: gradients in fp16 need a loss scaler, which has no CPU kernels here.")
    if bf16 and device.kind == "cuda" and device.capability < (8, 0):
        major, minor = device.capability
        raise UserError(
            f"--bf16 needs compute capability 8.0, this GPU has {major}.{minor}: leave the flag out to train in fp16."
        )
    implied = "bfloat16" if bf16 else "float16" if fp16 else "float32"
    return {"bf16": bf16, "fp16": fp16, "dtype": dtype or implied, "use_cpu": device.kind == "cpu"}
