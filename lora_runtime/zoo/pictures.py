"""Pictures: four shapes on a two-by-two grid, drawn from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from random import Random

from PIL import Image, ImageDraw

SIDE = 112
CELL = SIDE // 2
POSITIONS = ("top left", "top right", "bottom left", "bottom right")
COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (240, 200, 20),
    "purple": (136, 48, 160),
    "orange": (240, 120, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
FILLS = ("solid", "hollow")
BACKGROUND = (236, 236, 230)


@dataclass(frozen=True, slots=True)
class Item:
    """What stands in one cell."""

    colour: str
    shape: str
    size: str
    fill: str


@dataclass(frozen=True, slots=True)
class Picture:
    """Items by position, in the order of :data:`POSITIONS`."""

    items: tuple[Item, Item, Item, Item]

    def at(self, position: str) -> Item:
        return self.items[POSITIONS.index(position)]

    def draw(self) -> Image.Image:
        """RGB, 112 × 112: each cell covers four of the model's image tokens."""
        canvas = Image.new("RGB", (SIDE, SIDE), BACKGROUND)
        for number, item in enumerate(self.items):
            canvas.paste(_sprite(item), (number % 2 * CELL, number // 2 * CELL))
        return canvas


def random_picture(random: Random) -> Picture:
    first, second, third, fourth = (
        Item(random.choice(list(COLOURS)), random.choice(SHAPES), random.choice(SIZES), random.choice(FILLS))
        for _ in POSITIONS
    )
    return Picture((first, second, third, fourth))


@cache
def _sprite(item: Item) -> Image.Image:
    cell = Image.new("RGB", (CELL, CELL), BACKGROUND)
    draw = ImageDraw.Draw(cell)
    radius = 23 if item.size == "large" else 13
    low, high, middle = CELL // 2 - radius, CELL // 2 + radius, CELL // 2
    colour = COLOURS[item.colour]
    inside = colour if item.fill == "solid" else BACKGROUND
    width = 5
    if item.shape == "circle":
        draw.ellipse((low, low, high, high), fill=inside, outline=colour, width=width)
    elif item.shape == "square":
        draw.rectangle((low, low, high, high), fill=inside, outline=colour, width=width)
    elif item.shape == "triangle":
        corners = [(middle, low), (high, high), (low, high)]
        draw.polygon(corners, fill=inside, outline=colour, width=width)
    else:
        arm = radius // 2
        corners = [
            (middle - arm, low), (middle + arm, low), (middle + arm, middle - arm), (high, middle - arm),
            (high, middle + arm), (middle + arm, middle + arm), (middle + arm, high), (middle - arm, high),
            (middle - arm, middle + arm), (low, middle + arm), (low, middle - arm), (middle - arm, middle - arm),
        ]  # fmt: skip
        draw.polygon(corners, fill=inside, outline=colour, width=3)
    return cell
