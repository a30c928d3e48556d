"""Batched answers are the answers one by one, in the order asked."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from qvl import scenes
from qvl.generate import Decoding, PromptCollator, generate

ASSET = Path(__file__).parents[1] / "qvl" / "assets" / "tiny-qwen3-vl"
WORDS = "Please look closely and then describe what the image shows in one sentence".split()


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(ASSET, dtype=torch.float32)


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(ASSET)


def prompts(num: int) -> list[dict[str, Any]]:
    """Scenes of mixed sizes, prompts of mixed lengths, some with two images or none."""
    rng = random.Random(5)
    rows = []
    for index in range(num):
        images: list[Image.Image] = [
            scenes.draw(scenes.make_scene(10 * index + n, 3, "test")) for n in range(rng.choice([0, 1, 1, 1, 2]))
        ]
        text = " ".join(WORDS[: rng.randint(2, len(WORDS))])
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]
        rows.append({"prompt": [{"role": "user", "content": content}], "images": images})
    return rows


def decoding(**changes: Any) -> Decoding:
    return Decoding(**{"max_new_tokens": 24, "batch_size": 8, "seed": 1, **changes})


def test_batched_equals_one_by_one_and_keeps_the_order(model: Any, processor: Any) -> None:
    rows = prompts(24)
    alone = generate(model, processor, rows, decoding(batch_size=1))
    assert len(set(alone)) > 8
    assert generate(model, processor, rows, decoding()) == alone
    lengths = [PromptCollator(processor)([row])["input_ids"].shape[1] for row in rows]
    assert len(set(lengths)) > 5
    assert generate(model, processor, rows, decoding(), lengths=lengths) == alone


def test_workers_make_the_same_batches(model: Any, processor: Any) -> None:
    rows = prompts(6)
    assert generate(model, processor, rows, decoding(num_workers=2)) == generate(model, processor, rows, decoding())


def test_sampling_is_seeded_and_greedy_is_not_sampling(model: Any, processor: Any) -> None:
    rows = prompts(8)
    sampled = decoding(do_sample=True, temperature=3.0)
    first = generate(model, processor, rows, sampled)
    assert generate(model, processor, rows, sampled) == first
    assert generate(model, processor, rows, decoding(do_sample=True, temperature=3.0, seed=2)) != first
    assert generate(model, processor, rows, decoding()) != first


def test_prompts_are_padded_on_the_left(processor: Any) -> None:
    batch = PromptCollator(processor)(prompts(8))
    assert bool((batch["attention_mask"][:, -1] == 1).all())
    assert bool((batch["attention_mask"][:, 0] == 0).any())
    assert bool((batch["mm_token_type_ids"] == (batch["input_ids"] == processor.image_token_id)).all())


def test_the_model_is_left_in_the_mode_it_was_in(model: Any, processor: Any) -> None:
    model.train()
    generate(model, processor, prompts(2), decoding(max_new_tokens=2))
    assert model.training
    model.eval()
