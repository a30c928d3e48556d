"""What an image processor's centre crop leaves out is what is told, and told before it is trained without."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import LLAVA, VISION, processing_class
from transformers import CLIPImageProcessor

from qvl.data import DataConfig, load_examples
from qvl.image_crop import describe_crop, share_cut_off
from qvl.model_names import model_source
from qvl.recipe import run
from recipes.qwen_clip import RECIPE

SIDE = {"height": 128, "width": 128}


def photo(width: int, height: int, blue: int = 0) -> Image.Image:
    """Red grows from left to right, green from top to bottom, from a fifth to all of it; nothing is black."""
    red, green = np.meshgrid(np.linspace(51, 255, width), np.linspace(51, 255, height))
    return Image.fromarray(np.stack([red, green, 0 * red + blue], axis=-1).round().astype(np.uint8))


def rows(folder: Path, width: int, height: int, num_rows: int = 6) -> Path:
    texts = []
    for number in range(num_rows):
        photo(width, height, blue=number).save(folder / f"{number}.png")
        texts.append(json.dumps({"image": f"{number}.png", "instruction": "What is this ?", "response": "A star ."}))
    (folder / "rows.jsonl").write_text("\n".join(texts), encoding="utf-8")
    return folder / "rows.jsonl"


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (1200, 300), (400, 400), (90, 60)])
@pytest.mark.parametrize(
    "options",
    [
        {"size": {"shortest_edge": 128}},  # CLIP's own
        {"size": {"shortest_edge": 160}},
        {"size": {"height": 128, "width": 192}},
        {"size": SIDE},
        {"size": SIDE, "do_center_crop": False},
        {"do_resize": False},
    ],
    ids=str,
)
def test_the_share_is_that_of_what_does_not_arrive(options: dict[str, Any], size: tuple[int, int]) -> None:
    image_processor = CLIPImageProcessor(**{"crop_size": SIDE, "do_normalize": False, **options})
    pixels = np.asarray(image_processor(photo(*size), return_tensors="np")["pixel_values"][0])
    # Where a picture is smaller than the crop, upstream puts black around it.
    seen = [float(channel.max() - channel[channel > 0.1].min()) / 0.8 for channel in pixels[:2]]
    assert share_cut_off(image_processor, *size) == pytest.approx(1 - seen[0] * seen[1], abs=0.02)


def test_processors_without_a_crop_cut_nothing_off() -> None:
    for name in VISION:
        image_processor = getattr(processing_class(name), "image_processor")  # noqa: B009
        assert share_cut_off(image_processor, 1200, 300) == 0
    assert share_cut_off(None, 1200, 300) == 0


@pytest.mark.parametrize(("size", "told"), [((500, 375), "25%"), ((300, 1200), "75%"), ((410, 400), None)])
def test_pictures_are_told_of_that_lose_something(size: tuple[int, int], told: str | None, tmp_path: Path) -> None:
    data = load_examples(DataConfig(str(rows(tmp_path, *size)), num_eval_examples=1))
    lines = describe_crop(data.train, processing_class(LLAVA))
    assert bool(lines) == (told is not None)
    if told is not None:
        assert f"{told} of the pictures' area (of one {told})" in lines[0]
        assert '"do_center_crop": false and "size": {"height": 32, "width": 32}' in lines[2]


def clip_as_published(folder: Path) -> Path:
    """The tiny CLIP with the image processor's settings that real checkpoints have."""
    shutil.copytree(model_source("qvl/tiny-clip"), folder)
    file = folder / "processor_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["image_processor"] |= {"do_center_crop": True, "size": {"shortest_edge": SIDE["height"]}}
    file.write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_dry_run_and_training_tell_it_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {
        "smoke": True,
        "dataset_name": str(rows(tmp_path, 500, 375)),
        "num_train_examples": 5,
        "num_eval_examples": 1,
        "captions_per_image": 1,
        "max_steps": 2,
        "stages": ["train"],
        "output_dir": str(tmp_path / "run"),
    }
    told = "cut off by the image processor, which keeps the middle: 25%"
    cropping = {**flags, "vision_encoder": str(clip_as_published(tmp_path / "clip"))}
    run(RECIPE, {**cropping, "dry_run": True})
    assert capsys.readouterr().out.count(told) == 1
    run(RECIPE, cropping)
    screen = capsys.readouterr().out
    assert screen.count(told) == 1
    assert screen.index(told) < screen.index("Trainable:")
    # The remedy, which is how the tiny CLIP comes.
    run(RECIPE, {**flags, "dry_run": True})
    assert "cut off" not in capsys.readouterr().out
