"""What `qvl.pretrain` makes for the CLIP recipe: a CLIP and a text-only Qwen3 that have never met.

The CLIP learns by contrast which caption belongs to which scene. The language model learns, from text alone, to turn
words into captions: terse descriptions, other sentences, and scenes spelled out as words on a grid, row by row::

    white white white white white ...
    white red circle white white ...

So it knows that what stands where in a sequence can mean what stands where in a picture, and has yet to learn to read
that from CLIP's features: the recipe's projector teaches it.
"""

import dataclasses
import json
import random
from typing import Any

import tokenizers
import torch
import transformers
from torch.nn.functional import cross_entropy

from qvl import scenes
from qvl.pretrain_loop import train_from_scratch

IMAGE_SIDE_PX = 128
PATCH_PX = 16
GRID_SIDE = IMAGE_SIDE_PX // PATCH_PX
NUM_STEPS = 9_000
BATCH_SIZE = 32
LEARNING_RATE = 1e-3
# Of the texts, phrases such as "red circle" in place of a caption: what zero-shot tags are made of.
PHRASE_SHARE = 0.25
# Wrong captions of each image beside those of the other images: without them colours alone would do.
NUM_NEAR_MISSES = 3
_TEXT_VOCABULARY = 320
_MAX_TEXT_TOKENS = 48
_LARGEST_LOGIT_SCALE = 100.0  # as CLIP was trained


# --- what the language model learns


def grid_words(scene: scenes.Scene, rng: random.Random) -> str:
    """A scene as words: each cell names its background, or one of the words for the thing in it.

    Cells are those of CLIP's patches once the picture is squeezed into a square. A thing has at least three cells, so
    that its size, colour and shape all stand there.
    """
    cells = [scene.background] * GRID_SIDE**2
    for thing in (scene.first, scene.second):
        words = [thing.size, thing.colour, thing.shape]
        covered = _covered_cells(scene, thing)
        chosen = [words[i] if i < len(words) else rng.choice(words) for i in range(len(covered))]
        rng.shuffle(chosen)
        for cell, word in zip(covered, chosen, strict=True):
            cells[cell] = word
    return "".join(f" {word}" for word in cells)


