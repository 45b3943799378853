"""A page that shows pairs as training sees them: one file that holds its pictures, in English and Chinese.

A browser has the letters of every language, which drawn pictures of text have not; captions are shown as text and run
nothing.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

from accel_clip.redaction import masked, printable

LONGEST_SHOWN = 1000  # characters of a caption that are never read


@dataclass(frozen=True)
class PagePair:
    """A pair as training sees it, or why it cannot be used."""

    picture: Image.Image | None = None
    """its augmented picture, None where there is no pair"""
    read: str = ""
    """the part of its caption that is read"""
    unread: str = ""
    """the part that is not"""
    tokens: str | None = None
    """what the tokenizer makes of the caption, None where it cannot say"""
    num_captions: int = 1
    """of how many captions of the pair this is one"""
    problem: str = ""
    """why there is no pair, empty where there is one"""


@dataclass(frozen=True)
class PageSection:
    """The first pairs of a source."""

    name: str
    """the source's"""
    pairs: Sequence[PagePair]
    """as training sees them, in their order"""


STYLE = """
body { margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1a1a1a; background: #fff;
  font: 16px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; overflow-wrap: anywhere; }
ul { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: 1.5rem; padding: 0; }
li { list-style: none; overflow-wrap: anywhere; }
img { display: block; width: 100%; max-width: 20rem; height: auto; border: 1px solid #ccc; }
p { margin: .4rem 0 0; } .small { color: #595959; font-size: .85rem; } del { color: #a00; }
.problem { border: 1px solid #a00; padding: .75rem; }
@media (prefers-color-scheme: dark) { body { color: #eee; background: #161616; } .small { color: #b0b0b0; }
  del { color: #ff8a80; } .problem { border-color: #ff8a80; } }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
TITLE = "What training sees"
TITLE_IN_CHINESE = "训练看到的内容"
ABOUT = (
    "The first pairs of each source in the first epoch: the part of the picture that was drawn, at the model's size, "
    "and the caption. What is struck through has no room in the model's tokens and is never read."
)
ABOUT_IN_CHINESE = (
    "每个数据源最前面的图文对在第一轮中的样子：随机裁剪并缩放到模型尺寸的图片，以及对应的文本。"
    "带删除线的部分超出模型的 token 长度，训练时不会被读取。"
)


def page(sections: Sequence[PageSection]) -> str:
    """Return the page."""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{TITLE} · {TITLE_IN_CHINESE}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            f'<h1>{TITLE} · <span lang="zh-CN">{TITLE_IN_CHINESE}</span></h1>',
            f'<p>{ABOUT}</p>\n<p lang="zh-CN">{ABOUT_IN_CHINESE}</p>',
            *(line for each in sections for line in section_lines(each)),
            "</body>\n</html>\n",
        ]
    )


def section_lines(section: PageSection) -> Iterator[str]:
    """Yield the lines about a source."""
    yield f"<h2>{text(section.name)}</h2>\n<ul>"
    for number, pair in enumerate(section.pairs, start=1):
        yield f"<li>{problem(number, pair) if pair.picture is None else ''.join(tile(pair.picture, pair))}</li>"
    yield "</ul>"


def problem(number: int, pair: PagePair) -> str:
    """Return what is shown of a pair that cannot be used."""
    return f'<p class="problem">{number}. not used · <span lang="zh-CN">不可用</span>: {text(pair.problem)}</p>'


def tile(picture: Image.Image, pair: PagePair) -> Iterator[str]:
    """Yield what is shown of a pair: its picture, its caption, and what is not plain about it."""
    yield f'<img src="{as_address(picture)}" alt="" width="{picture.width}" height="{picture.height}">'
    unread = f"<del>{text(pair.unread[:LONGEST_SHOWN])}</del>" if pair.unread else ""
    yield f'<p dir="auto">{text(pair.read)}{unread}</p>'
    if pair.unread:
        yield '<p class="small">cut · <span lang="zh-CN">被截断</span></p>'
    if pair.tokens is not None and without_case_and_space(pair.tokens) != without_case_and_space(pair.read):
        yield f'<p class="small">as tokens · <span lang="zh-CN">分词后</span>: {text(pair.tokens)}</p>'
    if pair.num_captions > 1:
        number = pair.num_captions
        yield f'<p class="small">one of {number} captions · <span lang="zh-CN">{number} 条文本之一</span></p>'


def without_case_and_space(caption: str) -> str:
    """Return a caption without what tokenizers change and readers do not miss: capitals and white space."""
    return "".join(caption.lower().split())


def text(words: str) -> str:
    """Return words as a page shows them, without credentials."""
    return escape(printable(masked(words)))


def as_address(picture: Image.Image) -> str:
    """Return a picture as an address that holds it."""
    png = io.BytesIO()
    picture.save(png, "PNG")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
