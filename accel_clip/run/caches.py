"""What of a run's data is computed once, before the first step: features of a frozen tower, decoded pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from accel_clip.data.caches.feature_encoding import open_features
from accel_clip.data.caches.features import FeatureCache
from accel_clip.data.caches.picture_building import open_pictures
from accel_clip.data.caches.pictures import PictureCache
from accel_clip.data.examples import Preparation, preparation_for
from accel_clip.models.frozen_tower import FrozenTower
from accel_clip.process.waiting import Lookout
from accel_clip.run.folder import RunFolder
from accel_clip.run.parts import RunParts
from accel_clip.run.stages import Stage


@dataclass(frozen=True)
class Caches:
    """What is known of the training data; nothing where the settings keep nothing."""

    features: Mapping[str, FeatureCache]
    """of the frozen tower, by its side: image or text"""
    pictures: PictureCache | None
    """the decoded pictures, None where they are decoded again in every epoch"""

    def preparation(self, parts: RunParts, stage: Stage) -> Preparation:
        """Return what pairs go through in a stage, with all that is known of them."""
        return preparation_for(parts.model, stage.config, self.features, self.pictures)


def frozen_tower(parts: RunParts, num_rows: int) -> FrozenTower | None:
    """Return the tower whose features are kept, None without any; raises `ConfigError` where it cannot run alone.

    num_rows: the most that go through at once.
    """
    side, assembly = parts.config.cached_tower, parts.assembly
    return None if side is None else FrozenTower(side, assembly.parallel, parts.model, assembly.anatomy, num_rows)


def open_caches(parts: RunParts, tower: FrozenTower | None, folder: RunFolder, lookout: Lookout) -> Caches:
    """Return what is known of the training data, computed now where it is not on disk; collective.

    tower: the one whose features are kept. Raises `StopAsked`.
    """
    pairs, config, workers = parts.data.feed.source, parts.config, parts.num_workers
    if pairs is None:
        return Caches({}, None)
    features, pictures = {}, None
    if tower is not None:
        place = folder.features / tower.side
        features[tower.side] = open_features(tower, pairs, config.data.max_pixels, place, workers, lookout)
    if config.data.image_cache_gib:
        asked = (parts.accelerator, pairs, parts.model, config)
        pictures = open_pictures(*asked, folder.pictures, workers, lookout)
    return Caches(features, pictures)
