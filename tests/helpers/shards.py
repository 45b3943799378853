"""Tar shards: archives of given members, and random ones as they come from the wild."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
SIZES = (0, 1, 511, 512, 513, 1024, 5000)


def write_tar(path: Path, members: dict[str, bytes], kind: str = "ustar") -> Path:
    """Write an archive of members in their order, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=FORMATS[kind]) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def numbered(shard: int, num_samples: int = 3) -> dict[str, bytes]:
    """Return members whose contents say their number and that of their shard; the pictures are none."""
    members = {}
    for number in range(num_samples):
        members[f"{number:03d}.jpg"] = f"picture {number} of shard {shard}".encode() * 40
        members[f"{number:03d}.txt"] = f"caption {number} of shard {shard}".encode()
    return members


def one_sample(tmp_path: Path, members: dict[str, bytes]) -> Path:
    """Write an archive of one sample, given by its extensions, and return its path."""
    return write_tar(tmp_path / "x.tar", {f"17.{extension}": content for extension, content in members.items()})


def random_name(draw: random.Random, number: int) -> str:
    folder = draw.choice(("", "", "deep/er/", "./", "x.y/", "a" * 90 + "/" + "b" * 60 + "/", "青蛙/"))
    return f"{folder}{draw.choice(('', 'long' * 12, 'näme '))}{number}"


def add_stranger(archive: tarfile.TarFile, draw: random.Random, kind: str) -> None:
    """Add something that is no sample: a folder, a link with a size, a file without an ending, what macOS adds."""
    info = tarfile.TarInfo(draw.choice(("folder", "README", "._17.jpg", "__meta__/17.txt", "deep/.hidden")))
    info.type = draw.choice((tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.REGTYPE))
    if info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        info.name, info.linkname = "17.jpg", "../" * draw.choice((1, 60)) + "etc/passwd"
        info.size = 700  # of the file that is linked to: no data follows
    if info.type == tarfile.REGTYPE:
        info.size = 700
    if kind == "ustar":
        info.linkname = info.linkname[:99]
    if kind == "pax":
        info.pax_headers = {"comment": "x" * draw.choice((1, 3000))}
    archive.addfile(info, io.BytesIO(bytes(700)) if info.type == tarfile.REGTYPE else None)


def write_random(path: Path, draw: random.Random, kind: str) -> None:
    """Write samples of random members, and strangers between them."""
    members = []
    for number in draw.sample(range(1000), 12):
        name = random_name(draw, number)
        for extension in draw.sample(("jpg", "PNG", "txt", "json", "seg.png", "pth"), draw.randint(1, 6)):
            content = {"txt": f" caption {number}\n".encode(), "json": b"{}"}.get(extension)
            members.append((f"{name}.{extension}", draw.randbytes(draw.choice(SIZES)) if content is None else content))
    if draw.random() < 0.3:
        draw.shuffle(members)
    with tarfile.open(path, "w", format=FORMATS[kind], pax_headers={"comment": "all"} if kind == "pax" else {}) as out:
        for name, content in members:
            if draw.random() < 0.3:
                add_stranger(out, draw, kind)
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), draw.choice((0, 1.5, 2**40))
            if kind == "ustar":
                info.mtime = 1
            out.addfile(info, io.BytesIO(content))
