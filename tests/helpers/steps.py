"""A small model, a batch for it, and a plan that cuts the batch."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from accel_clip.config import ModelConfig
from accel_clip.data.batch import Batch
from accel_clip.models.build import ClipModel, build_model
from accel_clip.step.chunks import Plan as SidedPlan
from helpers.models import small_model

NUM_PAIRS = 13


def Plan(rows: int, num_kept: int) -> SidedPlan:
    kept = {"image": max(0, num_kept - 2), "text": num_kept}
    return SidedPlan(rows, NUM_PAIRS if num_kept == 99 else rows, kept, cost_of_a_group=3)


CAPTIONS = ["a frog", "a very long caption of a red bird " * 3, "two cats", "a frog", "one white peahen on wet grass"]


def make_batch(model: ClipModel, num_pairs: int = NUM_PAIRS) -> Batch:
    torch.manual_seed(7)
    captions = [CAPTIONS[i % 5] + ("" if i % 4 == 0 else f" {i}") for i in range(num_pairs)]
    size = model.preprocess_config["size"]
    image = torch.randint(0, 256, (num_pairs, 3, *size), dtype=torch.uint8)
    numbers = torch.arange(num_pairs)
    return Batch(image, model.tokenizer(captions), numbers, numbers, numbers)


def make_model(folder: Path, bias: bool = False, **vision: float) -> ClipModel:
    described = json.loads(Path(small_model(folder)).read_text())
    described["vision_cfg"].update(vision)
    if bias:
        described["init_logit_bias"] = -3.0
    file = folder / f"model_{abs(hash(json.dumps(described)))}.json"
    file.write_text(json.dumps(described))
    torch.manual_seed(1)
    return build_model(ModelConfig(str(file)))
