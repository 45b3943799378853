"""Pairs to train on, and a run on them that nobody disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest

from accel_clip import Config
from helpers.models import model_that_drops_patches
from helpers.pictures import write_coloured_pictures
from helpers.runs import config_that_draws, run_to_the_end

NUM_PAIRS = 48  # 36 or so to train on: four batches an epoch


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write small pictures with captions, and a model that drops patches."""
    folder = tmp_path_factory.mktemp("data")
    rows = write_coloured_pictures(folder, NUM_PAIRS)
    rows[6] = rows[6].partition(",")[0] + ","  # one without a caption, which is replaced and counted
    (folder / "pairs.csv").write_text("\n".join(["image,caption", *rows]), encoding="utf-8")
    model_that_drops_patches(folder)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Return settings of a run that went from its beginning to its end at one go."""
    config = config_that_draws(data, tmp_path_factory.mktemp("whole") / "run")
    run_to_the_end(config)
    return config
