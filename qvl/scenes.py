"""Generated scenes with captions and chats: the embedded data, drawn in seconds and the same on every machine.

A scene is two coloured shapes on a plain background, one left of or above the other. What it shows (its *content*)
decides whether it belongs to the training or to the test split, so a test scene is never seen in training under any
seed, pre-training of the tiny models included. Five true captions in whole sentences describe it (the style that the
recipes tune to); `terse` is the clipped style in which the tiny models were pre-trained to answer.

Only Pillow and the standard library are used. Randomness comes from `random.Random(str)`, which hashes with SHA-512
and so gives the same numbers in every process.
"""

import dataclasses
import json
import math
import os
import random
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw

from qvl.errors import UserError

Split = Literal["train", "test"]

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 70),
    "blue": (45, 80, 220),
    "yellow": (245, 215, 50),
    "purple": (140, 60, 170),
    "orange": (245, 135, 35),
}
# All light, and every shape has a dark outline: the outline then looks alike whatever the colours are, and a tiny
# vision tower finds it with a linear filter.
BACKGROUNDS = {"white": (248, 248, 248), "grey": (180, 180, 180), "pink": (250, 190, 210), "beige": (228, 205, 150)}
OUTLINE = (20, 20, 20)
RADIUS_PX = {"small": 12, "large": 22}
RELATIONS = ("left", "above")
NUM_CAPTIONS = 5
PROMPT = "Describe the image in one sentence."

_SIDE_PX = (96, 128, 160)
_MARGIN_PX = 2
# Centres lie on a grid of half a vision patch and sides are whole patches: a shape then looks the same to a patch in
# four places instead of 256, and a tiny vision tower learns shapes in minutes on a CPU.
_GRID_PX = 8
_TEST_SHARE = 8  # one content in eight is kept for the test split
_REQUEST_FILE = "request.json"


@dataclasses.dataclass(frozen=True)
class Thing:
    """One drawn shape: its words, its centre and radius in pixels, and the exact RGB of its fill."""

    shape: str
    colour: str
    size: str
    x_px: int
    y_px: int
    radius_px: int
    fill: tuple[int, int, int]

    @property
    def words(self) -> str:
        """Size, colour and shape as a sentence uses them: "large red circle"."""
        return f"{self.size} {self.colour} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """Two things on a plain background; `first` is left of (`relation == "left"`) or above `second`."""

    width_px: int
    height_px: int
    background: str
    background_fill: tuple[int, int, int]
    relation: str
    first: Thing
    second: Thing

    @property
    def content(self) -> str:
        """What the scene shows, without positions in pixels: what decides its split."""
        return f"{self.first.words}|{self.relation}|{self.second.words}|{self.background}"

    @property
    def split(self) -> Split:
        """The split that the scene's content belongs to."""
        return "test" if zlib.crc32(self.content.encode()) % _TEST_SHARE == 0 else "train"


def make_scene(index: int, seed: int, split: Split = "train") -> Scene:
    """Returns scene number `index` of a seed, with a content of `split`. Equal arguments give equal scenes."""
    rng = random.Random(f"scene {seed} {split} {index}")
    while True:
        scene = _random_scene(rng)
        if scene.split == split:
            return scene


def _random_scene(rng: random.Random) -> Scene:
    width_px, height_px = rng.choice(_SIDE_PX), rng.choice(_SIDE_PX)
    background = rng.choice(sorted(BACKGROUNDS))
    relation = rng.choice(RELATIONS)
    sizes = rng.choice(sorted(RADIUS_PX)), rng.choice(sorted(RADIUS_PX))
    radii_px = [RADIUS_PX[size] for size in sizes]
    along_px, across_px = (width_px, height_px) if relation == "left" else (height_px, width_px)
    along, across = _place(rng, along_px, across_px, radii_px)
    things = []
    for size, radius_px, a, b in zip(sizes, radii_px, along, across, strict=True):
        colour = rng.choice(sorted(COLOURS))
        x_px, y_px = (a, b) if relation == "left" else (b, a)
        things.append(Thing(rng.choice(SHAPES), colour, size, x_px, y_px, radius_px, _shade(rng, COLOURS[colour])))
    fill = _shade(rng, BACKGROUNDS[background])
    return Scene(width_px, height_px, background, fill, relation, things[0], things[1])


