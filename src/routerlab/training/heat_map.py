"""A table of expert loads as a picture, for trackers that show pictures."""

from collections.abc import Sequence
from typing import Any

_CELL, _WIDEST = 24, 1536  # pixels
_GREY = (190, 190, 190)
_SIZE = 12  # of the font, in pixels


def heat_map(table: Sequence[Sequence[float]], rows: Sequence[str]) -> Any:
    """A table of R rows of shares as an RGB image: white is an even share of the row, red twice
    that or more, blue nothing. Rows may have fewer experts than others: grey where there is none.
    Names of ``rows`` stand at the left if there is one for each, numbers of experts on top.
    """
    from PIL import Image, ImageDraw, ImageFont

    experts = max(map(len, table))
    cell = max(4, min(_CELL, _WIDEST // experts))
    cells = Image.new("RGB", (experts, len(table)), _GREY)
    for y, row in enumerate(table):
        even = sum(row) / len(row)
        for x, value in enumerate(row):
            cells.putpixel((x, y), _color(value / even if even else 0.0))
    font = ImageFont.load_default(_SIZE)
    names = list(rows) if len(rows) == len(table) else [""] * len(table)
    left = 6 + int(max(font.getlength(name) for name in names))
    height = max(cell, _SIZE + 2)
    size = (left + cell * experts + _SIZE, 2 + _SIZE + height * len(table))
    image = Image.new("RGB", size, "white")
    cells = cells.resize((cell * experts, height * len(table)), Image.Resampling.NEAREST)
    image.paste(cells, (left, 2 + _SIZE))
    draw = ImageDraw.Draw(image)
    for y, name in enumerate(names):
        draw.text((3, 2 + _SIZE + height * y + height // 2), name, "black", font, anchor="lm")
    every = 1 + int(font.getlength(str(experts)) + 4) // cell
    for x in range(0, experts, every):
        place = (left + cell * x + cell // 2, 1)
        draw.text(place, str(x), "black", font, anchor="ma")
    return image


def _color(share: float) -> tuple[int, int, int]:
    """Of a share of which 1 is even."""
    above, below = min(max(share - 1, 0.0), 1.0), min(max(1 - share, 0.0), 1.0)
    return tuple(int(255 * (1 - part)) for part in (below, max(above, below), above))  # type: ignore[return-value]
