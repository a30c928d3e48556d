"""Position ids made in the data loader's workers, where a model would stop the device to make them in its forward."""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig

from qvl.models import skeleton

# Token ids of a sample and its image_grid_thw (num_images, 3) or None -> positions, int64 (dimensions, length).
Positions = Callable[[Sequence[int], torch.Tensor | None], torch.Tensor]


def positions_of(config: PretrainedConfig) -> Positions:
    """How a model numbers the tokens of a sample: Qwen-VL in three dimensions (time, height, width), others in one."""
    # Layers do not matter for it, and to make dozens of them takes longer than some batches.
    config = copy.deepcopy(config)
    config.get_text_config(decoder=True).num_hidden_layers = 1
    if hasattr(getattr(config, "vision_config", None), "depth"):
        config.vision_config.depth = 1
    core = skeleton(config).base_model
    if not hasattr(core, "get_rope_index"):
        return _counted
    return functools.partial(_rope_index, core.get_rope_index, config.image_token_id)


def split_grids(grids: torch.Tensor | None, examples: Sequence[dict[str, Any]]) -> list[torch.Tensor | None]:
    """Each example's rows of image_grid_thw, None for an example without images or a model without grids."""
    if grids is None:
        return [None] * len(examples)
    parts = grids.split([len(example.get("images", ())) for example in examples])
    return [part if len(part) else None for part in parts]


def _counted(token_ids: Sequence[int], image_grid_thw: torch.Tensor | None) -> torch.Tensor:
    return torch.arange(len(token_ids)).unsqueeze(0)


def _rope_index(
    get_rope_index: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    image_token_id: int,
    token_ids: Sequence[int],
    image_grid_thw: torch.Tensor | None,
) -> torch.Tensor:
    input_ids = torch.tensor([token_ids])
    positions, _ = get_rope_index(
        input_ids=input_ids,
        mm_token_type_ids=(input_ids == image_token_id).long(),
        image_grid_thw=image_grid_thw,
    )
    return positions.squeeze(1)
