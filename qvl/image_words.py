"""Images as words (`--vision_mode text`): a quick baseline for a text-only model, without composing or aligning.

Where an image part stands in a conversation, its words stand then: the row's own `caption`, else the tags that a CLIP
finds likeliest for the picture among the words of the training answers.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
import torch
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor, CLIPModel

from qvl.errors import UserError
from qvl.examples import undecoded_examples, with_columns
from qvl.hub_errors import hub_errors_explained
from qvl.image_refs import dump_refs
from qvl.model_names import model_source
from qvl.settings import Settings

_NUM_TAGS = 5
_MOST_WORDS = 500
_FEWEST_ANSWERS = 2
# A word of most answers ("with", "background") says nothing of one image.
_LARGEST_SHARE = 0.5
_WORD = re.compile(r"[a-z]{3,}")

# Tags of the images of a row, in their order, by the row's column `image_refs`.
Tags = Mapping[str, Sequence[Sequence[str]]]


def images_as_words(dataset: datasets.Dataset, tags: Tags) -> datasets.Dataset:
    """The same rows without pictures: in the place of each image part stands a text part.

    Args:
        dataset: rows of `qvl.data`, completions together.
        tags: of all images that have no caption of their own; what is missing gets none.
    """
    stored = dataset.with_format(None)
    conversations = []
    for refs, caption, packed in zip(
        stored["image_refs"][:], stored["caption"][:], stored["conversation"][:], strict=True
    ):
        conversation = json.loads(packed)
        messages = conversation.get("messages") or conversation["prompt"]
        num_images = sum(part["type"] == "image" for message in messages for part in message["content"])
        # A caption is of one picture; which of several it is about cannot be known.
        own = caption if num_images == 1 else None
        words = iter([own] if own else [_listed(some) for some in tags.get(refs, [()] * num_images)])
        for message in messages:
            message["content"] = [
                {"type": "text", "text": f"[Image: {next(words)}]\n"} if part["type"] == "image" else part
                for part in message["content"]
            ]
        conversations.append(json.dumps(conversation))
    num_rows = len(conversations)
    return with_columns(
        dataset,
        {"conversation": conversations, "image_refs": [dump_refs([])] * num_rows, "image_sizes": [[]] * num_rows},
    )


def _listed(tags: Sequence[str]) -> str:
    return ", ".join(tags) or "no description"


def answer_words(dataset: datasets.Dataset) -> list[str]:
    """Words that may become tags: those of the training answers, but for rare and for very common ones.

    Args:
        dataset: training rows.

    Returns:
        The words, most frequent first, lower case.
    """
    counts: Counter[str] = Counter()
    num_answers = 0
    for row in undecoded_examples(dataset):
        for answer in _answers(row):
            counts.update(set(_WORD.findall(answer.lower())))
            num_answers += 1
    fit = [
        (count, word)
        for word, count in counts.items()
        if count >= _FEWEST_ANSWERS and count <= _LARGEST_SHARE * num_answers
    ]
    return [word for count, word in sorted(fit, key=lambda pair: (-pair[0], pair[1]))[:_MOST_WORDS]]


def _answers(row: Mapping[str, Any]) -> Iterable[str]:
    if "completions" in row:
        return row["completions"]
    answers = [message for message in row["messages"] if message["role"] == "assistant"]
    return ["".join(part["text"] for part in message["content"] if part["type"] == "text") for message in answers]


def zero_shot_tags(
    settings: Settings, device: torch.device, data_sets: Sequence[datasets.Dataset], words: Sequence[str]
) -> Tags:
    """The words that a CLIP finds likeliest for each picture, by the cosine of "a <word>" and the image.

    Args:
        settings: name the CLIP, which is not loaded where no image needs tags.
        device: where it computes.
        data_sets: rows of `qvl.data`; rows with a caption of their own and one image are passed over.
        words: to choose from.

    Raises:
        UserError: `--vision_encoder` has no text tower, or there are no words.
    """
    seen: set[str] = set()
    to_tag = [(dataset, _rows_to_tag(dataset, seen)) for dataset in data_sets]
    if not seen:
        return {}
    if not words:
        raise UserError(
            "--vision_mode text takes tags from the words of the training answers, and none occurs in two answers and "
            'in less than half of them: give the rows a "caption", or more rows.'
        )
    name = str(settings.recipe.vision_encoder)
    with hub_errors_explained(name):
        model = AutoModel.from_pretrained(model_source(name), revision=settings.recipe.vision_encoder_revision)
        processor = AutoProcessor.from_pretrained(model_source(name), revision=settings.recipe.vision_encoder_revision)
    if not isinstance(model, CLIPModel):
        raise UserError(
            f"--vision_encoder {name} has no text tower to tag images with: name a whole CLIP, such as "
            "openai/clip-vit-large-patch14."
        )
    model = model.to(device).eval()
    texts = processor(text=[f"a {word}" for word in words], padding=True, return_tensors="pt").to(device)
    with torch.inference_mode():
        of_words = torch.nn.functional.normalize(model.get_text_features(**texts).pooler_output, dim=-1)
        found: dict[str, list[list[str]]] = {}
        for dataset, indices in to_tag:
            for index in tqdm(indices, desc="tagging images", unit="row"):
                pictures = dataset[index]["images"]
                pixels = processor(images=pictures, return_tensors="pt").to(device)
                of_images = torch.nn.functional.normalize(model.get_image_features(**pixels).pooler_output, dim=-1)
                likeliest = (of_images @ of_words.T).topk(min(_NUM_TAGS, len(words)), dim=-1).indices.tolist()
                refs = dataset.with_format(None)[index]["image_refs"]
                found[refs] = [[words[place] for place in places] for places in likeliest]
    return found


def _rows_to_tag(dataset: datasets.Dataset, seen: set[str]) -> list[int]:
    """The first row of each image, of rows with images and no caption to take instead.

    Args:
        dataset: rows of `qvl.data`.
        seen: images by their column `image_refs` that other rows stand for; grows.
    """
    stored = dataset.with_format(None)
    first = []
    for index, (refs, sizes, caption) in enumerate(
        zip(stored["image_refs"][:], stored["image_sizes"][:], stored["caption"][:], strict=True)
    ):
        if sizes and not (caption and len(sizes) == 1) and refs not in seen:
            seen.add(refs)
            first.append(index)
    return first
