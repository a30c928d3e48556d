"""The vision tower's attention over many images in one kernel, where transformers loops over them.

Qwen-VL towers see all images of a batch as one flat row of patches. With SDPA, transformers cuts the row at the image
borders and attends image by image: a batch of 128 photos launches 128 small kernels in each of 27 layers. The
variable-length kernel of FlashAttention, which torch ships, takes the row as it is.
"""

from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

# The name has to hold "flash": that is how transformers' towers decide to pass `cu_seq_lens_q` instead of looping.
VARLEN_FLASH = "torch_varlen_flash"
_TOWERS = ("qwen2_vl_vision", "qwen2_5_vl_vision", "qwen3_vl_vision")


def use_varlen_vision_attention(model: PreTrainedModel) -> bool:
    """Switches a Qwen-VL tower on a CUDA device to one attention kernel for all images.

    Args:
        model: on its device, in its dtype.

    Returns:
        Whether it was switched: only where the tower would otherwise loop (SDPA) and the kernel exists (fp16 or bf16,
        compute capability 8.0 or higher).
    """
    tower = getattr(model.config, "vision_config", None)
    if tower is None or tower.model_type not in _TOWERS or tower._attn_implementation != "sdpa":
        return False
    if model.device.type != "cuda" or torch.cuda.get_device_capability(model.device) < (8, 0):
        return False
    if model.dtype not in (torch.float16, torch.bfloat16):
        return False
    AttentionInterface.register(VARLEN_FLASH, varlen_flash_attention)
    model.set_attn_implementation({"vision_config": VARLEN_FLASH})
    return True


def varlen_flash_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Bidirectional attention within each image.

    Args:
        module: the attention layer; its scale is the usual 1 / sqrt(head_dim).
        query: (1, num_heads, num_patches, head_dim), fp16 or bf16, all images behind each other.
        key: like `query`.
        value: like `query`.
        attention_mask: None, the borders say all.
        cu_seq_lens_q: int32 (num_images + 1), where each image begins, and the end.
        max_length_q: patches of the largest image.
        **kwargs: what other implementations need.

    Returns:
        (1, num_patches, num_heads, head_dim), and no attention weights.
    """
    from torch.nn.attention.varlen import varlen_attn

    flat_query, flat_key, flat_value = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    borders = cu_seq_lens_q.to(torch.int32)
    attended = varlen_attn(flat_query, flat_key, flat_value, borders, borders, max_length_q, max_length_q)
    return cast(torch.Tensor, attended).unsqueeze(0), None
