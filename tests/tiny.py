"""The embedded models and hand-made examples, shared by test files that look at batches and models."""

import functools
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel

from qvl.encode import ProcessingClass
from qvl.models import load_base, load_processing_class
from qvl.settings import Settings, parse_settings

VISION = ["qvl/tiny-qwen3-vl", "qvl/tiny-qwen2.5-vl"]
CHAT = "qvl/tiny-qwen3-chat"
CPU = torch.device("cpu")


def settings_for(name: str, *argv: str) -> Settings:
    """The settings of a run of one embedded model on the CPU."""
    return parse_settings({"model_name_or_path": name, "use_cpu": True}, {}, argv)


@functools.cache
def processing_class(name: str) -> ProcessingClass:
    """A processor or tokenizer that no test may change."""
    return load_processing_class(settings_for(name))


@functools.cache
def base(name: str) -> PreTrainedModel:
    """A base model in fp32 that no test may change."""
    return load_base(settings_for(name), CPU).eval()


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise."""
    pixels = np.random.default_rng([width, height, seed]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def message(role: str, text: str, num_images: int = 0) -> dict[str, Any]:
    """Typed parts: the images, then the text."""
    return {"role": role, "content": [{"type": "image"}] * num_images + [{"type": "text", "text": text}]}


def answered(question: str, answer: str, images: list[Image.Image] | None = None, where: str = "row") -> dict[str, Any]:
    """An example with prompt and completion."""
    images = images or []
    return {
        "where": where,
        "images": images,
        "prompt": [message("user", question, len(images))],
        "completion": [message("assistant", answer)],
    }


def conversation(
    turns: list[tuple[str, str]], images: list[Image.Image] | None = None, where: str = "row"
) -> dict[str, Any]:
    """An example with `messages`; the images stand in the first question."""
    images = images or []
    messages = []
    for number, (question, answer) in enumerate(turns):
        messages += [message("user", question, 0 if number else len(images)), message("assistant", answer)]
    return {"where": where, "images": images, "messages": messages}
