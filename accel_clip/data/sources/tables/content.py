"""What a file of pairs holds, whatever its format: an Arrow table, and where its picture paths start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow


@dataclass(frozen=True)
class TableContent:
    """Rows, and what is known of them beside."""

    table: pyarrow.Table
    """the rows"""
    folder: Path
    """that picture paths in them start from"""
    broken: Mapping[int, str] = field(default_factory=dict)
    """what is wrong with rows that are broken, by place"""
