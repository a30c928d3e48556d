"""Pictures with what was said about them as one image, for places that show images only, such as MLflow's charts."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_PICTURE = (240, 180)
_TEXT_WIDTH, _GAP, _COLUMNS = 360, 16, 2
_FONT_SIZE, _LINE_HEIGHT, _CHARACTERS, _MOST_LINES = 14, 18, 50, 4
_INK, _MUTED, _PAPER = "#1c2227", "#5d6770", "#ffffff"


@dataclass(frozen=True)
class Card:
    """One cell of a grid.

    Attributes:
        picture: what the answer is about; None leaves its place to the prompt.
        prompt: shown where there is no picture.
        reference: a true answer, "" if there is none.
        answer: the model's.
    """

    picture: Image.Image | None
    prompt: str
    reference: str
    answer: str


def picture_grid(cards: Sequence[Card], title: str) -> Image.Image:
    """Draws cards in two columns under a title; pictures are shrunk, long texts cut.

    Returns:
        An RGB image, the same size for the same number of cards.
    """
    cell_width, cell_height = _PICTURE[0] + _GAP + _TEXT_WIDTH, _PICTURE[1]
    num_rows = -(-len(cards) // _COLUMNS)
    width = _GAP + _COLUMNS * (cell_width + _GAP)
    height = 2 * _GAP + _LINE_HEIGHT + num_rows * (cell_height + _GAP)
    grid = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(grid)
    _write(draw, (_GAP, _GAP), title, _INK, 1, width // 8)
    for index, card in enumerate(cards):
        row, column = divmod(index, _COLUMNS)
        left = _GAP + column * (cell_width + _GAP)
        top = 2 * _GAP + _LINE_HEIGHT + row * (cell_height + _GAP)
        _draw_card(grid, draw, card, left, top)
    return grid


def _draw_card(grid: Image.Image, draw: ImageDraw.ImageDraw, card: Card, left: int, top: int) -> None:
    if card.picture is not None:
        small = card.picture.convert("RGB")
        small.thumbnail(_PICTURE)
        grid.paste(small, (left, top))
    else:
        _write(draw, (left, top), card.prompt, _MUTED, 8, 33)
    x, y = left + _PICTURE[0] + _GAP, top
    y = _write(draw, (x, y), "reference", _MUTED, 1, _CHARACTERS)
    y = _write(draw, (x, y), card.reference, _MUTED, _MOST_LINES, _CHARACTERS)
    y = _write(draw, (x, y + 6), "answer", _INK, 1, _CHARACTERS)
    _write(draw, (x, y), card.answer or "(empty)", _INK, _MOST_LINES, _CHARACTERS)


def _write(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, colour: str, most_lines: int, characters: int
) -> int:
    """Wraps and draws a text; returns where the next line begins."""
    x, y = place
    font = ImageFont.load_default(_FONT_SIZE)
    for line in textwrap.wrap(text, characters, max_lines=most_lines, placeholder=" ..."):
        draw.text((x, y), line, fill=colour, font=font)
        y += _LINE_HEIGHT
    return y