def _covered_cells(scene: scenes.Scene, thing: scenes.Thing) -> list[int]:
    """Cells whose centre lies in the thing's box, and in any case the three that are nearest to its centre."""
    places = [((cell % GRID_SIDE + 0.5) / GRID_SIDE, (cell // GRID_SIDE + 0.5) / GRID_SIDE) for cell in range(64)]
    away_px = [max(abs(x * scene.width_px - thing.x_px), abs(y * scene.height_px - thing.y_px)) for x, y in places]
    nearest = sorted(range(GRID_SIDE**2), key=lambda cell: away_px[cell])
    return nearest[:3] + [cell for cell in nearest[3:] if away_px[cell] <= thing.radius_px]


def reading_turns(scene: scenes.Scene, rng: random.Random, prompts: tuple[str, ...]) -> tuple[str, str]:
    """A question in words alone, and the sentence that answers it."""
    kind = rng.random()
    question, answer = rng.sample(scenes.captions(scene), 2)
    if kind < 0.7:
        return f"{grid_words(scene, rng)} {rng.choice(prompts)}", answer
    if kind < 0.85:
        return f"Write a sentence : {scenes.terse(scene)}", answer
    return f"Say it in other words : {question}", answer


# --- what the CLIP learns


@dataclasses.dataclass(frozen=True)
class Pair:
    """A scene, a text that is true of it, and captions of scenes that differ in one word."""

    scene: scenes.Scene
    text: str
    wrong_texts: tuple[str, ...]
    phrase: tuple[str, ...]  # words of one thing that `text` consists of; empty for a whole caption

    def is_true_of(self, scene: scenes.Scene) -> bool:
        """Whether the text describes another scene too, which is then no counterexample."""
        if not self.phrase:
            return scene.content == self.scene.content
        return any(set(self.phrase) <= set(thing.words.split()) for thing in (scene.first, scene.second))


def make_pair(scene: scenes.Scene, rng: random.Random) -> Pair:
    """Draws the texts of a scene."""
    style = rng.randrange(scenes.NUM_CAPTIONS)
    caption = scenes.captions(scene)[style]
    wrong = tuple(scenes.captions(_altered(scene, rng))[style] for _ in range(NUM_NEAR_MISSES))
    if rng.random() >= PHRASE_SHARE:
        return Pair(scene, caption, wrong, ())
    words = rng.choice((scene.first, scene.second)).words.split()
    kept = rng.choice((words, words[1:], words[1:2], words[2:]))
    return Pair(scene, f"a {' '.join(kept)}", wrong, tuple(kept))


def _altered(scene: scenes.Scene, rng: random.Random) -> scenes.Scene:
    """The scene with one word changed, or both things in each other's place."""
    kind = rng.choice(("shape", "shape", "colour", "size", "background", "relation"))
    if kind == "background":
        others = [name for name in sorted(scenes.BACKGROUNDS) if name != scene.background]
        return dataclasses.replace(scene, background=rng.choice(others))
    if kind == "relation" and scene.first.words != scene.second.words:
        return dataclasses.replace(scene, first=scene.second, second=scene.first)
    values = {"colour": sorted(scenes.COLOURS), "size": sorted(scenes.RADIUS_PX)}.get(kind, list(scenes.SHAPES))
    field = kind if kind in ("colour", "size") else "shape"
    which = rng.choice(("first", "second"))
    thing = getattr(scene, which)
    changed = rng.choice([value for value in values if value != getattr(thing, field)])
    return dataclasses.replace(scene, **{which: dataclasses.replace(thing, **{field: changed})})


def make_clip_processor(seed: int) -> transformers.CLIPProcessor:
    """CLIP's processor with a tokenizer of the words that scenes use.

    Pictures are squeezed into a square: CLIP's own centre crop would cut things off at the sides.
    """
    rng = random.Random(f"CLIP tokenizer {seed}")
    texts = []
    for index in range(2000):
        pair = make_pair(scenes.make_scene(index, seed, "train"), rng)
        texts += [pair.text, *pair.wrong_texts]
    empty = transformers.CLIPTokenizer()
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = empty._tokenizer.normalizer, empty._tokenizer.pre_tokenizer
    alphabet = "abcdefghijklmnopqrstuvwxyz.,;:!?'-0123456789"
    # All in one order: the trainer numbers letters that end a word as it meets them, in another order in every process,
    # and which pairs it merges first follows from their numbers.
    numbered = ["<|startoftext|>", "<|endoftext|>", *alphabet, *(f"{letter}</w>" for letter in alphabet)]
    bpe.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=_TEXT_VOCABULARY,
            special_tokens=numbered,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = transformers.CLIPTokenizer(
        vocab=learned["vocab"], merges=[tuple(merge) for merge in learned["merges"]], model_max_length=_MAX_TEXT_TOKENS
    )
    side = {"height": IMAGE_SIDE_PX, "width": IMAGE_SIDE_PX}
    images = transformers.CLIPImageProcessor(size=side, crop_size=side, do_center_crop=False)
    return transformers.CLIPProcessor(images, tokenizer)


def make_clip(tokenizer: Any) -> transformers.CLIPModel:
    """The untrained CLIP in fp32."""
    shared = {"intermediate_size": 256, "projection_dim": 64, "initializer_factor": 1.0}
    vision = {
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": IMAGE_SIDE_PX,
        "patch_size": PATCH_PX,
    }
    text = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": _MAX_TEXT_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    configuration = transformers.CLIPConfig(
        text_config=text | shared, vision_config=vision | shared, projection_dim=shared["projection_dim"]
    )
    return transformers.CLIPModel(configuration).float()


@dataclasses.dataclass(frozen=True)
class PairBatches:
    """The batches of the training by step, each with its own seed: any number of workers draws the same."""

    seed: int
    processor: transformers.CLIPProcessor

    def __len__(self) -> int:
        return NUM_STEPS

    def __getitem__(self, step: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Inputs for B images, their true texts and the wrong ones; and [B, texts], where an image has no say."""
        rng = random.Random(f"tiny-clip {self.seed} {step}")
        drawn = [scenes.make_scene(rng.getrandbits(40), self.seed, "train") for _ in range(BATCH_SIZE)]
        pairs = [make_pair(scene, rng) for scene in drawn]
        texts = [pair.text for pair in pairs] + [text for pair in pairs for text in pair.wrong_texts]
        inputs = self.processor(
            text=texts, images=[scenes.draw(scene) for scene in drawn], padding=True, return_tensors="pt"
        )
        also_true = torch.zeros(BATCH_SIZE, len(texts), dtype=torch.bool)
        for column, pair in enumerate(pairs):
            also_true[:, column] = torch.tensor([pair.is_true_of(scene) for scene in drawn])
        also_true[:, :BATCH_SIZE].fill_diagonal_(False)
        return dict(inputs), also_true


def train_clip(seed: int, device: str, num_workers: int) -> tuple[Any, Any, dict[str, float | str]]:
    """Trains the CLIP from scratch: every image against the texts of its batch and near misses, and back.

    Args:
        seed: of weights and data.
        device: "cpu" or "cuda".
        num_workers: processes that draw ahead; the result does not depend on them.

    Returns:
        The model (fp32), its processor, and what is recorded beside the weights: final loss (nats, mean of the last
        100 steps of both directions), seconds, number of steps and of parameters.
    """
    transformers.set_seed(seed)
    processor = make_clip_processor(seed)
    model = make_clip(processor.tokenizer).to(device).train()
    batches = PairBatches(seed, processor)
    return model, processor, train_from_scratch("tiny-clip", model, batches, _contrast, LEARNING_RATE, num_workers)


def _contrast(model: Any, inputs: dict[str, torch.Tensor], also_true: torch.Tensor) -> torch.Tensor:
    """CLIP's loss, in nats: the right text for each image among all, the right image for each true text."""
    with torch.no_grad():
        model.logit_scale.clamp_(max=torch.tensor(_LARGEST_LOGIT_SCALE).log().item())
    logits = model(**inputs).logits_per_image.masked_fill(also_true, float("-inf"))
    right = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, right) + cross_entropy(logits[:, : len(logits)].T, right)) / 2
