"""Qwen3-VL adds visual features to the outputs of its first layers; here without asking the device where they belong.

transformers picks the visual tokens by a boolean mask, whose number of hits the host has to wait for: three times in a
forward pass, and six times in a backward pass, near its end. The host has launched nothing ahead then, and the device
is idle while the gradients are clipped and the optimizer runs (34 ms of a step of 711 with an 8B model on an H100).
"""

import torch
from transformers import PreTrainedModel


def add_deepstack_without_waiting(model: PreTrainedModel) -> None:
    """Replaces, on this model object, the method that adds the features; other families are left alone.

    Args:
        model: on its device or not.
    """
    decoder = model.get_decoder()
    if hasattr(decoder, "_deepstack_process"):
        decoder._deepstack_process = add_visual_features


def add_visual_features(
    hidden_states: torch.Tensor, visual_pos_masks: torch.Tensor, visual_embeds: torch.Tensor
) -> torch.Tensor:
    """Adds each visual token's features to its hidden state.

    Args:
        hidden_states: (batch, length, hidden_size).
        visual_pos_masks: bool (batch, length), as many True as there are visual tokens.
        visual_embeds: (num_visual_tokens, hidden_size), in reading order.

    Returns:
        New hidden states, the others as they were.
    """
    is_visual = visual_pos_masks.to(hidden_states.device)
    # For each token the row of its features; any row for those that have none.
    rows = (is_visual.flatten().cumsum(dim=0) - 1).clamp(min=0)
    features = visual_embeds.to(hidden_states.device, hidden_states.dtype).index_select(0, rows)
    return hidden_states + torch.where(is_visual.unsqueeze(-1), features.view_as(hidden_states), 0.0)
