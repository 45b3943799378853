"""Pictures that are the files of a folder: their names are paths as they stand, whatever a cell of a table would mean.

A person may call a file `data:1.png` or, outside of Windows, `a\\b.png`.
"""

from __future__ import annotations

from collections.abc import Iterator

from accel_clip.data.sources.tables.delimited import ROWS_AT_ONCE
from accel_clip.data.sources.tables.table import TableSource, path_from


class PictureFiles(TableSource):
    """Pairs in the rows of a table whose pictures are files, called as they were found from `root` on."""

    def stored(self, index: int) -> tuple[None, str]:
        """Return no bytes, and the path of a picture."""
        return None, self.table.column(self.columns.image)[int(index)].as_py()

    def keys(self) -> Iterator[str]:
        """Yield the key of every pair."""
        for batch in self.table.select([self.columns.image]).to_batches(max_chunksize=ROWS_AT_ONCE):
            yield from (path_from(self.root, path) for path in batch.column(0).to_pylist())
