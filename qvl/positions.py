"""Position ids made in the data loader's workers, where a model would stop the device to make them in its forward."""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig

from qvl.models import skeleton

# Token ids (int64, (length,)), which of them are visual (the same, 0 or 1) and image_grid_thw (num_images, 3) or None
# -> positions (dimensions, length).
Positions = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def positions_of(config: PretrainedConfig) -> Positions:
    """How a model numbers the tokens of a sample: Qwen-VL in three dimensions (time, height, width), others in one."""
    # A model's own configuration may name an attention that only exists once it is loaded.
    config = copy.deepcopy(config)
    config._attn_implementation = "sdpa"
    core = skeleton(config).base_model
    if not hasattr(core, "get_rope_index"):
        return _counted
    return functools.partial(_rope_index, core.get_rope_index)


def split_grids(grids: torch.Tensor | None, examples: Sequence[dict[str, Any]]) -> list[torch.Tensor | None]:
    """Each example's rows of image_grid_thw, None for an example without images or a model without grids."""
    if grids is None:
        return [None] * len(examples)
    parts = grids.split([len(example.get("images", ())) for example in examples])
    return [part if len(part) else None for part in parts]


def _counted(token_ids: torch.Tensor, is_visual: torch.Tensor, image_grid_thw: torch.Tensor | None) -> torch.Tensor:
    return torch.arange(len(token_ids)).unsqueeze(0)


def _rope_index(
    get_rope_index: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    token_ids: torch.Tensor,
    is_visual: torch.Tensor,
    image_grid_thw: torch.Tensor | None,
) -> torch.Tensor:
    positions, _ = get_rope_index(
        input_ids=token_ids.unsqueeze(0), mm_token_type_ids=is_visual.unsqueeze(0), image_grid_thw=image_grid_thw
    )
    return positions.squeeze(1)
