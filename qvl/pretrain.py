"""Makes the embedded tiny models: `python -m qvl.pretrain --out DIR [--model NAME ...] [--device cuda]`.

Real Qwen classes and processors with few parameters, trained from scratch on generated scenes (training split only).
The vision-language models see images and answer in the *terse* style, or answer a short question; they read whole
sentences as text only, under another prompt and without an image. So they know what a scene shows and know the words
of the captions, but a sentence about an image is what a recipe's LoRA has yet to teach. The chat model answers
questions about a described scene in a word or two. The CLIP and the text model are those of `qvl.pretrain_clip`.
Training is fp32; weights are kept in bfloat16.
The vision-language models take minutes on a GPU with a dozen cores to draw for it, and hours on two CPU cores.
"""

import argparse
import dataclasses
import json
import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
import trl
from PIL import Image
from torch.nn.functional import cross_entropy, linear

from qvl import pretrain_clip, scenes
from qvl.pretrain_loop import train_from_scratch

SPECIAL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
VOCABULARY_SIZE = 640
TERSE_PROMPTS = (scenes.PROMPT, "Describe the image.", "What is in the image?")
IMAGE_SHARE = 0.8  # of the examples; the others are text only
SHORT_ANSWER_SHARE = 0.3  # of the examples with an image


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one tiny model is made."""

    template: str
    num_steps: int
    batch_size: int
    learning_rate: float


RECIPES = {
    "tiny-qwen3-vl": Recipe("qwen3_vl", num_steps=1600, batch_size=32, learning_rate=1.5e-3),
    "tiny-qwen2.5-vl": Recipe("qwen2_5_vl", num_steps=1600, batch_size=32, learning_rate=1.5e-3),
    "tiny-qwen3-chat": Recipe("qwen3_instruct_2507", num_steps=1200, batch_size=32, learning_rate=2e-3),
    "tiny-qwen3-text": Recipe("qwen3_instruct_2507", num_steps=500, batch_size=16, learning_rate=2.5e-3),
}
TEXT_MODELS = ("tiny-qwen3-chat", "tiny-qwen3-text")
CLIP = "tiny-clip"


@dataclasses.dataclass(frozen=True)
class Example:
    """Messages whose last turn is the answer to learn, and the image of the first turn if there is one."""

    messages: list[dict[str, Any]]
    image: Image.Image | None = None


# --- what is learned


def image_example(scene: scenes.Scene, rng: random.Random) -> Example:
    """An image with its terse description, or with a short question about it."""
    if rng.random() < SHORT_ANSWER_SHARE:
        start, end = ("left", "right") if scene.relation == "left" else ("top", "bottom")
        thing, place = rng.choice(((scene.first, start), (scene.second, end)))
        question, answer = rng.choice(
            (
                (f"Shape , {place} ?", thing.shape),
                (f"Colour , {place} ?", thing.colour),
                (f"Size , {place} ?", thing.size),
                ("Background ?", scene.background),
                ("Arranged how ?", f"{start} {end}"),
            )
        )
    else:
        question, answer = rng.choice(TERSE_PROMPTS), scenes.terse(scene)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return Example(_turns(content, answer), scenes.draw(scene))


def text_example(scene: scenes.Scene, rng: random.Random) -> Example:
    """A sentence from terse words, or terse words from a sentence; no image."""
    sentence = rng.choice(scenes.captions(scene))
    if rng.random() < 0.7:
        prompt, answer = f"Write a sentence : {scenes.terse(scene)}", sentence
    else:
        prompt, answer = f"Shorten : {sentence}", scenes.terse(scene)
    return Example(_turns([{"type": "text", "text": prompt}], answer))


def chat_example(scene: scenes.Scene, rng: random.Random) -> Example:
    """A conversation in terse answers, or (as text to read) a sentence to repeat in other words."""
    if rng.random() < 0.2:
        question, answer = rng.sample(scenes.captions(scene), 2)
        return Example(_turns(f"Say it in other words : {question}", answer))
    return Example(scenes.chat(scene, rng, "terse"))


def _turns(content: Any, answer: str) -> list[dict[str, Any]]:
    # Typed parts in every turn: Qwen2.5-VL's and Qwen3-VL's templates read both forms, datasets only one of them.
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def examples(name: str, num_examples: int, rng: random.Random, seed: int) -> list[Example]:
    """Draws fresh training examples for a model."""
    made = []
    for _ in range(num_examples):
        scene = scenes.make_scene(rng.getrandbits(40), seed, "train")
        if name == "tiny-qwen3-chat":
            made.append(chat_example(scene, rng))
        elif name == "tiny-qwen3-text":
            made.append(Example(_turns(*pretrain_clip.reading_turns(scene, rng, TERSE_PROMPTS))))
        else:
            make = image_example if rng.random() < IMAGE_SHARE else text_example
            made.append(make(scene, rng))
    return made


# --- models and processors


def make_tokenizer(seed: int) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of Qwen's kind, trained on the words that scenes, chats and templates use."""
    rng = random.Random(f"tokenizer {seed}")
    texts = ["system\nYou are a helpful assistant.", "user\n", "assistant\n"] * 500
    for index in range(3000):
        scene = scenes.make_scene(index, seed, "train")
        made = (image_example(scene, rng), text_example(scene, rng), chat_example(scene, rng))
        turns = [turn["content"] for example in made for turn in example.messages]
        turns += [turn["content"] for turn in scenes.chat(scene, rng, "natural")]
        texts += [turn if isinstance(turn, str) else turn[-1]["text"] for turn in turns]
    empty = transformers.Qwen2Tokenizer()
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.normalizer, bpe.pre_tokenizer = empty._tokenizer.normalizer, empty._tokenizer.pre_tokenizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    learned = json.loads(bpe.to_str())["model"]
    return transformers.Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS,
        model_max_length=4096,
    )


