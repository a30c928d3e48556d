"""Photos that are free to share, shipped with the package: what a model says of them shows at a glance if it sees."""

from pathlib import Path
from typing import Any

from peft import PeftModel
from PIL import Image
from transformers import PreTrainedModel

from qvl.encode import ProcessingClass
from qvl.generate import Decoding, generate

# LICENSES.tsv beside them says whose they are; each is scaled to a longest side of 384 pixels.
PHOTOS = Path(__file__).parent / "photos"


def photo_paths() -> list[Path]:
    """The shipped photos, by name."""
    return sorted(PHOTOS.glob("*.jpg"))


def caption_photos(
    model: PreTrainedModel | PeftModel, processing_class: ProcessingClass, instruction: str, decoding: Decoding
) -> list[str]:
    """Answers an instruction for every photo.

    Args:
        model: base or adapter on it.
        processing_class: its processor; a tokenizer sees no photos.
        instruction: what is asked of each, such as a run's `--instruction`.
        decoding: how to decode.

    Returns:
        A caption for each of `photo_paths`; none from a text-only model.
    """
    if getattr(processing_class, "image_token_id", None) is None:
        return []
    content = [{"type": "image"}, {"type": "text", "text": instruction}]
    prompts: list[dict[str, Any]] = []
    for path in photo_paths():
        with Image.open(path) as photo:
            prompts.append({"prompt": [{"role": "user", "content": content}], "images": [photo.convert("RGB")]})
    return generate(model, processing_class, prompts, decoding, label="free photos")
