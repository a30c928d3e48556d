"""What a centre crop leaves of pictures: CLIP's own image processor, which LLaVA's is, cuts them to squares."""

from typing import Any

from datasets import Dataset

from qvl.encode import ProcessingClass

# Square pictures lose nothing, and nearly square ones nothing to speak of; of 4:3 it is a quarter.
_LEAST_SHARE_TOLD = 0.05


def describe_crop(dataset: Dataset, processing_class: ProcessingClass) -> list[str]:
    """Text lines on what the image processor cuts off, and how to see all of it; none where that is hardly anything.

    Args:
        dataset: examples, of which no picture is decoded.
        processing_class: of the model.
    """
    image_processor: Any = getattr(processing_class, "image_processor", None)
    sizes = [size for sizes in dataset.with_format(None)["image_sizes"] for size in sizes]
    shares = [share_cut_off(image_processor, width, height) for width, height in sizes]
    if not shares or sum(shares) / len(shares) < _LEAST_SHARE_TOLD:
        return []
    crop = image_processor.crop_size
    height, width = crop["height"], crop["width"]
    return [
        f"  cut off by the image processor, which keeps the middle: {sum(shares) / len(shares):.0%} of the "
        f"pictures' area (of one {max(shares):.0%})",
        "    The model sees nothing of it. To show it whole pictures, pad them to squares, or name a copy of the",
        '    checkpoint whose preprocessor_config.json has "do_center_crop": false and "size": '
        f'{{"height": {height}, "width": {width}}}, which squeezes them.',
    ]


def share_cut_off(image_processor: Any, width: int, height: int) -> float:
    """Share of a picture's area, 0 to 1, that an image processor's centre crop leaves out.

    Args:
        image_processor: of any kind, or None.
        width: of the picture, in pixels as the height.
        height: of the picture.
    """
    if not getattr(image_processor, "do_center_crop", False):
        return 0.0
    shown_width, shown_height = float(width), float(height)
    if image_processor.do_resize:
        size = dict(image_processor.size)
        shortest = size.get("shortest_edge")
        scale = shortest / min(width, height) if shortest else 1.0
        shown_width, shown_height = size.get("width") or width * scale, size.get("height") or height * scale
    crop = image_processor.crop_size
    return 1 - min(1.0, crop["width"] / shown_width) * min(1.0, crop["height"] / shown_height)