def make_processor(name: str, seed: int) -> Any:
    """The model's processor with TRL's chat template (for text models their tokenizer)."""
    tokenizer = make_tokenizer(seed)
    folder = Path(trl.__file__).parent / "chat_templates"
    template = (folder / f"{RECIPES[name].template}.jinja").read_text(encoding="utf-8")
    if name in TEXT_MODELS:
        tokenizer.chat_template = template
        return tokenizer
    size = {"shortest_edge": 64 * 64, "longest_edge": 512 * 512}
    if name == "tiny-qwen3-vl":
        images = transformers.Qwen2VLImageProcessor(
            patch_size=16, merge_size=2, size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
        )
        videos: Any = transformers.Qwen3VLVideoProcessor(patch_size=16, merge_size=2)
        return transformers.Qwen3VLProcessor(images, tokenizer, videos, chat_template=template)
    images = transformers.Qwen2VLImageProcessor(patch_size=16, merge_size=2, size=size)
    videos = transformers.Qwen2VLVideoProcessor(patch_size=16, merge_size=2)
    return transformers.Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=template)


def make_model(name: str, tokenizer: Any) -> Any:
    """The untrained model in fp32. Language model sizes are multiples of 64, which 4-bit quantization needs."""
    token = tokenizer.convert_tokens_to_ids
    ends = {"pad_token_id": token("<|endoftext|>"), "bos_token_id": None, "eos_token_id": token("<|im_end|>")}
    text: dict[str, Any] = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.05,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
    } | ends
    if name == "tiny-qwen3-text":
        text |= {"intermediate_size": 320, "num_hidden_layers": 3}
    if name in TEXT_MODELS:
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**text, head_dim=32)).float()
    vision: dict[str, Any] = {
        "depth": 3,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_heads": 3,
        "out_hidden_size": 128,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "initializer_range": 0.05,
    }
    shared = {
        "tie_word_embeddings": True,
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
    }
    if name == "tiny-qwen3-vl":
        text["rope_parameters"] |= {"mrope_section": [8, 4, 4], "mrope_interleaved": True}
        vision |= {"patch_size": 16, "num_position_embeddings": 100, "deepstack_visual_indexes": [0, 1]}
        configuration: Any = transformers.Qwen3VLConfig(
            text_config=text | {"head_dim": 32}, vision_config=vision, **shared
        )
        return transformers.Qwen3VLForConditionalGeneration(configuration).float()
    text["rope_parameters"] |= {"mrope_section": [4, 6, 6]}
    vision |= {"patch_size": 16, "window_size": 128, "fullatt_block_indexes": [1, 2]}
    configuration = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **shared)
    return transformers.Qwen2_5_VLForConditionalGeneration(configuration).float()


