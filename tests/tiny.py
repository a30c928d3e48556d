"""The embedded models and hand-made examples, shared by test files that look at batches and models."""

import copy
import functools
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    Qwen3Config,
)

from qvl.encode import ProcessingClass
from qvl.models import load_base, load_processing_class
from qvl.settings import Settings, parse_settings

VISION = ["qvl/tiny-qwen3-vl", "qvl/tiny-qwen2.5-vl"]
CHAT = "qvl/tiny-qwen3-chat"
LLAVA = "CLIP + Qwen3, random"  # has no asset: small, and made here
CPU = torch.device("cpu")


def settings_for(name: str, *argv: str) -> Settings:
    """The settings of a run of one embedded model on the CPU."""
    return parse_settings({"model_name_or_path": name, "use_cpu": True}, {}, argv)


@functools.cache
def processing_class(name: str) -> ProcessingClass:
    """A processor or tokenizer that no test may change."""
    if name == LLAVA:
        return _llava_processor()
    return load_processing_class(settings_for(name))


@functools.cache
def base(name: str) -> PreTrainedModel:
    """A base model in fp32 that no test may change."""
    if name == LLAVA:
        return _llava()
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


def _llava_processor() -> LlavaProcessor:
    """16 image tokens a picture; tokenizer and template of the tiny Qwen3-VL."""
    qwen: Any = processing_class(VISION[0])
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return LlavaProcessor(
        image_processor,
        copy.deepcopy(qwen.tokenizer),
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=qwen.chat_template,
        image_token=qwen.image_token,
        num_additional_image_tokens=1,
    )


def _llava() -> PreTrainedModel:
    """CLIP's attention has a q_proj, k_proj and v_proj of its own."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    processor: Any = processing_class(LLAVA)
    text = Qwen3Config(
        vocab_size=len(processor.tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=processor.tokenizer.pad_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=processor.image_token_id, image_seq_length=16
    )
    return LlavaForConditionalGeneration(config).eval()
