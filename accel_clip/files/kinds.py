"""Kinds of marked folders, each named where its mark says what a folder is."""

from __future__ import annotations

CHECKPOINT = "checkpoint"
CHECKPOINTS = "checkpoints"
CONTACT_SHEET = "contact sheet"
EXPORT = "export"
FEATURES = "features"
PICTURES = "decoded pictures"
