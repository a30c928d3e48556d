"""Batched answers are the answers one by one, in the order asked."""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny import CHAT, LLAVA, VISION, base, message, processing_class, settings_for
from transformers import AutoModelForImageTextToText, AutoProcessor

from qvl import graphed_decoding, scenes
from qvl.errors import UserError
from qvl.generate import Decoding, PromptCollator, end_tokens, generate
from qvl.graphed_decoding import GraphedDecoding
from qvl.models import load_base
from qvl.positions import positions_of

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


# The scale that the evaluation is trusted at: every answer, token for token.

NUM_SCENES = 200


@pytest.fixture(scope="module")
def many() -> list[dict[str, Any]]:
    return prompts(NUM_SCENES)


def with_adapter(model: Any) -> Any:
    """LoRA that changes what is said: its B is zero at first."""
    torch.manual_seed(1)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules=r".*language_model.*\.(q|v)_proj"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return adapted


def in_4bit(model: Any) -> Any:
    return load_base(
        settings_for("qvl/tiny-qwen3-vl", "--load_in_4bit", "--dtype", "float32"), torch.device("cpu")
    ).eval()


@pytest.mark.parametrize(
    ("variant", "num_scenes"),
    # All of them passed with 200; adapters and 4-bit products are slow on a CPU.
    [(lambda model: model, NUM_SCENES), (with_adapter, 60), (in_4bit, 16)],
    ids=["base", "adapter", "4bit"],
)
def test_batched_equals_one_by_one_for_many_scenes(
    model: Any, processor: Any, many: list[dict[str, Any]], variant: Any, num_scenes: int
) -> None:
    subject, many = variant(model), many[:num_scenes]
    lengths = [PromptCollator(processor)([row])["input_ids"].shape[1] for row in many]
    batched = generate(subject, processor, many, decoding(max_new_tokens=12, batch_size=25), lengths=lengths)
    assert batched == generate(subject, processor, many, decoding(max_new_tokens=12, batch_size=1))
    assert len(set(batched)) > num_scenes // 4


@pytest.mark.parametrize("changes", [{}, {"do_sample": True, "temperature": 2.0}])
def test_the_loop_for_captured_steps_answers_as_upstreams(model: Any, processor: Any, changes: dict[str, Any]) -> None:
    """Without CUDA its steps run one by one, which is all that differs."""
    rows = prompts(8)
    options = decoding(**changes)
    batch = PromptCollator(processor, positions=positions_of(model.config))(rows)
    loop = GraphedDecoding(batch["input_ids"].shape[1] + options.max_new_tokens)
    tokens = []
    for extra in ({}, {"custom_generate": loop, "past_key_values": loop.empty_cache(model)}) * 2:
        if "past_key_values" in extra:
            extra["past_key_values"] = loop.empty_cache(model)
        torch.manual_seed(3)
        tokens.append(model.generate(**batch, **extra, generation_config=options.config(processor, model)))
    assert all(torch.equal(found, tokens[0]) for found in tokens[1:])


class _Replayed:
    """What a captured CUDA graph does, on a CPU: the same work again on the same memory."""

    def __init__(self, work: Callable[[], torch.Tensor]) -> None:
        self.work, self.num_replays = work, 0
        self.out = torch.empty(0)

    def replay(self) -> None:
        self.num_replays += 1
        # Capturing runs nothing, so the output's memory is known from the first replay on.
        self.out.resize_as_(result := self.work()).copy_(result)


@pytest.mark.parametrize("name", [*VISION, CHAT, LLAVA])
def test_a_replayed_step_sees_all_of_its_arguments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2.5-VL gets its masks in a dict; test_lowest_versions.py runs this with the oldest versions too."""
    model, processor = base(name), processing_class(name)
    graphs: list[_Replayed] = []

    def captured(work: Callable[[], torch.Tensor]) -> tuple[_Replayed, torch.Tensor]:
        graphs.append(_Replayed(work))
        return graphs[-1], graphs[-1].out

    monkeypatch.setattr(graphed_decoding, "_captured", captured)
    options = decoding()
    texts = [" ".join(WORDS[: n + 1]) for n in range(4)]
    rows = prompts(4) if name != CHAT else [{"prompt": [message("user", text)], "images": []} for text in texts]
    batch = PromptCollator(processor)(rows)
    loop = GraphedDecoding(batch["input_ids"].shape[1] + options.max_new_tokens)
    loop._can_capture = True
    config = options.config(processor, model)
    found = model.generate(
        **batch, custom_generate=loop, past_key_values=loop.empty_cache(model), generation_config=config
    )
    assert torch.equal(found, model.generate(**batch, generation_config=config))
    assert [graph.num_replays > 4 for graph in graphs] == [True]


def test_answers_end_at_every_end_token_of_the_model(
    model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen's generation_config.json has two."""
    row = prompts(1)
    batch = PromptCollator(processor)(row)
    config = decoding().config(processor, model)
    third = model.generate(**batch, generation_config=config)[0, batch["input_ids"].shape[1] + 2].item()
    monkeypatch.setattr(model.generation_config, "eos_token_id", [config.eos_token_id[0], third])
    words = generate(model, processor, row, decoding())[0]
    assert end_tokens(processor, model) == [config.eos_token_id[0], third]
    ended = model.generate(**batch, generation_config=decoding().config(processor, model))
    assert ended.shape[1] == batch["input_ids"].shape[1] + 3
    assert words == processor.tokenizer.decode(ended[0, -3:], skip_special_tokens=True).strip()


def test_positions_made_by_workers_are_the_models(model: Any, processor: Any) -> None:
    rows = prompts(8)
    made = PromptCollator(processor, positions=positions_of(model.config))(rows)
    mask = made["attention_mask"]
    own, _ = model.model.get_rope_index(
        made["input_ids"],
        mm_token_type_ids=made["mm_token_type_ids"],
        image_grid_thw=made["image_grid_thw"],
        attention_mask=mask,
    )
    assert torch.equal(made["position_ids"][1:] * mask, own * mask)
    assert torch.equal(made["position_ids"][0] * mask, (mask.cumsum(-1) - 1) * mask)


def test_a_batch_that_does_not_fit_is_halved(model: Any, processor: Any, capsys: Any) -> None:
    rows = prompts(9)
    wanted = generate(model, processor, rows, decoding())
    sizes: list[int] = []

    def refuse(module: Any, args: Any, kwargs: Any) -> None:
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("no memory")

    hook = model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        assert generate(model, processor, rows, decoding(batch_size=8)) == wanted
        printed = capsys.readouterr()
        assert "going on with 2 prompts at a time" in printed.err + printed.out
        assert list(dict.fromkeys(sizes))[:3] == [8, 4, 2]
    finally:
        hook.remove()
    blocker = model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    try:
        with pytest.raises(UserError, match="Not even one prompt fits"):
            generate(model, processor, rows, decoding(batch_size=4))
    finally:
        blocker.remove()


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
