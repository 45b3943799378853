"""The examples of CONTRIBUTING.md as plugin files, and a small table of pictures to run them on."""

from __future__ import annotations

import re
from pathlib import Path

import numpy
from PIL import Image

from helpers.commands import ROOT

NUM_PAIRS = 40


def example(name: str, folder: Path) -> Path:
    """Write the example that calls itself by a file's name in its first line into a folder."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    [code] = re.findall(rf"```python\n(# {re.escape(name)}\n.*?)```", text, re.DOTALL)
    (folder / name).write_text(code, encoding="utf-8")
    return folder / name


def small_table(folder: Path) -> Path:
    """Write pictures of noise with captions that name their colour, and a column with one of seven labels."""
    generator = numpy.random.default_rng(0)
    rows = ["image,caption,label"]
    for number in range(NUM_PAIRS):
        colour = generator.integers(0, 255, 3)
        pixels = numpy.clip(colour + generator.integers(0, 40, (40, 36, 3)), 0, 255).astype(numpy.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append(f"{number}.png,picture {number} of colour {colour[0]},kind {'abcdefg'[number % 7]}")
    (folder / "pairs.csv").write_text("\n".join(rows), encoding="utf-8")
    return folder / "pairs.csv"
