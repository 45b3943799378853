"""The registered source `karpathy`: one split of a file of Karpathy's."""

from __future__ import annotations

from pathlib import Path

from accel_clip.data.sources.base import SOURCES, Source, SourceOptions
from accel_clip.data.sources.tables.json_files import read_whole
from accel_clip.data.sources.tables.karpathy_json import TRAINING, is_karpathy, read_karpathy
from accel_clip.data.sources.tables.opening import open_content
from accel_clip.faults import DataError


@SOURCES.register("karpathy")
def open_karpathy(argument: str, options: SourceOptions) -> Source:
    """A split of a file of Karpathy's, such as dataset_coco.json: karpathy:file[:split]."""
    file, _, split = (argument, "", "") if Path(argument).expanduser().exists() else argument.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        raise DataError(f"'karpathy:{argument}' names no file: write karpathy:dataset_coco.json or …json:val")
    content = read_whole(path, options)
    if not is_karpathy(content):
        raise DataError(f"{path}: it lists no images with their sentences, as Karpathy's files do")
    return open_content(read_karpathy(content, path, options, split or TRAINING), f"karpathy:{argument}", options)
