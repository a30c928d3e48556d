"""Photos that are free to share, shipped with the package: what a model says of them shows at a glance if it sees."""

from pathlib import Path
from typing import Any

from peft import PeftModel
from PIL import Image
from transformers import PreTrainedModel

from qvl.encode import ProcessingClass
from qvl.generate import Decoding, generate
from qvl.settings import Settings

# LICENSES.tsv beside them says whose they are; each is scaled to a longest side of 384 pixels.
PHOTOS = Path(__file__).parent / "photos"


def photo_paths() -> list[Path]:
    """The shipped photos, by name."""
    return sorted(PHOTOS.glob("*.jpg"))


def caption_photos(
    model: PreTrainedModel | PeftModel, processing_class: ProcessingClass, settings: Settings
) -> list[str]:
    """Answers the run's instruction for every photo.

    Args:
        model: base or adapter on it.
        processing_class: its processor; a tokenizer sees no photos.
        settings: of the run: instruction and decoding.

    Returns:
        A line for each photo, its name and caption; none from a text-only model.
    """
    if getattr(processing_class, "image_token_id", None) is None:
        return []
    content = [{"type": "image"}, {"type": "text", "text": settings.recipe.instruction}]
    prompts: list[dict[str, Any]] = []
    for path in photo_paths():
        with Image.open(path) as photo:
            prompts.append({"prompt": [{"role": "user", "content": content}], "images": [photo.convert("RGB")]})
    size = min(8, settings.training.per_device_eval_batch_size)
    decoding = Decoding(settings.recipe.max_new_tokens, batch_size=size, seed=settings.training.seed)
    answers = generate(model, processing_class, prompts, decoding, label="free photos")
    return [f"  {path.stem}: {answer}" for path, answer in zip(photo_paths(), answers, strict=True)]
