"""What a file of pairs holds, whatever its format: an Arrow table, and where its picture paths start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow


@dataclass(frozen=True)
class TableContent:
    """Rows, the folder that picture paths in them start from, and what is wrong with rows that are broken, by place."""

    table: pyarrow.Table
    folder: Path
    broken: Mapping[int, str] = field(default_factory=dict)
