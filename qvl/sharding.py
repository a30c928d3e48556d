"""How a launcher shares one model out over GPUs (DeepSpeed ZeRO, FSDP2), and what works then.

A launch file says it (`environments/accelerate/`), so this reads what the launcher left in environment variables.
With ZeRO-2 each process has the whole base. With ZeRO-3 and FSDP2 it has a piece of every tensor while it trains, and
a whole base of its own in the other stages.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

import torch
from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import is_deepspeed_available, unset_hf_deepspeed_config
from transformers.trainer_utils import IntervalStrategy

from qvl import processes
from qvl.errors import UserError
from qvl.settings import Settings
from qvl.trained_parts import names_of_trained_parts


class Sharding(Enum):
    """What the processes of a training share out."""

    NOTHING = "nothing"
    ZERO2 = "ZeRO-2"
    ZERO3 = "ZeRO-3"
    FSDP2 = "FSDP2"

    @property
    def in_pieces(self) -> bool:
        """Whether no process holds the whole base while it trains."""
        return self in (Sharding.ZERO3, Sharding.FSDP2)


def sharding() -> Sharding:
    """What the launcher asks for.

    Raises:
        UserError: something that a run here is not made for, or a package that is missing.
    """
    if _is_set("ACCELERATE_USE_FSDP"):
        if os.environ.get("FSDP_VERSION") != "2":
            raise UserError("FSDP's first version is not supported: set fsdp_version: 2 in the launch file.")
        return Sharding.FSDP2
    if not _is_set("ACCELERATE_USE_DEEPSPEED"):
        return Sharding.NOTHING
    if not is_deepspeed_available():
        raise UserError(
            "The launch file asks for DeepSpeed, which is not installed: bash environments/setup_gpu_env.sh deepspeed"
        )
    stage = _zero_stage()
    if stage not in (2, 3):
        raise UserError(f"The launch file asks for ZeRO stage {stage}: 2 and 3 are supported; 0 and 1 are ddp.yaml's.")
    return Sharding.ZERO2 if stage == 2 else Sharding.ZERO3


def require_shardable(settings: Settings) -> None:
    """Stops a run whose flags do not go with several processes, or with a model in pieces; needs no weights.

    Raises:
        UserError: says which flag and why.
    """
    kind = sharding()
    for is_asked, problem in _refusals(settings, kind):
        if is_asked:
            raise UserError(problem)


def _refusals(settings: Settings, kind: Sharding) -> Iterator[tuple[bool, str]]:
    recipe, model, training = settings.recipe, settings.model, settings.training
    is_quantized = model.load_in_4bit or model.load_in_8bit
    evaluates = training.eval_strategy != IntervalStrategy.NO or training.eval_on_start
    yield (
        processes.num_processes() > 1 and "check" in recipe.stages,
        "The stage check looks at one model on one GPU: run it without a launcher, then the others with it.",
    )
    if kind is Sharding.NOTHING or "train" not in recipe.stages:
        return
    yield (
        recipe.base_precision is not None,
        f"--base_precision {recipe.base_precision} trains in one process or with ddp.yaml: its weights are no "
        f"parameters that {kind.value} could share out.",
    )
    yield (
        bool(names_of_trained_parts(settings) or model.lora_modules_to_save or recipe.vision_encoder),
        f"With {kind.value} only LoRA is trained: a part that is trained whole is kept in a format of its own, which "
        "one process or ddp.yaml can do.",
    )
    yield model.load_in_8bit, f"--load_in_8bit was not tried with {kind.value}: use --load_in_4bit, or ddp.yaml."
    if not kind.in_pieces:
        return
    yield (
        is_quantized and kind is Sharding.ZERO3,
        "ZeRO-3 takes 4-bit weights apart without their scales: use zero2.yaml or fsdp2.yaml with --load_in_4bit.",
    )
    yield (
        is_quantized and model.bnb_4bit_quant_storage != model.dtype,
        f"FSDP2 shares out tensors of one format: add --bnb_4bit_quant_storage {model.dtype}.",
    )
    yield (
        recipe.cache_vision_features,
        f"--cache_vision_features needs the whole vision tower, of which {kind.value} leaves a piece to each process: "
        "use ddp.yaml or zero2.yaml.",
    )
    yield (
        evaluates,
        f"Evaluations while training need the whole model, of which {kind.value} leaves a piece to each process: use "
        "ddp.yaml or zero2.yaml, or leave out --eval_strategy; the stage evaluate works.",
    )


def keep_sums_in_full(plugin: FullyShardedDataParallelPlugin | None) -> None:
    """Has FSDP2 add gradients up in fp32, and give the loss as it was computed.

    accelerate asks for 16 bits wherever a run computes in them: a bf16 loss has three digits, and gradients lose theirs
    in every micro-batch.

    Args:
        plugin: accelerate's, before it has prepared a model; None where nothing is shared out by FSDP2.
    """
    if plugin is not None and isinstance(policy := plugin.mixed_precision_policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = dataclasses.replace(policy, reduce_dtype=torch.float32, output_dtype=None)


def leave_linear_layers_plain(plugin: DeepSpeedPlugin) -> None:
    """Keeps DeepSpeed from replacing `torch.nn.functional.linear`, unless its configuration file asks for that.

    Its function keeps a weight for the backward, and not a view of it, which would outlive the weight's release.
    Compiled code does so by itself. And it asks the weight for its number, which has torch 2.11 compile every layer
    anew: minutes before the first step ends.

    Args:
        plugin: accelerate's, for ZeRO-3, before a model is loaded.
    """
    plugin.deepspeed_config["zero_optimization"].setdefault("memory_efficient_linear", False)


def gather_at_once(layers: Sequence[nn.Module], plugin: DeepSpeedPlugin | None) -> None:
    """Has ZeRO-3 put a layer's weights together at the layer, and those of the next one while it computes.

    At each of its modules, as it does otherwise, it would cut a compiled layer into as many pieces.

    Args:
        layers: of a model that no trainer has yet.
        plugin: accelerate's; None where DeepSpeed shares nothing out.
    """
    if plugin is None or plugin.zero_stage != 3:
        return
    from deepspeed.utils import set_z3_leaf_module

    for layer in layers:
        set_z3_leaf_module(layer, True)
    # Of a weight that is shared out `numel` is 0.
    largest = max(sum(getattr(p, "ds_numel", p.numel()) for p in layer.parameters()) for layer in layers)
    plugin.deepspeed_config["zero_optimization"].setdefault("stage3_prefetch_bucket_size", largest)


@contextmanager
def loading_in_pieces(settings: Settings) -> Iterator[None]:
    """Here transformers loads models for ZeRO-3, a piece to each process.

    Elsewhere it makes whole models, whatever the launcher says: answers come from those, and skeletons are made of no
    weights.
    """
    plugin = settings.training.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        if settings.recipe.compile_layers:
            leave_linear_layers_plain(plugin)
        plugin.set_deepspeed_weakref()
    try:
        yield
    finally:
        load_whole_models()


def load_whole_models() -> None:
    """Makes transformers forget that the launcher asks for ZeRO-3, of which settings and trainers remind it."""
    unset_hf_deepspeed_config()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of which each process may hold a piece; all processes have to ask for it at the same time."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor


def trained_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """Every trained tensor, whole, on the CPU, by its name; all processes have to ask for it at the same time."""
    return {name: whole(p).detach().cpu() for name, p in model.named_parameters() if p.requires_grad}


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def _zero_stage() -> int:
    """As accelerate finds it: in DeepSpeed's own file where the launch file names one."""
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file == "none":
        return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    return int(json.loads(Path(file).read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage", 0))
