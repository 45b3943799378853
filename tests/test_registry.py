"""Registries: names, aliases, and what is said about a wrong one."""

from __future__ import annotations

import pytest

from accel_clip.faults import ConfigError
from accel_clip.registry import Registry


def test_entries_are_found_by_name_and_alias_and_described() -> None:
    registry = Registry("loss", setting="loss.name")

    @registry.register("clip", "ClipLoss")
    def clip() -> str:
        """Softmax over the batch.

        More.
        """
        return "here"

    registry.register("theirs", description="bought")(dict)
    assert registry.get("ClipLoss") is registry.get("clip") is clip
    assert [(entry.name, entry.description) for entry in registry] == [
        ("clip", "Softmax over the batch."),
        ("theirs", "bought"),
    ]


def test_a_wrong_name_is_told_the_known_ones_and_the_nearest() -> None:
    registry = Registry("loss", setting="loss.name")
    registry.register("siglip", "SigLipLoss")(dict)
    registry.register("clip")(dict)
    with pytest.raises(
        ConfigError, match=r"loss\.name: unknown loss 'clipp', did you mean 'clip'\? known: clip, siglip"
    ):
        registry.get("clipp")
    with pytest.raises(ConfigError, match="did you mean 'SigLipLoss'"):
        registry.get("SigLibLoss")


def test_a_name_cannot_be_taken_twice() -> None:
    registry = Registry("loss", setting="loss.name")
    registry.register("clip", "ClipLoss")(dict)
    with pytest.raises(ConfigError, match="'ClipLoss' is registered twice"):
        registry.register("ClipLoss")(list)
