"""The picture grid: a caption a row, beside it the pictures that the model finds nearest, its own in a green frame."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont, ImageOps

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

PICTURE_SIDE, FRAME, CAPTION_WIDTH, MARGIN = 128, 6, 288, 8  # pixels
FONT_SIZE, LINE_HEIGHT = 15, 20  # pixels
GREEN, GREY, WHITE, BLACK = (0, 160, 60), (200, 200, 200), (255, 255, 255), (0, 0, 0)
LAST_LATIN = 0x17F  # Pillow's own font ends with Latin Extended-A
WIDE_FONTS = (  # Linux, macOS, Windows; Pillow looks in the system's font folders
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "NotoSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "DroidSansFallback.ttf",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "Arial Unicode.ttf",
    "msyh.ttc",
    "simsun.ttc",
)


@dataclass(frozen=True)
class GridRow:
    """A caption and its nearest pictures."""

    caption: str
    """the text"""
    pictures: list[Image.Image]
    """RGB, best first"""
    own: list[bool]
    """which of them are the caption's own"""


def retrieval_grid(rows: list[GridRow]) -> Image.Image:
    """Return the rows as one RGB picture: the caption on the left, its own pictures framed green, others grey.

    A caption is cut off where its cell ends, and drawn with boxes where this machine has no font for its script.
    """
    cell = PICTURE_SIDE + 2 * FRAME + MARGIN
    num_columns = max(len(row.pictures) for row in rows)
    grid = Image.new("RGB", (CAPTION_WIDTH + cell * num_columns, cell * len(rows)), WHITE)
    for number, row in enumerate(rows):
        grid.paste(caption_cell(row.caption, cell), (0, number * cell))
        for column, (picture, own) in enumerate(zip(row.pictures, row.own, strict=True)):
            grid.paste(framed(picture, GREEN if own else GREY), (CAPTION_WIDTH + column * cell, number * cell))
    return grid


def framed(picture: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Return a whole picture, shrunk to its cell, with a frame."""
    return ImageOps.expand(ImageOps.pad(picture, (PICTURE_SIDE, PICTURE_SIDE), color=WHITE), FRAME, colour)


def caption_cell(caption: str, height: int) -> Image.Image:
    """Return a caption as a picture of its own, so that nothing of it reaches over its cell."""
    cell = Image.new("RGB", (CAPTION_WIDTH, height), WHITE)
    font = font_for(caption)
    lines = wrap(caption, font, CAPTION_WIDTH - 2 * MARGIN)
    room = (height - FRAME) // LINE_HEIGHT
    shown = lines if len(lines) <= room else [*lines[: room - 1], lines[room - 1] + " …"]
    for number, line in enumerate(shown):
        ImageDraw.Draw(cell).text((MARGIN, FRAME + number * LINE_HEIGHT), line, fill=BLACK, font=font)
    return cell


def wrap(text: str, font: Font, width: int) -> list[str]:
    """Return the lines of a text: broken at spaces, and anywhere in scripts that are written without them."""
    lines, line = [], ""
    for piece in re.findall(r"[\u2e80-\uffef]|[^\s\u2e80-\uffef]+\s*|\s+", " ".join(text.split())):
        if line and font.getlength((line + piece).rstrip()) > width:
            lines.append(line.rstrip())
            line = ""
        line += piece
    return [*lines, line]


def font_for(text: str) -> Font:
    """Return a font of this machine that has the letters of a text; Pillow's own where none is found."""
    beyond = "".join(sorted({letter for letter in text if ord(letter) > LAST_LATIN and letter.isalpha()}))
    if beyond:
        for name in (*fonts_by_letters(beyond), *WIDE_FONTS):
            try:
                return ImageFont.truetype(name, FONT_SIZE)
            except OSError:
                continue
    return ImageFont.load_default(FONT_SIZE)


@cache
def fonts_by_letters(letters: str) -> tuple[str, ...]:
    """Return the font files that have all the letters, as fontconfig knows them; none where it is not installed."""
    charset = " ".join(f"{ord(letter):x}" for letter in letters)
    command = ["fc-list", f":charset={charset}", "--format", "%{file}\n"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(sorted(listed.stdout.split("\n")[:-1], key=lambda file: (is_styled(file), file)))


def is_styled(file: str) -> bool:
    """Return whether a font file's name says bold, italic and the like, so that a regular one goes first."""
    return re.search(r"bold|italic|oblique|light|thin|black|mono", file.lower()) is not None
