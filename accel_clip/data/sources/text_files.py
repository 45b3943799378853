"""Text files in the encoding they were written in: tables and `.txt` captions from any office program."""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TextIO

from accel_clip import console
from accel_clip.faults import ConfigError, DataError

BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
CHUNK_BYTES = 1 << 22
LINES_TO_GUESS_FROM = 1000
LEAST_TYPICAL_SHARE = 0.6  # of the characters beyond ASCII, for a guess to be worth making


def read_text(path: Path, encoding: str | None) -> str:
    """Return the text of a file, decoded as `find_encoding` says, its line ends as they stand."""
    with open_text(path, encoding) as file:
        return file.read()


def open_text(path: Path, encoding: str | None) -> TextIO:
    """Return a file open for reading and known to decode, its line ends as they stand."""
    return path.open(encoding=find_encoding(path, encoding), newline="")


def find_encoding(path: Path, encoding: str | None) -> str:
    """Return what all of a file decodes with: its byte-order mark says, else `encoding`, else UTF-8, else a guess.

    `encoding` is the setting `data.encoding`; a guess is said on the console. Raises `DataError` naming the line and
    the byte that do not decode, `ConfigError` for a name that is no encoding.
    """
    require_text_encoding(encoding)
    try:
        with path.open("rb") as file:
            mark = marked_encoding(file.read(4))
            chosen = mark or encoding or "utf-8"
            problem = undecodable(file, chosen)
            if problem is None:
                return chosen
            guess = None if mark or encoding else guess_encoding(file_lines(file))
            if guess is not None and undecodable(file, guess) is None:
                console.say(f"{path}: not UTF-8, read as {guess}; if its text looks wrong, name it by data.encoding")
                return guess
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    raise DataError(f"{path}: {problem}: name its encoding by data.encoding, such as gb18030, or save it as UTF-8")


def decode_text(raw: bytes, encodings: tuple[str, ...]) -> str:
    """Return bytes as text by their byte-order mark, else the first encoding that fits, or `UnicodeDecodeError`."""
    mark = marked_encoding(raw)
    *others, last = (mark,) if mark else encodings
    for encoding in others:
        with contextlib.suppress(UnicodeDecodeError):
            return raw.decode(encoding)
    return raw.decode(last)


def decodes(raw: bytes) -> bool:
    """Return whether bytes are text by their byte-order mark or as UTF-8."""
    try:
        decode_text(raw, ("utf-8",))
    except UnicodeDecodeError:
        return False
    return True


def require_text_encoding(encoding: str | None) -> None:
    """Raise `ConfigError` unless Python decodes text of that name."""
    try:
        b"a".decode(encoding or "utf-8", errors="replace")
    except (LookupError, ValueError) as error:  # ValueError: a name with a null character
        raise ConfigError(
            f"data.encoding: {encoding!r} is no text encoding that Python knows: name one such as utf-8, gb18030, "
            "big5, shift_jis, euc_kr or cp1252"
        ) from error


def marked_encoding(head: bytes) -> str | None:
    """Return the encoding that a byte-order mark at the start of a file stands for."""
    return next((name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark)), None)


def undecodable(file: BinaryIO, encoding: str) -> str | None:
    """Return what first does not decode in a whole file, such as `line 3: byte 0xb0 is not utf-8`, or None."""
    decoder = codecs.getincrementaldecoder(encoding)()
    num_lines = 0
    file.seek(0)
    try:
        while chunk := file.read(CHUNK_BYTES):
            num_lines += decoder.decode(chunk).count("\n")
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        before = error.object[: error.start].decode(encoding, errors="replace")
        line = num_lines + before.count("\n") + 1
        return f"line {line}: byte 0x{error.object[error.start]:02x} is not {encoding} ({error.reason})"
    return None


def file_lines(file: BinaryIO) -> Iterable[bytes]:
    """Return the lines of a file from its start."""
    file.seek(0)
    return file


def guess_encoding(lines: Iterable[bytes]) -> str | None:
    """Return the encoding in which most characters beyond ASCII are everyday ones, or None when none reads well.

    Line ends of all candidates are those of ASCII, so lines can be judged apart.
    """
    text = b"".join(islice((line for line in lines if not line.isascii()), LINES_TO_GUESS_FROM))
    shares = {name: typical_share(text, name, is_typical) for name, is_typical in CANDIDATES.items()}
    best = max(shares, key=lambda name: shares[name])  # the first of equals
    return best if shares[best] >= LEAST_TYPICAL_SHARE else None


def typical_share(raw: bytes, encoding: str, is_typical: Callable[[str, str, str], bool]) -> float:
    """Return the share of the characters beyond ASCII that are typical of the encoding's languages; 0 if it fails."""
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError:
        return 0.0
    padded = f" {text} "
    typical = [is_typical(padded[i], padded[i + 1], padded[i + 2]) for i in range(len(text)) if not text[i].isascii()]
    return sum(typical) / max(len(typical), 1)


def is_in_rows(encoding: str, *rows: tuple[int, int]) -> Callable[[str, str, str], bool]:
    """Return whether a character stands in those rows of a two-byte character set, where its everyday ones are."""

    def is_typical(before: str, character: str, after: str) -> bool:
        code = character.encode(encoding, errors="ignore")
        return len(code) == 2 and any(first <= code[0] <= last for first, last in rows)

    return is_typical


def is_cyrillic(before: str, character: str, after: str) -> bool:
    """Return whether a character is a Russian letter that does not touch a Latin one, or a punctuation mark."""
    touches_latin = any(other.isascii() and other.isalpha() for other in (before, after))
    return ("А" <= character <= "я" or character in "Ёё«»—–№…“”") and not touches_latin


def is_western(before: str, character: str, after: str) -> bool:
    """Return whether a character is an accented letter or a punctuation mark among ASCII characters."""
    return (character.isalpha() or character in "«»—–…‘’“”°·¿¡€£") and before.isascii() and after.isascii()


CANDIDATES: dict[str, Callable[[str, str, str], bool]] = {  # of equals the first wins, which has fewer typical ones
    "cp949": is_in_rows("euc_kr", (0xB0, 0xC8)),  # the Hangul of KS X 1001
    "gb18030": is_in_rows("gb2312", (0xA1, 0xA3), (0xB0, 0xD7)),  # punctuation, and the 3,755 common hanzi of GB 2312
    "big5": is_in_rows("big5", (0xA1, 0xA3), (0xA4, 0xC6)),  # punctuation, and the 5,401 common hanzi of Big5
    "cp932": is_in_rows("euc_jp", (0xA1, 0xA5), (0xB0, 0xCF)),  # punctuation, kana, and level 1 kanji of JIS X 0208
    "cp1251": is_cyrillic,
    "cp1252": is_western,
}