def _place(
    rng: random.Random, along_px: int, across_px: int, radii_px: list[int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Centres along and across the relation's axis: no overlap, and the axis is plainly the longer distance."""
    first_px, second_px = (radius + _MARGIN_PX for radius in radii_px)
    while True:
        start_px, first_across_px = _grid_point(rng, first_px, along_px), _grid_point(rng, first_px, across_px)
        end_px, second_across_px = _grid_point(rng, second_px, along_px), _grid_point(rng, second_px, across_px)
        apart_px, drift_px = end_px - start_px, abs(second_across_px - first_across_px)
        if apart_px >= first_px + second_px - _MARGIN_PX and 2 * drift_px <= apart_px:
            break
    return (start_px, end_px), (first_across_px, second_across_px)


def _grid_point(rng: random.Random, edge_px: int, side_px: int) -> int:
    """A coordinate on the grid, at least `edge_px` from both ends of a side."""
    return rng.randrange(-(-edge_px // _GRID_PX), (side_px - edge_px) // _GRID_PX + 1) * _GRID_PX


def _shade(rng: random.Random, rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, channel + rng.randint(-7, 7))) for channel in rgb)
    return red, green, blue


def draw(scene: Scene) -> Image.Image:
    """Returns the scene as an RGB image of `width_px` x `height_px`. All corners are whole pixels."""
    image = Image.new("RGB", (scene.width_px, scene.height_px), scene.background_fill)
    pen = ImageDraw.Draw(image)
    for thing in (scene.first, scene.second):
        _DRAWERS[thing.shape](pen, thing)
    return image


def _draw_circle(pen: ImageDraw.ImageDraw, thing: Thing) -> None:
    x, y, r = thing.x_px, thing.y_px, thing.radius_px
    pen.ellipse((x - r, y - r, x + r, y + r), fill=thing.fill, outline=OUTLINE, width=2)


def _draw_square(pen: ImageDraw.ImageDraw, thing: Thing) -> None:
    half = round(thing.radius_px * 0.88)
    _draw_polygon(pen, thing, [(-half, -half), (half, -half), (half, half), (-half, half)])


def _draw_triangle(pen: ImageDraw.ImageDraw, thing: Thing) -> None:
    r = thing.radius_px
    _draw_polygon(pen, thing, [(0, -r), (r, r), (-r, r)])


def _draw_star(pen: ImageDraw.ImageDraw, thing: Thing) -> None:
    corners = []
    for point in range(10):
        radius_px = thing.radius_px if point % 2 == 0 else thing.radius_px * 0.42
        angle = math.pi * point / 5
        corners.append((round(radius_px * math.sin(angle)), round(-radius_px * math.cos(angle))))
    _draw_polygon(pen, thing, corners)


def _draw_cross(pen: ImageDraw.ImageDraw, thing: Thing) -> None:
    r, arm = thing.radius_px, round(thing.radius_px * 0.3)
    quarter = [(arm, -r), (arm, -arm), (r, -arm)]
    corners = list(quarter)
    for _ in range(3):
        quarter = [(-y, x) for x, y in quarter]
        corners += quarter
    _draw_polygon(pen, thing, corners)


def _draw_polygon(pen: ImageDraw.ImageDraw, thing: Thing, corners: list[tuple[int, int]]) -> None:
    """Corners are relative to the thing's centre."""
    pen.polygon([(thing.x_px + x, thing.y_px + y) for x, y in corners], fill=thing.fill, outline=OUTLINE, width=2)


_DRAWERS: dict[str, Callable[[ImageDraw.ImageDraw, Thing], None]] = {
    "circle": _draw_circle,
    "square": _draw_square,
    "triangle": _draw_triangle,
    "star": _draw_star,
    "cross": _draw_cross,
}


def captions(scene: Scene) -> list[str]:
    """Returns five different true sentences about the scene; every one names all that it shows."""
    first, second, background = scene.first.words, scene.second.words, f"on a {scene.background} background"
    if scene.relation == "left":
        before, after, start, end = "to the left of", "to the right of", "on the left", "on the right"
    else:
        before, after, start, end = "above", "below", "at the top", "at the bottom"
    return [
        f"A {first} is {before} a {second} {background} .",
        f"A {second} is {after} a {first} {background} .",
        f"There is a {_homely(first)} {before} a {_homely(second)} {background} .",
        f"O{background[1:]} , a {_homely(first)} sits {before} a {_homely(second)} .",
        f"A {first} {start} and a {second} {end} , {background} .",
    ]


def _homely(words: str) -> str:
    return words.replace("large", "big").replace("small", "little")


def terse(scene: Scene) -> str:
    """Returns the clipped description: "circle red large left ; star blue small right ; grey"."""
    start, end = ("left", "right") if scene.relation == "left" else ("top", "bottom")
    first, second = scene.first, scene.second
    return (
        f"{first.shape} {first.colour} {first.size} {start} ; "
        f"{second.shape} {second.colour} {second.size} {end} ; {scene.background}"
    )


def chat(scene: Scene, rng: random.Random, style: Literal["terse", "natural"]) -> list[dict[str, str]]:
    """Returns a conversation of one to three questions about the scene, which the first user turn describes in words.

    Args:
        scene: What the questions are about.
        rng: Chooses the caption and the questions; the same state asks the same questions in both styles.
        style: "terse" answers in one or a few words ("red"), as the tiny chat model was pre-trained to; "natural"
            answers in a sentence ("The star on the left is red .").
    """
    questions = rng.sample(_questions(scene), rng.randint(1, 3))
    description = rng.choice(captions(scene))
    messages = []
    for position, (question, short, long) in enumerate(questions):
        content = f"{description} {question}" if position == 0 else question
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": short if style == "terse" else long})
    return messages


def _questions(scene: Scene) -> list[tuple[str, str, str]]:
    """Question, short answer, long answer. Things are named by their place, which is never ambiguous."""
    places = ("on the left", "on the right") if scene.relation == "left" else ("at the top", "at the bottom")
    rows = [
        ("What colour is the background ?", scene.background, f"The background of the picture is {scene.background} ."),
        ("How many shapes are there ?", "two", "There are two shapes in the picture ."),
        ("Describe the scene .", terse(scene), captions(scene)[4]),
    ]
    for thing, place in zip((scene.first, scene.second), places, strict=True):
        rows += [
            (f"What colour is the shape {place} ?", thing.colour, f"The {thing.shape} {place} is {thing.colour} ."),
            (
                f"How large is the shape {place} ?",
                thing.size,
                f"The {thing.colour} {thing.shape} {place} is {thing.size} .",
            ),
            (f"Which shape is {place} ?", thing.shape, f"The shape {place} is a {thing.words} ."),
        ]
    return rows


def write_scenes(folder: Path, num_train: int, num_eval: int, seed: int) -> Path:
    """Writes `images/*.png` and `captions.jsonl` into a folder, which appears whole or not at all.

    A row is {"image": "images/00001.png", "caption_0": ..., "caption_4": ..., "split": "train" | "test"}.
    Does nothing where the folder already holds the same request; two processes may write it at once.

    Returns:
        The folder.

    Raises:
        UserError: the folder holds something else.
    """

    def fill(beside: Path) -> None:
        (beside / "images").mkdir()
        with (beside / "captions.jsonl").open("w", encoding="utf-8") as rows:
            for number, scene in enumerate(_scenes(num_train, num_eval, seed), start=1):
                name = f"images/{number:05d}.png"
                draw(scene).save(beside / name)
                row = {"image": name} | {f"caption_{i}": text for i, text in enumerate(captions(scene))}
                rows.write(json.dumps(row | {"split": scene.split}) + "\n")

    return _write_folder(folder, {"kind": "scenes", "num_train": num_train, "num_eval": num_eval, "seed": seed}, fill)


def write_chats(folder: Path, num_train: int, num_eval: int, seed: int) -> Path:
    """Writes `chats.jsonl` into a folder: conversations in the natural style, as OpenAI messages.

    A row is {"messages": [{"role": "user", "content": ...}, ...], "split": "train" | "test"}.
    Whole or not at all, idempotent and safe for two processes, as `write_scenes`.

    Returns:
        The folder.

    Raises:
        UserError: the folder holds something else.
    """

    def fill(beside: Path) -> None:
        with (beside / "chats.jsonl").open("w", encoding="utf-8") as rows:
            for number, scene in enumerate(_scenes(num_train, num_eval, seed)):
                messages = chat(scene, random.Random(f"chat {seed} {number}"), "natural")
                rows.write(json.dumps({"messages": messages, "split": scene.split}) + "\n")

    return _write_folder(folder, {"kind": "chats", "num_train": num_train, "num_eval": num_eval, "seed": seed}, fill)


def _scenes(num_train: int, num_eval: int, seed: int) -> list[Scene]:
    train = [make_scene(index, seed, "train") for index in range(num_train)]
    return train + [make_scene(index, seed, "test") for index in range(num_eval)]


def _write_folder(folder: Path, request: dict[str, str | int], fill: Callable[[Path], None]) -> Path:
    """Fills a new folder beside `folder` and renames it, unless `folder` already answers the request."""
    folder = Path(folder)
    if _holds(folder, request):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        fill(beside)
        (beside / _REQUEST_FILE).write_text(json.dumps(request), encoding="utf-8")
        beside.chmod(0o755)
        os.rename(beside, folder)  # replaces an empty folder only
    except OSError:
        if not _holds(folder, request):  # the other process was not first: a true failure
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _holds(folder: Path, request: dict[str, str | int]) -> bool:
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; {request['kind']} are written into a folder. Give another path.")
    record = folder / _REQUEST_FILE
    if record.is_file():
        found = json.loads(record.read_text(encoding="utf-8"))
        if found == request:
            return True
        raise UserError(f"{folder} holds {found}, but {request} was asked for. Give another folder or remove this one.")
    if any(folder.iterdir()):
        raise UserError(f"{folder} holds files that are not generated {request['kind']}. Give another folder.")
    return False
