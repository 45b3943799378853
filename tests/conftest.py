"""What several test modules share; the environment is set before torch and datasets are imported."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
datasets_cache = tempfile.TemporaryDirectory(prefix="accel-clip-tests-")
os.environ["HF_DATASETS_CACHE"] = datasets_cache.name


@pytest.fixture(scope="session")
def stamps() -> Path:
    """Return the folder of 785 real pictures with English and Chinese captions, beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data" / "stamps"
    if not (folder / "captions.csv").is_file():
        pytest.skip("the stamps are not here")
    return folder


@pytest.fixture(autouse=True)
def no_precision_left() -> Iterator[None]:
    """Forget the precision of a test's run, which the next `Accelerator()` of the process would take over."""
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None and state.AcceleratorState._shared_state.get("_mixed_precision", "no") != "no":
        state.AcceleratorState._reset_state(reset_partial_state=True)
