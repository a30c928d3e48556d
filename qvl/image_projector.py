"""What a CLIP's patches become on their way into a language model: pooled to fewer, then projected."""

import math
from typing import Any

import torch
from torch.nn.functional import avg_pool2d
from transformers import CLIPVisionConfig, LlavaConfig, PreTrainedModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from qvl.errors import UserError


class ImageProjector(LlavaMultiModalProjector):
    """LLaVA's projector, whose weights it has, behind a mean over squares of patches.

    Without pooling it computes what LLaVA's own does, so plain transformers serves such a model. With pooling the
    weights load there too, but plain LLaVA then gives more features than there are placeholders, and stops.

    Args:
        config: `image_seq_length` is how many tokens an image becomes, see `image_token_counts`.
    """

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        self.num_image_tokens = config.image_seq_length

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """Projects patches, in the format of the projector's weights: while it trains they are fp32.

        Args:
            image_features: (num_images, num_patches, vision_size) as the tower gives them, or (num_tokens,
                vision_size) pooled before.

        Returns:
            (num_images, num_image_tokens, hidden_size), or (num_tokens, hidden_size).
        """
        if image_features.dim() == 3:
            image_features = pooled(image_features, self.num_image_tokens)
        return super().forward(image_features.to(self.linear_1.weight.dtype))


def pooled(patches: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Means over squares of neighbouring patches.

    Args:
        patches: (num_images, num_patches, size), row by row of a square grid.
        num_tokens: how many are left of each image; its root divides the grid's side.

    Returns:
        (num_images, num_tokens, size); the patches themselves where nothing is to be pooled.
    """
    num_images, num_patches, size = patches.shape
    if num_tokens == num_patches:
        return patches
    side, new_side = math.isqrt(num_patches), math.isqrt(num_tokens)
    grid = patches.transpose(1, 2).reshape(num_images, size, side, side)
    return avg_pool2d(grid, side // new_side).flatten(2).transpose(1, 2)


def image_token_counts(vision: CLIPVisionConfig) -> list[int]:
    """Into how many tokens an image's patches can be pooled: all of them first, one last."""
    side = vision.image_size // vision.patch_size
    return [new_side**2 for new_side in range(side, 0, -1) if side % new_side == 0]


def choose_image_tokens(vision: CLIPVisionConfig, wanted: int | None, name: str) -> int:
    """`--num_image_tokens`, or all patches.

    Raises:
        UserError: a count that the patches cannot be pooled to.
    """
    possible = image_token_counts(vision)
    if wanted is None:
        return possible[0]
    if wanted not in possible:
        side = vision.image_size // vision.patch_size
        raise UserError(
            f"--num_image_tokens {wanted}: {name} sees {side} x {side} patches, which can be pooled to "
            f"{', '.join(map(str, possible))}."
        )
    return wanted


def projector_inputs(model: PreTrainedModel, **image_inputs: torch.Tensor) -> torch.Tensor:
    """What the projector of a LLaVA-style model is given for some images, pooled.

    Args:
        model: base without an adapter.
        **image_inputs: what `get_image_features` takes.

    Returns:
        (num_tokens of all images, vision_size).
    """
    core: Any = model.base_model
    seen: list[torch.Tensor] = []
    handle = core.multi_modal_projector.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        core.get_image_features(**image_inputs, return_dict=True)
    finally:
        handle.remove()
    patches = seen[0]
    if isinstance(core.multi_modal_projector, ImageProjector):
        patches = pooled(patches, core.multi_modal_projector.num_image_tokens)
    return patches.flatten(0, 1)