# --- training


def collate(batch: list[Example], processor: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Model inputs, padded on the right, and labels [batch, tokens]: the last answer with its end token, else -100."""
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.padding_side = "right"
    texts = [processor.apply_chat_template(row.messages, tokenize=False).removesuffix("\n") for row in batch]
    images = [row.image for row in batch if row.image is not None]
    options = {"images": images} if images else {}
    inputs = processor(text=texts, padding=True, return_tensors="pt", **options)
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, example in enumerate(batch):
        answer = tokenizer(example.messages[-1]["content"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        end = int(inputs["attention_mask"][row].sum())
        labels[row, end - len(answer) : end] = torch.tensor(answer)
    if not torch.equal(inputs["input_ids"][labels >= 0], labels[labels >= 0]):
        raise AssertionError("an answer is not where the template should have put it")
    return dict(inputs), labels


@dataclasses.dataclass(frozen=True)
class Batches:
    """The batches of a training by step: each has its own seed, so that any number of workers draws the same."""

    name: str
    seed: int
    processor: Any

    def __len__(self) -> int:
        return RECIPES[self.name].num_steps

    def __getitem__(self, step: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        rng = random.Random(f"{self.name} {self.seed} {step}")
        return collate(examples(self.name, RECIPES[self.name].batch_size, rng, self.seed), self.processor)


def train(name: str, seed: int, device: str, num_workers: int) -> tuple[Any, Any, dict[str, float | str]]:
    """Trains one model from scratch.

    Args:
        name: of the model, a key of `RECIPES`.
        seed: of weights and data.
        device: "cpu" or "cuda".
        num_workers: processes that draw ahead; the result does not depend on them.

    Returns:
        The model (fp32), its processor, and what is recorded beside the weights: final loss (nats per answer token,
        mean of the last 100 steps), seconds, number of steps and of parameters.
    """
    recipe = RECIPES[name]
    transformers.set_seed(seed)
    processor = make_processor(name, seed)
    model = make_model(name, getattr(processor, "tokenizer", processor)).to(device).train()
    if name not in TEXT_MODELS:
        _embed_patches_by_product(model.model.visual.patch_embed)
    record = train_from_scratch(
        name, model, Batches(name, seed, processor), _answer_loss, recipe.learning_rate, num_workers
    )
    return model, processor, record


def _answer_loss(model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    logits = model(**inputs, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _embed_patches_by_product(patch_embed: Any) -> None:
    """Replaces the convolution, whose stride is its kernel, by the equal matrix product: 10 times faster on a CPU."""

    def forward(patches: torch.Tensor) -> torch.Tensor:
        convolution = patch_embed.proj
        return linear(patches.flatten(1), convolution.weight.flatten(1), convolution.bias)

    patch_embed.forward = forward


def save(name: str, seed: int, folder: Path, model: Any, processor: Any, record: dict[str, float | str]) -> None:
    """Writes weights in bfloat16, processor, generation settings and made.json; replaces `folder` when all is there."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if model.can_generate():
        model.generation_config = transformers.GenerationConfig(
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
        )
    made = {
        "command": f"python -m qvl.pretrain --model {name} --out DIR --seed {seed}",
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, tokenizers, trl)},
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    model.cpu().to(torch.bfloat16).save_pretrained(beside)
    (beside / "model.safetensors").chmod(0o644)  # written for its owner only, but packaged for all
    processor.save_pretrained(beside)
    (beside / "made.json").write_text(json.dumps(made | record, indent=2) + "\n", encoding="utf-8")
    beside.chmod(0o755)
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(beside, folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=sorted([*RECIPES, CLIP]), default=[*RECIPES, CLIP])
    parser.add_argument("--out", type=Path, required=True, help="folder that gets one folder per model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that draw ahead")
    args = parser.parse_args()
    # The tensors are too small for a second thread to help, and on a busy machine threads wait for each other.
    torch.set_num_threads(1)
    for name in args.model:
        if name == CLIP:
            model, processor, record = pretrain_clip.train_clip(args.seed, args.device, args.num_workers)
        else:
            model, processor, record = train(name, args.seed, args.device, args.num_workers)
        save(name, args.seed, args.out / name, model, processor, record)
        print(f"{args.out / name}: {record}")


if __name__ == "__main__":
    main()
