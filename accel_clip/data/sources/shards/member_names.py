"""From the names of members in tar shards to the keys of samples: `St. Peter.jpg`, `17.txt`, `17.seg.png`.

1. A name ends behind its last dot, as in a folder: a picture and a text with one name are a pair, whatever dots are in
   it. WebDataset's programs write endings of several parts as well, and its readers cut at the first dot.
2. Whether `seg` belongs to the ending is seen in the other names: it does where a picture has the name without it
   (`17.jpg`), or where pictures and texts differ by such words again and again (`17.input.jpg`, `17.output.txt`). It
   does not where the name with it has a picture and a text of its own. Endings that a setting names are endings.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Set

WORD = re.compile(rb"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
META = re.compile(rb"__[^/]*__(/|$)")  # what WebDataset notes about a shard itself


def stem_and_ending(name: bytes) -> tuple[bytes, str] | None:
    """Return what stands before the last dot of a member's name, and the ending behind it in lower case.

    The ending is empty for hidden files, as macOS adds them to archives (`._17.jpg`), and for those without a dot. None
    for what WebDataset notes about a shard.
    """
    if META.match(name) or not name:
        return None
    start = start_of_file(name)
    dot = name.rfind(b".", start)
    if dot <= start or name.startswith(b".", start):
        return name, ""
    return name[:dot], name[dot + 1 :].decode(errors="backslashreplace").lower()


def key_and_ending(stem: bytes, ending: str, words: Set[bytes]) -> tuple[bytes, str]:
    """Return the key of a member's sample and its ending with the words that belong to it (see `words_of_endings`)."""
    for dot in dots_in(stem) if words else ():
        word = stem[dot + 1 :].lower()
        if word in words:
            return stem[:dot], f"{word.decode()}.{ending}"
    return stem, ending


def start_of_file(name: bytes) -> int:
    """Return where the name of the file begins, behind its folders."""
    return name.rfind(b"/") + 1


def dots_in(stem: bytes) -> Iterator[int]:
    """Yield where dots stand in the name of a file, but for one that it begins with."""
    dot = stem.find(b".", start_of_file(stem) + 1)
    while dot >= 0:
        yield dot
        dot = stem.find(b".", dot + 1)


def words_named(endings: Iterable[str]) -> frozenset[bytes]:
    """Return the words of endings that settings name, such as `seg` of `seg.png`."""
    return frozenset(word.lower().encode() for word, dot, _ in (each.rpartition(".") for each in endings) if dot)


def words_of_endings(
    endings: Mapping[bytes, Set[str]], pictures: Collection[str], texts: Collection[str]
) -> frozenset[bytes]:
    """Return the words that stand before the last dot of names and belong to endings, by the module's second rule.

    endings: those of every stem in a source, or in enough of it; pictures: what pictures end with; texts: what ends a
    text that makes a pair with one.
    """
    with_picture = {stem for stem, found in endings.items() if not found.isdisjoint(pictures)}
    for_it, against_it, sure = Counter[bytes](), Counter[bytes](), set[bytes]()
    others: dict[bytes, list[bytes]] = defaultdict(list)
    for stem, found in endings.items():
        dots = list(dots_in(stem))
        whole = next((dot for dot in reversed(dots) if stem[:dot] in with_picture), None)
        if stem in with_picture and (not found.isdisjoint(texts) or (whole is None and len(found) > 1)):
            against_it.update(stem[dot + 1 :].lower() for dot in dots)
        elif whole is not None:
            word = stem[whole + 1 :].lower()
            for_it[word] += 1
            sure |= {word} if word[:1].isalpha() else set()
        elif dots:
            others[stem[: dots[0]]].append(stem)
    for key, stems in others.items():
        if 0 < len(with_picture.intersection(stems)) < len(stems) + (key in endings):
            for_it.update(stem[len(key) + 1 :].lower() for stem in stems)
    return frozenset(
        word
        for word, count in for_it.items()
        if count > against_it[word] and (count > 1 or word in sure) and WORD.fullmatch(word)
    )
