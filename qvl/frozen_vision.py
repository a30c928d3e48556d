"""Keeps a frozen vision tower out of the backward pass."""

from peft import PeftModel

from qvl.vision_fingerprint import vision_modules

# The hook that transformers' `enable_input_require_grads` puts on embeddings.
_REQUIRES_GRADIENT = "make_inputs_require_grads"


def ask_no_gradient_of_vision(model: PeftModel) -> None:
    """Takes off what makes patches of pictures want a gradient.

    For activation checkpointing, and for layers that are to be compiled alike, transformers lets what goes into the
    decoder want a gradient. It takes every embedding for such an input, also that of patches (Qwen2.5-VL, CLIP): the
    whole frozen tower would then keep its activations and run backward, for a gradient that nobody uses.
    """
    for part in vision_modules(model).values():
        for module in part.modules():
            for number, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__name__", None) == _REQUIRES_GRADIENT:
                    del module._forward_hooks[number]
